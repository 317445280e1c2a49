"""Run one stage: its method decides the shape, the shape who runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from effc.compiler.method import Context, Method, Outcome
from effc.compiler.model import Model
from effc.compiler.shapes import Analyze, Calibrate, Merge, Rewrite, Train
from effc.runtime.peak import Peak
from effc.specs.diagnostic import EffcError

SHAPES: tuple[type[Method], ...] = (Rewrite, Calibrate, Train, Merge, Analyze)


def shape_of(method: Method) -> str:
    """Name of the shape a method has.

    Raises:
        TypeError: for a method that has none, which is a mistake in its file.
    """
    for shape in SHAPES:
        if isinstance(method, shape):
            return shape.__name__
    raise TypeError(f"`{method.kind}` has no shape that the runtime knows")


def run_stage(method: Method, inputs: Sequence[Model], context: Context) -> Outcome:
    """The outcome, with `peak_bytes` (resident) and `seconds` among its measures; no input is changed.

    Raises:
        EffcError: what the method refuses about these models (E3), and what its runner raises.
        KeyboardInterrupt: when the context asks to stop.
    """
    others = [*inputs[1:], *context.models.values()]
    problems = [d for d in method.refuses(inputs[0], others) if d.severity == "error"]
    if problems:
        raise EffcError(*problems)
    with Peak() as peak:
        outcome = _run(method, inputs, context)
    measured = {"peak_bytes": peak.bytes, "seconds": peak.seconds}
    return replace(outcome, measures={**outcome.measures, **measured})


def _run(method: Method, inputs: Sequence[Model], context: Context) -> Outcome:
    """Runners are imported when they are needed: a recipe that only rounds waits for no training loop."""
    match method:
        case Rewrite():
            from effc.runtime.rewriting import rewrite

            return rewrite(method, inputs[0], context, inputs[1:])
        case Calibrate():
            from effc.runtime.calibrate import calibrate

            return calibrate(method, inputs[0], context)
        case Train():
            from effc.runtime.fit import fit

            return fit(method, inputs[0], context)
        case Merge():
            from effc.runtime.merge import merge

            return merge(method, inputs, context)
    raise TypeError(f"`{method.kind}` is a {shape_of(method)}, which has no runner")
