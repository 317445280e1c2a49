"""Which launches do which job on a GPU. Values are bfloat16 rows; sums are float32 inside kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.kernels import epilogue
from effc.kernels.gpu.caches import Caches
from effc.kernels.gpu.launches import Room
from effc.passes.lower._attends import attend
from effc.passes.lower._gpu_experts import adapt, mix, route
from effc.passes.lower._gpu_fuse import Mixture
from effc.passes.lower._gpu_linears import linear
from effc.passes.lower._gpu_norm import normalize
from effc.passes.lower._gpu_scans import scan
from effc.passes.lower._jobs import (
    Arithmetic,
    Attend,
    Embed,
    Job,
    Linear,
    Normalize,
    Route,
    Scan,
    Unlowered,
)
from effc.passes.lower._launching import Launching


def launch(build: Launching, job: Job, layer: int | None) -> None:
    """Append the launches of one job.

    Raises:
        Unlowered: nothing does it on a GPU.
    """
    if isinstance(job, Embed):
        _embed(build, job, layer)
    elif isinstance(job, Normalize):
        normalize(build, job, layer)
    elif isinstance(job, Route):
        route(build, job, layer)
    elif isinstance(job, Mixture):
        mix(build, job, layer) if job.activation else adapt(build, job, layer)
    elif isinstance(job, Scan):
        scan(build, job, layer)
    elif type(job) is Linear:
        linear(build, job, layer)
    elif isinstance(job, Attend):
        attend(build, job, layer)
    elif isinstance(job, Arithmetic):
        _arithmetic(build, job, layer)
    else:
        where = job.paths[0] if job.paths else "a job between nodes"
        raise Unlowered(f"`{where}`: programs of a GPU have no launch for `{type(job).__name__}`")


def _embed(build: Launching, job: Embed, layer: int | None) -> None:
    unit: Any = build.model.module(job.table.unit)
    packed = job.table.quantized is not None
    table = None if packed else build.tensor(job.table.tensor, torch.bfloat16)
    first, offset = job.positions or ("", 0)
    places = build.tensor(first, torch.bfloat16) if first else None
    kind = build.tensor(job.types, torch.bfloat16)[0] if job.types else None
    out = job.writes[0]

    def run(room: Room, _: Caches) -> None:
        y = unit.lookup(room.token).to(torch.bfloat16) if table is None else F.embedding(room.token, table)
        if job.scale != 1.0:
            y = y * job.scale
        if kind is not None:
            y = y + kind
        if places is not None:
            y = y + places[room.position.long() + offset]
        room.values[out].copy_(y)

    build.add("embed", job, layer, run, why="rows of a table, looked up by torch")


_PLAIN: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "add": lambda a, b, _: a + b,
    "scale": lambda a, _, number: a * number,
    "softcap": lambda a, _, number: number * torch.tanh(a.float() / number),
    "sigmoid": lambda a, _, __: torch.sigmoid(a.float()),
}


def _arithmetic(build: Launching, job: Arithmetic, layer: int | None) -> None:
    out, plain = job.writes[0], _PLAIN.get(job.name)
    weight = None if job.tensor is None else build.tensor(job.tensor, torch.bfloat16)
    if plain is None and job.name not in ("gate", "times") and job.name not in epilogue.ACTIVATIONS:
        raise Unlowered(f"`{job.name}` is no arithmetic that programs of a GPU know")

    def run(room: Room, _: Caches) -> None:
        a, b = (room.values[n] for n in (job.reads[0], job.reads[-1]))
        if job.name == "gate":
            y = (a.unflatten(1, (-1, job.each)) * b.unsqueeze(-1)).flatten(1) if job.each > 1 else a * b
        elif weight is not None:
            y = a * weight
        else:
            y = epilogue.apply((job.name,), a.float(), {}) if plain is None else plain(a, b, job.number)
        room.values[out].copy_(y)

    build.add("elementwise", job, layer, run, why="by torch: no matrix stands before it")
