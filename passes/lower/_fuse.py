"""Named rewrites on jobs: fewer, larger pieces of work that read each number once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import frexp
from typing import Any, TypeGuard

from effc.kernels.epilogue import EPILOGUES
from effc.passes.lower._jobs import Arithmetic, Attend, Combine, Experts, Job, Jobs, Linear, Scan

Rule = Callable[[Jobs], None]


def fuse(jobs: Jobs) -> Jobs:
    """Apply every rule once, in order; returns what it was given, rewritten."""
    for rule in RULES:
        rule(jobs)
    return jobs


def pair_gate_and_up(jobs: Jobs) -> None:
    """activation(gate x) * up x: one matrix whose blocks hold 32 rows of each; the parts never leave."""
    for product in [j for j in jobs.jobs if isinstance(j, Arithmetic) and j.name == "gate" and j.each == 1]:
        act, up = (_only(jobs, n) for n in product.reads)
        if isinstance(act, Linear) and isinstance(up, Arithmetic):
            act, up = up, act
        if not (isinstance(act, Arithmetic) and act.name in EPILOGUES and isinstance(up, Linear)):
            continue
        gate = _only(jobs, act.reads[0])
        if not isinstance(gate, Linear) or gate.reads != up.reads or gate.epilogue or up.epilogue:
            continue
        (first,), (second,) = gate.matrices, up.matrices
        if first.kind != second.kind or first.rows != second.rows or first.planes is not None:
            continue
        joined = replace(
            gate, writes=list(product.writes), paths=gate.paths + up.paths, matrices=[first, second],
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
    """y + W x: the sum starts from what was there, so the residual stream is read and written once.

    Where the sum starts from something already, that something starts from what was there.
    """
    for total in [j for j in jobs.jobs if isinstance(j, Arithmetic) and j.name == "add"]:
        for job, other in (
            (_only(jobs, total.reads[1]), total.reads[0]),
            (_only(jobs, total.reads[0]), total.reads[1]),
        ):
            if isinstance(job, Scan) and not job.residual:  # nobody waits for it but the sum
                jobs.jobs.remove(job)
                jobs.jobs.insert(jobs.jobs.index(total), job)
            first = _first_of_sum(jobs, job)
            if not isinstance(job, Linear | Combine | Scan) or not _takes_residual(first):
                continue
            if not _made_before(jobs, other, first):
                continue
            if isinstance(first, Linear):
                first.epilogue = (*first.epilogue, "residual")
            else:
                first.residual = True
            first.reads.append(other)
            _absorb(jobs, job, total)
            break


def scale_in_linear(jobs: Jobs) -> None:
    """s A x: an adapter's number goes into its first factor, where that changes no digit of the factor."""
    for scale in [j for j in jobs.jobs if isinstance(j, Arithmetic) and j.name == "scale"]:
        linear = _only(jobs, scale.reads[0])
        if not isinstance(linear, Linear) or isinstance(linear, Experts) or linear.epilogue:
            continue
        matrix = linear.matrices[0]
        exact = matrix.dtype == "float32" or abs(frexp(scale.number)[0]) == 0.5
        plain = matrix.quantized is None and matrix.planes is None
        if plain and exact and not linear.paired:
            linear.matrices = [replace(matrix, factor=matrix.factor * scale.number)]
            _absorb(jobs, linear, scale)


def scale_in_scan(jobs: Jobs) -> None:
    """c o: a recurrence scales its queries, and what it gives is as much larger."""
    for scale in [j for j in jobs.jobs if isinstance(j, Arithmetic) and j.name == "scale"]:
        scan = _only(jobs, scale.reads[0])
        if isinstance(scan, Scan) and not scan.residual:
            scan.form["scale"] *= scale.number
            _absorb(jobs, scan, scale)


def lay_side_by_side(jobs: Jobs) -> None:
    """q, k and v of one x: one matrix, one pass over x; what mixes tokens reads its parts of the row."""
    mixers = [j for j in jobs.jobs if isinstance(j, Attend | Scan)]
    for mixer in mixers:
        parts = {n: p for n in dict.fromkeys(mixer.reads) if (p := _for_mixers(jobs, n)) is not None}
        first = next(iter(parts.values()), None)
        alike = {n: p for n, p in parts.items() if first is not None and _alike(first, p)}
        if first is None or len(alike) < 2:
            continue
        starts, end = {}, 0
        for number, part in alike.items():
            starts[number], end = end, end + part.width
        joined = replace(
            first, reads=list(first.reads), writes=list(first.writes),
            paths=[path for p in alike.values() for path in p.paths],
            matrices=[m for p in alike.values() for m in p.matrices],
        )  # fmt: skip
        for reader in mixers:
            at = enumerate(reader.offsets[: len(reader.reads)])
            moved: Any = tuple(start + starts.get(reader.reads[i], 0) for i, start in at)
            reader.offsets = moved
            reader.reads = [joined.writes[0] if n in starts else n for n in reader.reads]
        _replace(jobs, list(alike.values()), joined)
        jobs.widths[joined.writes[0]] = end


RULES: tuple[Rule, ...] = (
    pair_gate_and_up,
    activate_in_linear,
    scale_in_linear,
    scale_in_scan,
    add_in_linear,
    lay_side_by_side,
)


def _only(jobs: Jobs, number: int) -> Job | None:
    """The job that made a value, if one place alone reads it."""
    made = next((j for j in jobs.jobs if number in j.writes), None)
    reads = sum(j.reads.count(number) for j in jobs.jobs)
    return made if reads == 1 and number != jobs.output else None


def _first_of_sum(jobs: Jobs, job: Job | None) -> Job | None:
    """Of jobs whose sums each start from the one before, the first."""
    while isinstance(job, Linear | Combine | Scan) and _has_residual(job):
        before = _only(jobs, job.reads[-1])
        if not isinstance(before, Linear | Combine | Scan):
            break
        job = before
    return job


def _has_residual(job: Linear | Combine | Scan) -> bool:
    return job.epilogue[-1:] == ("residual",) if isinstance(job, Linear) else job.residual


def _takes_residual(job: Job | None) -> TypeGuard[Linear | Combine | Scan]:
    """Whether a job can begin its sums from another value: once, and where its rows are all rows."""
    if isinstance(job, Combine | Scan):
        return not job.residual
    plain = isinstance(job, Linear) and not isinstance(job, Experts)
    return plain and isinstance(job, Linear) and not job.paired and "residual" not in job.epilogue


def _for_mixers(jobs: Jobs, number: int) -> Linear | None:
    """The packed matrix that made a value, if what mixes tokens alone reads it, by parts of its row."""
    made = next((j for j in jobs.jobs if number in j.writes), None)
    if not isinstance(made, Linear) or isinstance(made, Experts) or number == jobs.output:
        return None
    readers = [j for j in jobs.jobs if number in j.reads]
    by_parts = all(isinstance(j, Attend | Scan) for j in readers)
    added = any(isinstance(j, Scan) and j.residual and j.reads[-1] == number for j in readers)
    packed = made.matrices[0].quantized is not None  # others are read where the model has them
    return made if by_parts and packed and not added and not set(made.epilogue) - {"bias"} else None


def _alike(a: Linear, b: Linear) -> bool:
    kinds = {m.kind for m in (*a.matrices, *b.matrices)}
    return a.reads == b.reads and a.epilogue == b.epilogue and len(kinds) == 1


def _made_before(jobs: Jobs, number: int, job: Job) -> bool:
    places = [i for i, j in enumerate(jobs.jobs) if number in j.writes]
    return bool(places) and places[0] < jobs.jobs.index(job)


def _absorb(jobs: Jobs, into: Linear | Combine | Scan, gone: Arithmetic) -> None:
    into.writes = list(gone.writes)
    jobs.jobs.remove(gone)


def _replace(jobs: Jobs, gone: list[Job], joined: Job) -> None:
    """Put `joined` where the last of its parts that others could wait for stood."""
    place = max(jobs.jobs.index(job) for job in gone)
    jobs.jobs.insert(place + 1, joined)
    for job in gone:
        jobs.jobs.remove(job)
