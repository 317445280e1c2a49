"""Rewrites on jobs for what a GPU's kernels do at once: mixtures whole, adapters within packed weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from effc.passes.lower._fuse import activate_in_linear, lay_side_by_side, pair_gate_and_up
from effc.passes.lower._jobs import Arithmetic, Combine, Experts, Job, Jobs, Linear, Matrix, Unlowered

MOST = 128
"""Ranks that stand behind the columns of a packed matrix, at most."""


@dataclass(slots=True, eq=False)
class Mixture(Job):
    """Experts whole: reads x, the choice, its weights where there are any, and a residual last.

    With one matrix in `first` it is a low-rank change that each row chooses: B A x.
    """

    first: list[Matrix] = field(kw_only=True)
    """Gate and up, or A."""
    last: Matrix = field(kw_only=True)
    """Down, or B."""
    activation: str = ""
    active: int = field(kw_only=True)
    weighted: bool = field(kw_only=True)
    residual: bool = False


def fuse_for_gpu(jobs: Jobs) -> Jobs:
    """Apply every rule; returns what it was given, rewritten.

    Raises:
        Unlowered: experts are of a form that no kernel has.
    """
    take_mixtures_whole(jobs)
    if take_adapters_in(jobs):  # what stood behind an adapter's sum stands behind the matrix now
        for rule in (pair_gate_and_up, activate_in_linear, lay_side_by_side):
            rule(jobs)
    return jobs


def take_mixtures_whole(jobs: Jobs) -> None:
    """Rows by expert, both products and their sum: one job."""
    for combine in [j for j in jobs.jobs if isinstance(j, Combine)]:
        down = _maker(jobs, combine.reads[0])
        up = _maker(jobs, down.reads[0]) if isinstance(down, Experts) else None
        if not isinstance(down, Experts) or not isinstance(up, Experts) or down.epilogue or up.placed:
            raise Unlowered(f"`{combine.paths[0]}`: experts in an order of ops that no kernel has")
        thin = not up.paired and not up.epilogue and up.matrices[0].quantized is None
        if not up.paired and not thin:
            raise Unlowered(f"`{combine.paths[0]}`: experts without a gate; the kernel pairs gate and up")
        whole = Mixture(
            [up.reads[0], *combine.reads[1:]], list(combine.writes), up.paths + down.paths,
            first=up.matrices, last=down.matrices[0], activation="" if thin else up.epilogue[0],
            active=combine.active, weighted=combine.weighted, residual=combine.residual,
        )  # fmt: skip
        jobs.jobs[jobs.jobs.index(combine)] = whole
        jobs.jobs.remove(up)
        jobs.jobs.remove(down)


def take_adapters_in(jobs: Jobs) -> bool:
    """W x + B A x with W packed: one product whose columns go on behind those of W; whether there are any."""
    found = False
    for outer in [j for j in jobs.jobs if type(j) is Linear and j.epilogue == ("residual",)]:
        base, inner = _maker(jobs, outer.reads[-1]), _maker(jobs, outer.reads[0])
        factor, scale = 1.0, None
        if isinstance(inner, Arithmetic) and inner.name == "scale":
            factor, scale, inner = inner.number, inner, _maker(jobs, inner.reads[0])
        if type(base) is not Linear or type(inner) is not Linear or base.paired or inner.epilogue:
            continue
        (w, *more), (b, *others), a = base.matrices, outer.matrices, inner.matrices[0]
        thin = not more and not others and _dense(a) and _dense(b) and a.rows <= MOST
        if not thin or w.quantized is None or w.low is not None or inner.reads != base.reads[:1]:
            continue
        base.matrices = [replace(w, low=(replace(a, factor=a.factor * factor), b))]
        base.writes = list(outer.writes)
        for gone in (outer, inner, scale):
            if gone is not None:
                jobs.jobs.remove(gone)
        found = True
    return found


def _dense(matrix: Matrix) -> bool:
    plain = matrix.quantized is None and matrix.planes is None
    return plain and not matrix.parts and not matrix.experts and matrix.bias is None


def _maker(jobs: Jobs, number: int) -> Job | None:
    """The job that made a value, if one place alone reads it."""
    made = next((j for j in jobs.jobs if number in j.writes), None)
    reads = sum(j.reads.count(number) for j in jobs.jobs)
    return made if reads == 1 and number != jobs.output else None
