"""Norms on a GPU: of rows, and of heads within rows; to bfloat16, or to bytes for the layers behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effc.kernels.byte_linear.spec import Kind
from effc.kernels.gpu.caches import Caches
from effc.kernels.gpu.launches import Bytes, Room
from effc.kernels.gpu.load import load
from effc.kernels.norm import emit_triton as norm_triton
from effc.kernels.norm.emit_triton import NormGpuSpec
from effc.passes.lower._gpu_bytes import byted, taken
from effc.passes.lower._gpu_linears import summed
from effc.passes.lower._jobs import Normalize
from effc.passes.lower._launching import Launching

RUNS = (0, 64, 128)
"""Columns that a norm adds up bytes of."""


def normalize(build: Launching, job: Normalize, layer: int | None) -> None:
    """One launch, which also gives what the linear layers behind it would each have to make."""
    width = build.jobs.widths[job.reads[0]] // job.parts
    x, out = job.reads[0], job.writes[0]
    wanted = None
    if build.rows != "bfloat16" and job.parts == 1:
        wanted = byted(build.jobs, build.rows, out)
    if wanted is not None and wanted[1] in RUNS:
        kind, run = wanted[0].kind, wanted[1]
        to_bytes, spec = byte_normalizer(build, job, width, kind, run)
        build.byted.add((out, run))

        def make(room: Room, _: Caches) -> None:
            room.bytes[out, run] = to_bytes(room.values[x])

        build.add("norm", job, layer, make, specs=(spec,))
        return
    norm, spec = normalizer(build, job, width, summed(build.jobs.jobs, out) if job.parts == 1 else 0)
    if spec.run:
        build.summed.add(out)

    def go(room: Room, _: Caches) -> None:
        sums = norm(room.values[x].view(-1, width), room.values[out].view(-1, width))
        if sums is not None:
            room.sums[out] = sums

    build.add("norm", job, layer, go, specs=(spec,))


def normalizer(
    build: Launching, job: Normalize, width: int, total: int = 0
) -> tuple[Callable[[Tensor, Tensor], Tensor | None], NormGpuSpec]:
    """x [N, width], y the same, written -> the sums of y over runs of `total` columns, if there are any."""
    run: Any = total if total and width % total == 0 else 0
    spec, given = _spec(build, job, width, run=run)
    module = load(norm_triton.emit(spec))

    def norm(x: Tensor, y: Tensor) -> Tensor | None:
        rows = _of_rows(job, x)
        if run:
            rows["sums"] = torch.empty(width // run, len(x), device=x.device)
        module.forward(x=x, y=y, **given, **rows)
        return rows.get("sums")

    return norm, spec


def byte_normalizer(
    build: Launching, job: Normalize, width: int, kind: Kind, run: int
) -> tuple[Callable[[Tensor], Bytes], NormGpuSpec]:
    """x [M, width] -> the rows of y as bytes."""
    spec, given = _spec(build, job, width, run=run, to=kind)
    module = load(norm_triton.emit(spec))

    def norm(x: Tensor) -> Bytes:
        made = taken(kind, len(x), width, run, x.device)
        totals = {} if made.totals is None else {"totals": made.totals}
        module.forward(x=x, q=made.q, rows=made.rows, **given, **_of_rows(job, x), **totals)
        return made

    return norm, spec


def _spec(build: Launching, job: Normalize, width: int, **more: Any) -> tuple[NormGpuSpec, dict[str, Tensor]]:
    form: Any = job.form
    spec = NormGpuSpec(form=form, eps=job.eps, offset=job.offset, bias=job.bias is not None, **more)
    gain = build.tensor(job.weight, torch.float32) if job.weight else torch.ones(width, device=build.device)
    given = {"gain": gain}
    if job.bias is not None:
        given["bias"] = build.tensor(job.bias, torch.float32)
    return spec, given


def _of_rows(job: Normalize, x: Tensor) -> dict[str, Tensor]:
    rows = {"inverse": torch.empty(len(x), device=x.device)}
    if job.form == "layer":
        rows["mean"] = torch.empty(len(x), device=x.device)
    return rows
