"""Rows of bytes on a GPU, where they are asked for: int8 beside packed weights, float8 beside dense ones.

A row's scale is found when the row is: by the norm before, where only such layers read what it gives, else by
a launch of its own that serves all of its readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from effc.kernels.byte_linear import emit_triton as byte_triton
from effc.kernels.byte_linear.layout import DTYPES, pack
from effc.kernels.byte_linear.spec import LARGEST, ByteLinearSpec, Kind, refuses
from effc.kernels.gpu.launches import Bytes, Room
from effc.kernels.gpu.load import load
from effc.kernels.quant_linear.spec_gpu import WeightOnlySpec
from effc.passes.lower import _weights as weights
from effc.passes.lower._jobs import Job, Jobs, Linear, Matrix, Route
from effc.passes.lower._launching import Launching, Product, Rows

CODES = {4: 8, 8: 128}
"""The code of zero by bits, as codes are stored."""


def of_bytes(
    build: Launching, job: Linear, matrices: Sequence[Matrix], chain: tuple[str, ...]
) -> Product | str:
    """A product of bytes, or in words why there is none."""
    spec = byte_spec(build.jobs, build.rows, job, matrices, chain)
    if isinstance(spec, str):
        return spec
    n, k = sum(m.rows for m in matrices), matrices[0].columns
    held = build.made(lambda: _packed(build, spec, matrices))
    module, run = load(byte_triton.emit(spec)), spec.run if spec.sums else 0
    first = (job.reads[0], run) not in build.byted
    build.byted.add((job.reads[0], run))

    def multiply(room: Room, x: int, out: Tensor | None, **given: Any) -> Tensor:
        if first:
            room.bytes[x, run] = made = taken(spec.kind, len(room.values[x]), k, run, room.token.device)
            totals = {"totals": made.totals} if run else {}
            module.quantize(room.values[x], made.q, made.rows, **totals)
        made = room.bytes[x, run]
        totals = {"totals": made.totals} if run else {}
        y: Tensor = module.multiply(q=made.q, rows=made.rows, **totals, **held, **given, n=n, out=out)
        return y

    return Product("byte_linear", multiply, (spec,))


def byte_spec(
    jobs: Jobs, rows: Rows, job: Linear, matrices: Sequence[Matrix], chain: tuple[str, ...]
) -> ByteLinearSpec | str:
    """The kernel of a layer with rows of bytes, or in words why it has none."""
    first = matrices[0]
    given: dict[str, Any] = {"epilogue": chain}
    if any(m.low is not None for m in matrices) or first.planes is not None or first.parts:
        return "no kernel of bytes takes these weights"
    if rows == "float8":
        if first.quantized is not None:
            return f"codes of {first.quantized[0]} bits multiply no float8"
        if any(isinstance(j, Route) and j.reads[0] == job.writes[0] for j in jobs.jobs):
            return "a router chooses by small differences"
        if job.writes[0] == jobs.output:
            return "the head keeps its digits"
        given |= {"kind": "float8", "bits": 8, "scale": "float32"}
    else:
        if first.quantized is None:
            return "the weights are not packed"
        bits, group, symmetric, scale = first.quantized
        if bits not in CODES:
            return f"codes of {bits} bits do not multiply bytes"
        given |= {"bits": bits, "group": group, "symmetric": symmetric, "scale": scale}
    given["columns"] = 128 if first.columns % 128 == 0 else 64
    try:
        spec = ByteLinearSpec(**given)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return refuses(spec, 1, sum(m.rows for m in matrices), first.columns) or spec


def byted(jobs: Jobs, rows: Rows, value: int) -> tuple[ByteLinearSpec, int] | None:
    """The kernel of a layer that reads a value, if all that read it want the same bytes and nothing else.

    The number is the columns of the totals that they want, 0 for none.
    """
    readers: list[Job] = [j for j in jobs.jobs if value in j.reads]
    found: list[ByteLinearSpec] = []
    for job in readers:
        if type(job) is not Linear or job.reads.count(value) > 1 or job.reads[0] != value:
            return None
        for matrices in [[m] for m in job.matrices] if job.paired else [job.matrices]:
            spec = byte_spec(jobs, rows, job, matrices, ())
            if isinstance(spec, str):
                return None
            found.append(spec)
    runs = {spec.run if spec.sums else 0 for spec in found}
    return (found[0], runs.pop()) if len(runs) == 1 and value != jobs.output else None


def taken(kind: Kind, rows: int, k: int, run: int, device: torch.device) -> Bytes:
    """Memory for M rows of K bytes."""
    q = torch.empty(rows, k, dtype=DTYPES[kind], device=device)
    totals = torch.empty(k // run, rows, dtype=torch.int32, device=device) if run else None
    return Bytes(q, torch.empty(rows, device=device), totals)


def _packed(build: Launching, spec: ByteLinearSpec, matrices: Sequence[Matrix]) -> dict[str, Tensor | None]:
    if spec.kind == "float8":
        w = torch.cat([build.tensor(m.tensor, torch.float32) * m.factor for m in matrices])
        scales = w.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST["float8"]
        return pack(spec, (w / scales).to(DTYPES["float8"]), scales, None)._asdict()
    stored = WeightOnlySpec(bits=spec.bits, group=spec.group, columns=spec.columns)
    each = [weights.codes(build.model, stored, m) for m in matrices]
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*each, strict=True))
    if spec.bits == 8:
        codes = (codes.short() - CODES[8]).to(torch.int8)
    return pack(spec, codes, scales, None if spec.symmetric else zeros)._asdict()
