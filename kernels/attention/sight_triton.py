"""Which keys a query sees, as text of Triton: the test of a pair, and the steps that need no test."""

from __future__ import annotations

from effc.kernels.attention.spec import AttentionGpuSpec


def seen(spec: AttentionGpuSpec) -> str:
    """The function `seen` of the emitted module."""
    tests = ["(rn < end)"]
    if spec.causal:
        tests.append("(rn <= rm)")
    if spec.window is not None:
        tests.append(f"(rn > rm - {spec.window})")
    return f'''@triton.jit
def seen(rm, rn, end):
    """whether queries rm see keys rn, of a sequence that ends before `end`"""
    return {" & ".join(tests)}
'''


def edges(spec: AttentionGpuSpec, queries: int, keys: int) -> str:
    """Lines: a program's queries begin at `first`; keys low to some, some to most, most to high, in steps.

    The middle is seen by all of the queries and needs no mask.
    """
    lines = ["low = begin"]
    if spec.window is not None:
        lines = [f"low = begin + tl.maximum(first - begin - {spec.window - 1}, 0) // {keys} * {keys}"]
    if spec.causal:
        lines += [
            f"high = tl.minimum(first + {queries}, end)",
            f"most = begin + (first + 1 - begin) // {keys} * {keys}",
        ]
    else:
        lines += ["high = end", f"most = begin + (end - begin) // {keys} * {keys}"]
    if spec.window is None:
        lines.append("some = low")
    else:
        reach = f"tl.maximum(first + {queries - spec.window} - begin, 0)"
        lines.append(f"some = tl.minimum(begin + ({reach} + {keys - 1}) // {keys} * {keys}, most)")
    return "".join(f"        {line}\n" for line in lines)


def walk(spec: AttentionGpuSpec, keys: int, step: str) -> str:
    """Lines: `step` for each of the parts that `edges` names, with its MASK.

    Behind a window, heads wider than 128 test every pair in one part: three do not fit the registers.
    """
    parts = [("some", "most", False), ("most", "high", True)]
    if spec.window is not None and spec.head_dim > 128:
        parts = [("low", "high", True)]
    elif spec.window is not None:
        parts = [("low", "some", True), *parts]
    return "".join(
        f"        for n in range({first}, {last}, {keys}):\n            {step}, MASK={mask})\n"
        for first, last, mask in parts
    )
