"""Which launches do which job on a GPU. Values are bfloat16 rows; sums are float32 inside kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from effc.kernels import epilogue
from effc.kernels.gpu.launches import Caches, Room
from effc.kernels.gpu.load import load
from effc.kernels.quant_linear import emit_triton as quant_triton
from effc.kernels.quant_linear.layout_gpu import pack
from effc.kernels.quant_linear.spec_gpu import WeightOnlySpec
from effc.kernels.quant_linear.spec_gpu import refuses as quant_refuses
from effc.passes.lower import _weights as weights
from effc.passes.lower._attends import attend
from effc.passes.lower._gpu_norm import normalizer
from effc.passes.lower._jobs import Arithmetic, Attend, Embed, Job, Linear, Matrix, Normalize, Unlowered
from effc.passes.lower._launching import Launching

Given = dict[str, Any]


def launch(build: Launching, job: Job, layer: int | None) -> None:
    """Append the launches of one job.

    Raises:
        Unlowered: nothing does it on a GPU.
    """
    if isinstance(job, Embed):
        _embed(build, job, layer)
    elif isinstance(job, Normalize):
        _normalize(build, job, layer)
    elif type(job) is Linear:
        _quantized(build, job, layer) if job.matrices[0].quantized is not None else _dense(build, job, layer)
    elif isinstance(job, Attend):
        attend(build, job, layer)
    elif isinstance(job, Arithmetic):
        _arithmetic(build, job, layer)
    else:
        raise Unlowered(f"`{job.paths[0]}`: programs of a GPU have no launch for `{type(job).__name__}` yet")


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


def _normalize(build: Launching, job: Normalize, layer: int | None) -> None:
    width = build.jobs.widths[job.reads[0]] // job.parts
    total = _summed(build, job.writes[0]) if job.parts == 1 else 0
    norm, spec = normalizer(build, job, width, total)
    x, out = job.reads[0], job.writes[0]

    def run(room: Room, _: Caches) -> None:
        y = room.values[out]
        sums = norm(room.values[x].view(-1, width), y.view(-1, width))
        if sums is not None:
            room.sums[out] = sums

    build.add("norm", job, layer, run, specs=(spec,))


def _summed(build: Launching, value: int) -> int:
    """Columns whose sums the packed matrices that read a value want; 0 when they want none, or several."""
    wanted = set()
    for job in build.jobs.jobs:
        if type(job) is Linear and job.reads[0] == value and job.matrices[0].quantized is not None:
            spec = weight_spec(job.matrices[0], ())
            wanted.add(spec.run if spec.sums else 0)
    return wanted.pop() if len(wanted) == 1 else 0


def weight_spec(matrix: Matrix, chain: tuple[str, ...]) -> WeightOnlySpec:
    """The kernel of a packed matrix.

    Raises:
        Unlowered: there is none with these bits and groups.
    """
    assert matrix.quantized is not None
    bits, group, symmetric, scale = matrix.quantized
    given: Given = {"bits": bits, "group": group, "symmetric": symmetric, "scale": scale, "epilogue": chain}
    given["columns"] = (
        128 if matrix.columns % 128 == 0 and (not group or group % 128 == 0 or 128 % group == 0) else 64
    )
    try:
        return WeightOnlySpec(**given)
    except ValidationError as error:
        raise Unlowered(f"`{matrix.unit}`: {error.errors()[0]['msg']}") from None


def _quantized(build: Launching, job: Linear, layer: int | None) -> None:
    x, out = job.reads[0], job.writes[0]
    if job.paired:
        first, second = ([m] for m in job.matrices)
        up, up_spec = _product(build, second, ())
        gate, spec = _product(build, first, (*job.epilogue, "mul"))

        def run(room: Room, _: Caches) -> None:
            rows = room.values[x]
            more: Given = {"xsum": room.sums[x]} if x in room.sums and spec.sums else {}
            gate(x=rows, gate=up(x=rows, **more), out=room.values[out], **more)

        build.add("quant_linear", job, layer, run, specs=(up_spec, spec))
        return
    product, spec = _product(build, job.matrices, job.epilogue)
    bias = _bias(build, job)

    def run_one(room: Room, _: Caches) -> None:
        more: Given = {"xsum": room.sums[x]} if x in room.sums and spec.sums else {}
        if "residual" in spec.epilogue:
            more["residual"] = room.values[job.reads[-1]]
        product(x=room.values[x], out=room.values[out], **bias, **more)

    build.add("quant_linear", job, layer, run_one, specs=(spec,))


def _product(
    build: Launching, matrices: Sequence[Matrix], chain: tuple[str, ...]
) -> tuple[Callable[..., Tensor], WeightOnlySpec]:
    """x [M, K] and operands of the chain -> y [M, N], of matrices laid side by side."""
    spec = weight_spec(matrices[0], chain)
    n, k = sum(m.rows for m in matrices), matrices[0].columns
    if words := quant_refuses(spec, 1, n, k):
        raise Unlowered(f"`{matrices[0].unit}`: {words}")
    each = [weights.codes(build.model, spec, m) for m in matrices]
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*each, strict=True))
    packed = pack(spec, codes, scales, None if spec.symmetric else zeros)
    held = {name: t.to(build.device) for name, t in packed._asdict().items() if t is not None}
    module = load(quant_triton.emit(spec))

    def product(**given: Any) -> Tensor:
        y: Tensor = module.launch(**held, **given, n=n)
        return y

    return product, spec


def _bias(build: Launching, job: Linear) -> dict[str, Tensor]:
    names = [m.bias for m in job.matrices if m.bias is not None]
    return {"bias": torch.cat([build.tensor(name, torch.float32) for name in names])} if names else {}


def _dense(build: Launching, job: Linear, layer: int | None) -> None:
    x, out = job.reads[0], job.writes[0]
    turned = [
        build.tensor(m.tensor, torch.bfloat16).mul_(m.factor).t()
        if m.factor != 1.0
        else build.tensor(m.tensor, torch.bfloat16).t()
        for m in job.matrices
    ]
    bias = _bias(build, job)

    def run(room: Room, _: Caches) -> None:
        given: Mapping[str, Tensor] = bias
        if "residual" in job.epilogue:
            given = {**bias, "residual": room.values[job.reads[-1]]}
        parts = [torch.mm(room.values[x], w) for w in turned]
        y = parts[0] if job.paired else torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        if job.epilogue:
            y = epilogue.apply(job.epilogue, y.float(), given)
        room.values[out].copy_(y * parts[1] if job.paired else y)

    build.add("dense_linear", job, layer, run, why="the weights are not packed: torch multiplies them")


_PLAIN: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "add": lambda a, b, _: a + b,
    "gate": lambda a, b, _: a * b,
    "scale": lambda a, _, number: a * number,
    "softcap": lambda a, _, number: number * torch.tanh(a.float() / number),
}


def _arithmetic(build: Launching, job: Arithmetic, layer: int | None) -> None:
    out = job.writes[0]

    def run(room: Room, _: Caches) -> None:
        a, b = (room.values[n] for n in (job.reads[0], job.reads[-1]))
        plain = _PLAIN.get(job.name)
        y = epilogue.apply((job.name,), a.float(), {}) if plain is None else plain(a, b, job.number)
        room.values[out].copy_(y)

    if job.name not in _PLAIN and job.name not in epilogue.ACTIVATIONS:
        raise Unlowered(f"`{job.name}` is no arithmetic that programs of a GPU know")
    build.add("elementwise", job, layer, run, why="by torch: no matrix stands before it")
