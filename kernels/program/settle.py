"""Settle the ways of a program's kernels: those measured on this machine before, else measured now, briefly.

All ways give the same bits, so a program may run with any; what this costs is bounded by BUDGET for each
program, and what there was no time for goes the usual way and is measured when the next program is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from effc.kernels.cpu import ways
from effc.kernels.cpu.entry import team
from effc.kernels.cpu.isa import Isa
from effc.kernels.cpu.ways import BUCKETS, TRIED, Found
from effc.kernels.program.call import Plan
from effc.kernels.quant_linear import emit_c
from effc.kernels.quant_linear.spec import QuantLinearSpec
from effc.kernels.quant_linear.trial import Trial

BUDGET = 0.25
"""Seconds that a program may spend on measuring, at most."""
TURNS = 9
"""Calls of each way in a bucket, at most; the fastest counts, as others only disturb."""
CLEAR = 1.5
"""After three turns a way that is so many times as fast as the others has won."""
GAIN = 1.03
"""How many times as fast a way must be to be taken in the place of the usual one."""

Clock = Callable[[], float]


def kernels(plan: Plan) -> dict[str, tuple[QuantLinearSpec, list[str]]]:
    """The kernels of a plan that have more than one way, where there are matrix units: the spec of each by
    its key, and the names of its matrices."""
    found: dict[str, tuple[QuantLinearSpec, list[str]]] = {}
    for call in plan.calls:
        spec = call.specs[0] if call.op == "quant_linear" else None
        if isinstance(spec, QuantLinearSpec):
            names = found.setdefault(spec.key, (spec, []))[1]
            names += [call.tensors[0]] * (call.tensors[0] not in names)
    return found


def known(plan: Plan, isa: Isa) -> dict[str, Found]:
    """What was measured on this machine of a plan's kernels; nothing where there is only one way."""
    if isa is not Isa.AMX:
        return {}
    texts = {key: emit_c.function(spec) for key, (spec, _) in kernels(plan).items()}
    return ways.read(isa, texts, len(emit_c.NAMES))


def settle(
    plan: Plan,
    library: Any,
    tensors: Mapping[str, Tensor],
    isa: Isa,
    members: int,
    clock: Clock = time.perf_counter,
) -> dict[str, Found]:
    """Fill the tables of a loaded program; kernel -> what was measured of it, now or before."""
    if isa is not Isa.AMX:
        return {}
    end, found, new = clock() + BUDGET, known(plan, isa), {}
    wanted = kernels(plan)
    for key, (spec, names) in wanted.items():
        trial = Trial(library, spec, [tensors[name] for name in names])
        if key not in found and clock() < end:
            measured = _measured(trial, spec, team(isa), members, end, clock)
            if measured is not None:
                found[key] = new[key] = measured
        trial.take(found[key].ways if key in found else emit_c.usual())
    if new:
        ways.write(isa, {key: emit_c.function(wanted[key][0]) for key in new}, new)
    return found


def _measured(
    trial: Trial, spec: QuantLinearSpec, crew: int, members: int, end: float, clock: Clock
) -> Found | None:
    """The ways in turn, for each bucket; None when time ran out."""
    possible = range(len(emit_c.NAMES)) if emit_c.by_units(spec, trial.k) else range(1)
    chosen, seconds = [], []
    for bucket, rows in enumerate(TRIED):
        least = {way: trial.seconds(way, rows, crew, members) for way in possible}
        for turn in range(TURNS):
            for way in possible:
                least[way] = min(least[way], trial.seconds(way, rows, crew, members))
            ordered = sorted(least.values())
            if len(ordered) < 2 or (turn >= 2 and ordered[1] > CLEAR * ordered[0]):
                break
            if clock() > end:
                return None
        usual = emit_c.usual()[bucket] if len(least) > 1 else 0
        best = min(least, key=lambda way: least[way])
        chosen.append(best if least[usual] > GAIN * least[best] else usual)
        seconds.append(least)
    return Found(tuple(chosen), tuple(seconds)) if len(chosen) == len(BUCKETS) else None
