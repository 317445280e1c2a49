"""Where what a kernel gives is not what is due, in words."""

from __future__ import annotations

from torch import Tensor


def differs(found: Tensor, due: Tensor, tolerance: float) -> str:
    """The first place that is off by more than `tolerance` of the largest magnitude due; "" for none."""
    wrong = (found.double() - due.double()).abs() / due.double().abs().max().clamp(min=1e-30)
    bad = ~(wrong <= tolerance)
    if not bad.any():
        return ""
    at = bad.nonzero()[0].tolist()
    never = int(found.isnan().sum() - due.isnan().sum())
    return (
        f"{at} is {float(found[tuple(at)]):.6g}, not {float(due[tuple(at)]):.6g}; {int(bad.sum())} of "
        f"{bad.numel()} are off" + (f", {never} are NaN or were never written" if never else "")
    )
