"""What calls with matrices share: rows as bytes, the spec of packed weights, operands of epilogues."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationError

from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.cpu.stored import Stored
from effc.kernels.epilogue import operands
from effc.kernels.program.call import Split
from effc.kernels.quant_linear import emit_c as quant_c
from effc.kernels.quant_linear.spec import QuantLinearSpec
from effc.kernels.sparse_linear.spec import SparseLinearSpec, refuses
from effc.passes.lower import _weights as weights
from effc.passes.lower._builder import Builder
from effc.passes.lower._jobs import Linear, Matrix, Unlowered

SOME = 0.25
"""Share of zeros from which it is said why they are read; rounding alone makes fewer."""


def as_bytes(build: Builder, job: Linear, width: int, copies: int = 1) -> tuple[str, str, str]:
    """The buffers that hold x as bytes in groups of `width`, made once for all kernels that read them.

    `copies`: rows that x has for each row of the call.
    """
    x, k = build.names[job.reads[0]], job.matrices[0].columns
    if (x, width) not in build.bytes:
        q, scales, sums = names = (f"{x}b{width}", f"{x}s{width}", f"{x}u{width}")
        groups = k // width * copies
        build.widths |= {q: k * copies, scales: groups * 4, sums: groups * 4}
        text = f"quantize({{{x}}}, {width}, r0 * {groups}, r1 * {groups}, {{{q}}}, {{{scales}}}, {{{sums}}});"
        build.add("quantize", Split.ROWS, [x], names, text, job, (), [quant_c.QUANTIZE])
        build.bytes[x, width] = names
    return build.bytes[x, width]


def further(build: Builder, job: Linear, names: list[str]) -> tuple[str, list[str]]:
    """Arguments of the epilogue, and the buffers among them; its tensors join `names`."""
    extra, reads = "", []
    for operand in operands(job.epilogue):
        if operand == "bias":
            biases = [m.bias for m in job.matrices if m.bias is not None]
            extra += f", {{{len(names)}}}"
            names.append(build.keep("+".join(biases) + ":f32", weights.side_by_side(build.model, biases)))
        else:
            reads.append(build.names[job.reads[-1]])
            extra += f", {{{reads[-1]}}}"
    return extra, reads


def quant_spec(matrix: Matrix, epilogue: tuple[str, ...], paired: bool) -> QuantLinearSpec:
    assert matrix.quantized is not None
    bits, group, symmetric, scale = matrix.quantized
    if bits not in (2, 3, 4, 8) or scale not in ("float16", "bfloat16"):
        raise Unlowered(f"`{matrix.unit}` has {bits} bits with {scale} scales; kernels have 2, 3, 4 and 8")
    given: dict[str, Any] = {"bits": bits, "scale": scale, "group": group, "symmetric": symmetric}
    try:
        return QuantLinearSpec(**given, paired=paired, epilogue=epilogue)
    except ValueError as error:  # pydantic's own: a group that the vectors do not divide
        raise Unlowered(f"`{matrix.unit}`: {str(error).splitlines()[2].strip()}") from None


def stored(dtype: str) -> Stored:
    for name in get_args(Stored):
        if name == dtype:
            found: Stored = name
            return found
    raise Unlowered(f"weights are stored as {dtype}; kernels read {', '.join(get_args(Stored))}")


def packed(build: Builder, spec: QuantLinearSpec, matrices: list[Matrix]) -> str:
    """One tensor for all kernels that read these matrices in the same layout."""
    plain = spec.model_copy(update={"epilogue": ("silu",) if spec.paired else ()})
    name = "+".join(m.tensor for m in matrices) + f":{plain.key}"
    return build.keep(name, weights.packed(build.model, spec, matrices))


def planes_spec(matrix: Matrix, epilogue: tuple[str, ...]) -> BinaryPlanesSpec | str:
    """The kernel of signs, or in words why their matrix is read as a dense one."""
    assert matrix.planes is not None
    count, down, across, terms = matrix.planes
    given: dict[str, Any] = {"planes": count, "epilogue": epilogue}
    given |= {"scale": "pow2", "terms": terms} if terms else {"scale": "float16"}
    if 1 < down == matrix.rows:
        given |= {"side": "rows", "share": matrix.columns // across if across > 1 else 0}
    else:
        given |= {"side": "columns", "share": matrix.rows // down if down > 1 else 0}
    try:
        return BinaryPlanesSpec(**given)
    except ValidationError as error:
        return f"signs as a dense matrix: {error.errors()[0]['msg'].removeprefix('Value error, ')}"


def sparse_spec(build: Builder, spec: QuantLinearSpec, job: Linear) -> tuple[SparseLinearSpec | None, str]:
    """The kernel that leaves zeros out, where there are enough; else none, and why if there are some."""
    if spec.bits != 8 or not spec.symmetric:
        return None, ""
    share = weights.zeros(build.model, job.matrices)
    if share < SOME:
        return None, ""
    sparse = SparseLinearSpec(packed=spec)
    words = refuses(sparse, sum(m.rows for m in job.matrices), job.matrices[0].columns, share)
    return (None, words) if words else (sparse, "")
