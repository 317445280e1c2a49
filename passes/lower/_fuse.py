"""Named rewrites on jobs: fewer, larger pieces of work that read each number once."""

from __future__ import annotations

from collections.abc import Callable

from effc.kernels.epilogue import EPILOGUES
from effc.passes.lower._jobs import Arithmetic, Attend, Job, Jobs, Linear

Rule = Callable[[Jobs], None]


def fuse(jobs: Jobs) -> Jobs:
    """Apply every rule once, in order; returns what it was given, rewritten."""
    for rule in RULES:
        rule(jobs)
    return jobs


def pair_gate_and_up(jobs: Jobs) -> None:
    """activation(gate x) * up x: one matrix whose blocks hold 32 rows of each; the parts never leave."""
    for product in [j for j in jobs.jobs if isinstance(j, Arithmetic) and j.name == "gate"]:
        act, up = (_only(jobs, n) for n in product.reads)
        if isinstance(act, Linear) and isinstance(up, Arithmetic):
            act, up = up, act
        if not (isinstance(act, Arithmetic) and act.name in EPILOGUES and isinstance(up, Linear)):
            continue
        gate = _only(jobs, act.reads[0])
        if not isinstance(gate, Linear) or gate.reads != up.reads or gate.epilogue or up.epilogue:
            continue
        (first,), (second,) = gate.matrices, up.matrices
        if first.kind != second.kind or first.rows != second.rows:
            continue
        joined = Linear(
            list(gate.reads), list(product.writes), gate.paths + up.paths, matrices=[first, second],
            epilogue=(act.name,), paired=True,
        )  # fmt: skip
        _replace(jobs, [gate, up, act, product], joined)


def activate_in_linear(jobs: Jobs) -> None:
    """act(W x + b): the activation works on the sums before they are stored."""
    for act in [j for j in jobs.jobs if isinstance(j, Arithmetic) and j.name in EPILOGUES]:
        linear = _only(jobs, act.reads[0])
        if isinstance(linear, Linear) and not linear.paired:
            linear.epilogue = (*linear.epilogue, act.name)
            _absorb(jobs, linear, act)


def add_in_linear(jobs: Jobs) -> None:
    """y + W x: the sum starts from what was there, so the residual stream is read and written once."""
    for total in [j for j in jobs.jobs if isinstance(j, Arithmetic) and j.name == "add"]:
        for linear, other in (
            (_only(jobs, total.reads[1]), total.reads[0]),
            (_only(jobs, total.reads[0]), total.reads[1]),
        ):
            fits = isinstance(linear, Linear) and not linear.paired and "residual" not in linear.epilogue
            if fits and isinstance(linear, Linear) and _made_before(jobs, other, linear):
                linear.epilogue = (*linear.epilogue, "residual")
                linear.reads.append(other)
                _absorb(jobs, linear, total)
                break


def lay_side_by_side(jobs: Jobs) -> None:
    """q, k and v of one x: one matrix, one pass over x; attention reads its parts of the row."""
    for attend in [j for j in jobs.jobs if isinstance(j, Attend)]:
        parts = [_only(jobs, n) for n in attend.reads]
        if not all(isinstance(p, Linear) for p in parts):
            continue
        linears = [p for p in parts if isinstance(p, Linear)]
        first = linears[0]
        alike = all(p.reads == first.reads and p.epilogue == first.epilogue for p in linears)
        alike = alike and first.matrices[0].quantized is not None  # others are read where the model has them
        if not alike or set(first.epilogue) - {"bias"} or len({p.matrices[0].kind for p in linears}) > 1:
            continue
        joined = Linear(
            list(first.reads), list(first.writes), [path for p in linears for path in p.paths],
            matrices=[m for p in linears for m in p.matrices], epilogue=first.epilogue,
        )  # fmt: skip
        sizes = [p.width for p in linears]
        attend.offsets = (0, sizes[0], sizes[0] + sizes[1])
        attend.reads = [first.writes[0]] * 3
        _replace(jobs, list(linears), joined)
        jobs.widths[first.writes[0]] = sum(sizes)


RULES: tuple[Rule, ...] = (pair_gate_and_up, activate_in_linear, add_in_linear, lay_side_by_side)


def _only(jobs: Jobs, number: int) -> Job | None:
    """The job that made a value, if one place alone reads it."""
    made = next((j for j in jobs.jobs if number in j.writes), None)
    reads = sum(j.reads.count(number) for j in jobs.jobs)
    return made if reads == 1 and number != jobs.output else None


def _made_before(jobs: Jobs, number: int, job: Job) -> bool:
    places = [i for i, j in enumerate(jobs.jobs) if number in j.writes]
    return bool(places) and places[0] < jobs.jobs.index(job)


def _absorb(jobs: Jobs, into: Linear, gone: Arithmetic) -> None:
    into.writes = list(gone.writes)
    jobs.jobs.remove(gone)


def _replace(jobs: Jobs, gone: list[Job], joined: Job) -> None:
    """Put `joined` where the last of its parts that others could wait for stood."""
    place = max(jobs.jobs.index(job) for job in gone)
    jobs.jobs.insert(place + 1, joined)
    for job in gone:
        jobs.jobs.remove(job)
