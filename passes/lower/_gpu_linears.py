"""Linear layers on a GPU: which kernel multiplies by which matrix, and what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from effc.kernels.gpu.caches import Caches
from effc.kernels.gpu.launches import Room
from effc.kernels.gpu.load import load
from effc.kernels.quant_linear import emit_triton as quant_triton
from effc.kernels.quant_linear.layout_gpu import pack
from effc.kernels.quant_linear.spec_gpu import ROWS, WeightOnlySpec
from effc.kernels.quant_linear.spec_gpu import refuses as quant_refuses
from effc.passes.lower import _weights as weights
from effc.passes.lower._gpu_bytes import of_bytes
from effc.passes.lower._gpu_dense import dense
from effc.passes.lower._gpu_experts import mixture_spec
from effc.passes.lower._gpu_fuse import Mixture
from effc.passes.lower._gpu_planes import planes
from effc.passes.lower._jobs import Job, Linear, Matrix, Unlowered
from effc.passes.lower._launching import Launching, Product

RANKS = (16, 32, 64, 128)
"""Ranks that a packed matrix has behind it; fewer are filled up."""
WITHIN = 64
"""Up to as many the kernel makes A x itself, and no kernel stands before it."""


def linear(build: Launching, job: Linear, layer: int | None) -> None:
    """One launch: a product with its epilogue, or activation(gate) * up as two."""
    x, out = job.reads[0], job.writes[0]
    if job.paired:
        first, second = ([m] for m in job.matrices)
        up, gate = product(build, job, second, ()), product(build, job, first, (*job.epilogue, "mul"))

        def both(room: Room, _: Caches) -> None:
            gate.run(room, x, room.values[out], gate=up.run(room, x, None))

        build.add(gate.op, job, layer, both, specs=(*up.specs, *gate.specs), why=gate.why)
        return
    one = product(build, job, job.matrices, job.epilogue)
    names = [m.bias for m in job.matrices if m.bias is not None]
    bias = {"bias": torch.cat([build.tensor(name, torch.float32) for name in names])} if names else {}

    def run(room: Room, _: Caches) -> None:
        more = {"residual": room.values[job.reads[-1]]} if "residual" in job.epilogue else {}
        one.run(room, x, room.values[out], **bias, **more)

    build.add(one.op, job, layer, run, specs=one.specs, why=one.why)


def product(build: Launching, job: Linear, matrices: Sequence[Matrix], chain: tuple[str, ...]) -> Product:
    """x and operands of the chain -> y [M, N], of matrices laid side by side.

    Raises:
        Unlowered: no kernel takes them.
    """
    first, why = matrices[0], ""
    if build.rows != "bfloat16":
        made = of_bytes(build, job, matrices, chain)
        if isinstance(made, Product):
            return made
        why = f"rows stay bfloat16: {made}"
    if first.quantized is not None:
        return _packed(build, job.reads[0], matrices, chain, why)
    if first.planes is not None:
        return planes(build, first, chain, why)
    return dense(build, first, chain, why)


def weight_spec(matrices: Sequence[Matrix], chain: tuple[str, ...]) -> WeightOnlySpec:
    """The kernel of packed matrices side by side.

    Raises:
        Unlowered: there is none with these bits and groups.
    """
    first = matrices[0]
    assert first.quantized is not None
    bits, group, symmetric, scale = first.quantized
    given: dict[str, Any] = {"bits": bits, "group": group, "symmetric": symmetric, "scale": scale}
    given |= {"epilogue": chain} | ({} if bits == 3 else {"columns": _columns(group, first.columns)})
    ranks = sum(m.low[0].rows for m in matrices if m.low is not None)
    if ranks:
        extension = next((each for each in RANKS if each >= ranks), 0)
        if not extension:
            raise Unlowered(
                f"`{first.unit}`: adapters of {ranks} ranks behind one matrix; at most {RANKS[-1]}"
            )
        given |= {"extension": extension, "within": extension <= WITHIN}
    try:
        return WeightOnlySpec(**given)
    except ValidationError as error:
        raise Unlowered(f"`{first.unit}`: {error.errors()[0]['msg']}") from None


def summed(jobs: Sequence[Job], value: int) -> int:
    """Columns whose sums the packed matrices that read a value want; 0 when they want none, or several."""
    wanted = set()
    for job in jobs:
        if isinstance(job, Mixture) and job.reads[0] == value and job.activation:
            wanted.add(mixture_spec(job).sums)
        if type(job) is Linear and job.reads[0] == value and job.matrices[0].quantized is not None:
            spec = weight_spec(job.matrices[:1], ())
            wanted.add(spec.run if spec.sums else 0)
    return wanted.pop() if len(wanted) == 1 else 0


def _columns(group: int, k: int) -> int:
    """Columns of a turn of the loop that divide a row, and groups."""
    return 128 if k % 128 == 0 and (not group or group % 128 == 0 or 128 % group == 0) else 64


def _packed(
    build: Launching, x: int, matrices: Sequence[Matrix], chain: tuple[str, ...], why: str
) -> Product:
    spec = weight_spec(matrices, chain)
    n, k = sum(m.rows for m in matrices), matrices[0].columns
    if words := quant_refuses(spec, 1, n, k):
        raise Unlowered(f"`{matrices[0].unit}`: {words}")

    def packed() -> dict[str, Tensor | None]:
        each = [weights.codes(build.model, spec, m) for m in matrices]
        codes, scales, zeros = (torch.cat(parts) for parts in zip(*each, strict=True))
        return pack(spec, codes, scales, None if spec.symmetric else zeros)._asdict()

    held = build.made(packed)
    module, factor = load(quant_triton.emit(spec)), None
    if spec.extension:
        found = build.made(lambda: _adapters(build, spec, matrices, n))
        held |= {name: found[name] for name in found if name == "outer" or spec.within}
        factor = found.get("factor")

    def run(room: Room, x: int, out: Tensor | None, **given: Any) -> Tensor:
        rows = room.values[x]
        if x in room.sums and spec.sums:
            given["xsum"] = room.sums[x]
        if factor is not None and not spec.within:
            given["inner"] = torch.mm(rows, factor.t())
        y: Tensor = module.launch(x=rows, **held, **given, n=n, out=out)
        return y

    if spec.sums and x not in build.summed:
        why = why or "sums of x are made by torch before: no norm stands there"
    if spec.extension and not spec.within:
        why = why or f"A x of {spec.extension} ranks is made before: more than {WITHIN} do not fit the kernel"
    return Product("quant_linear", run, (spec,), why)


def _adapters(
    build: Launching, spec: WeightOnlySpec, matrices: Sequence[Matrix], n: int
) -> dict[str, Tensor | None]:
    """factor [R, K] and outer [N', R]: adapters side by side, each beside its own rows."""
    factor = torch.zeros(spec.extension, matrices[0].columns, dtype=torch.bfloat16)
    outer = torch.zeros(-(-n // ROWS) * ROWS, spec.extension, dtype=torch.bfloat16)
    row = rank = 0
    for matrix in matrices:
        if matrix.low is not None:
            a, b = matrix.low
            factor[rank : rank + a.rows] = build.model.tensors()[a.tensor].detach().float() * a.factor
            outer[row : row + b.rows, rank : rank + a.rows] = (
                build.model.tensors()[b.tensor].detach().float() * b.factor
            )
            rank += a.rows
        row += matrix.rows
    return {"factor": factor, "outer": outer}
