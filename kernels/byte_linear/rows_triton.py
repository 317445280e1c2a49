"""Rows of bfloat16 to bytes in Triton: lines that a kernel holding a row in its registers takes in."""

from __future__ import annotations

from effc.kernels.byte_linear.spec import LARGEST, Kind

TYPES: dict[Kind, str] = {"int8": "tl.int8", "float8": "tl.float8e4nv"}


def lines(kind: Kind, run: int, row: str, value: str) -> str:
    """Stores of `q` [M, D] and `rows` [M], and with `run` of `totals` [D / run, M], from [BLOCK] float32.

    `value` is 0 behind the row's end; the kernel has `i`, `M`, `D` and `BLOCK`, and `row` is its row.
    """
    largest = LARGEST[kind]
    # In float32, 1.5 x 2^23 more and less leaves the nearest whole number, of two the even one.
    rounded = f"({value} * stretch + 12582912.0) - 12582912.0" if kind == "int8" else f"{value} * stretch"
    text = f"""    most = tl.max(tl.abs({value}))
    stretch = tl.where(most > 0.0, {largest} / most, 0.0)
    b = ({rounded}).to({TYPES[kind]})
    tl.store(q + {row}.to(tl.int64) * D + i, b, mask=i < D)
    tl.store(rows + {row}, most * {1.0 / largest!r})
"""
    if not run:
        return text
    return (
        text
        + f"""    each = tl.sum(tl.reshape(b.to(tl.int32), (BLOCK // {run}, {run})), 1)
    g = tl.arange(0, BLOCK // {run})
    tl.store(totals + g * M + {row}, each, mask=g < D // {run})
"""
    )


def kernel(kind: Kind, run: int) -> str:
    """A kernel for rows that no kernel before has made bytes of, and its launch `quantize`."""
    totals = "totals, " if run else ""
    return f'''@triton.jit
def quantize_kernel(x, q, rows, {totals}M, D, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    a = tl.load(x + row.to(tl.int64) * D + i, mask=i < D, other=0.0).to(tl.float32)
{lines(kind, run, "row", "a")}

def quantize(x, q, rows{", totals" if run else ""}):
    """x [M, K] bfloat16 -> q [M, K] of one byte, rows [M] float32{" and totals" if run else ""}, written"""
    M, D = x.shape
    block = triton.next_power_of_2(D)
    quantize_kernel[(M,)](x, q, rows, {totals}M, D, BLOCK=block, num_warps=min(max(block // 512, 1), 16))
'''
