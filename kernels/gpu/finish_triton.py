"""The second kernel of a product whose columns programs share, as text of Triton: it adds in order."""

from __future__ import annotations

from collections.abc import Sequence

from effc.kernels.epilogue import EPILOGUES, operands


def chain(epilogue: Sequence[str], indent: int) -> str:
    """Lines: the epilogue on `acc` [BN, BM], with rn, rm and mask in scope."""
    lines = [line for name in epilogue for line in EPILOGUES[name].triton]
    return "".join(" " * indent + line + "\n" for line in lines)


def finish(epilogue: Sequence[str]) -> str:
    """partials [SPLIT, M, N] float32 -> out [M, N], through the epilogue"""
    names = ", ".join(["partials", *operands(epilogue), "out"])
    return f"""@triton.jit
def finish({names}, M, N, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    mask = (rm[None, :] < M) & (rn[:, None] < N)
    acc = tl.zeros((BN, BM), tl.float32)
    for share in tl.static_range(SPLIT):
        acc += tl.load(partials + share * M * N + rm[None, :] * N + rn[:, None], mask=mask, other=0.0)
{chain(epilogue, 4)}    tl.store(out + rm[None, :] * N + rn[:, None], acc.to(out.dtype.element_ty), mask=mask)
"""
