"""Pipeline: rules one after another over a model, each verified before the next, with instruments.

pipeline = effc.Pipeline([fold_gain, drop_identity], until="settled", instruments=[effc.Timing()])
done = pipeline.run(effc.trace(module, (x,)))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from effc.compiler.contract import Fidelity
from effc.compiler.equality import Call, Measured, apart, calls, cast, measured, run, wide_of
from effc.compiler.instruments import Instrument
from effc.compiler.match import Hit
from effc.compiler.model import Model
from effc.compiler.probe import widened
from effc.compiler.rewrite import Edit, Rewriter
from effc.compiler.rule import Failed, Rule
from effc.compiler.shapes import Rewrite
from effc.compiler.soundness import Flaw, flaw
from effc.compiler.state_map import StateMap
from effc.specs.diagnostic import Diagnostic, EffcError

ROUNDS = 16
"""Sweeps over the model before rules that never settle are given up."""


@dataclass(frozen=True, slots=True)
class Step:
    """One rule, run and verified."""

    rule: str
    round: int
    hits: tuple[Hit, ...]
    """Where it changed something; empty for a method."""
    edits: tuple[Edit, ...]
    measures: tuple[Measured, ...]
    """How far it moved the function, in every arithmetic that has a bound."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a pipeline leaves: with a `failure`, `model` is the one that came in, as it was."""

    model: Model
    steps: tuple[Step, ...]
    map: StateMap
    """Between state dicts of the model that came in and of `model`."""
    failure: Diagnostic | None = None


class Pipeline:
    """Rules, and methods that need nothing but the model, in order.

    `until="once"` runs each once, `"settled"` begins anew until a whole round changes nothing. After each
    rule the graph is checked, its shapes, roles and ties, and its contract is measured on `inputs` (tensors,
    or tuples of arguments), by default random ones, and for a traced model its example inputs.
    """

    def __init__(
        self,
        rules: Iterable[Rule | Rewrite],
        *,
        until: Literal["once", "settled"] = "once",
        rounds: int = ROUNDS,
        instruments: Sequence[Instrument] = (),
        inputs: Iterable[Any] = (),
        seed: int = 0,
    ) -> None:
        self.rules = tuple(rules)
        self.until = until
        self.rounds = rounds if until == "settled" else 1
        self.instruments = tuple(instruments)
        self.inputs = tuple(inputs)
        self.seed = seed
        for one in self.rules:
            if not isinstance(one, Rule | Rewrite):
                raise TypeError(f"a pipeline runs rules, not {one!r}; put @effc.rule(name, pattern) above it")
        if until not in ("once", "settled"):
            raise ValueError(f"until is once or settled, not {until!r}")

    def __call__(self, model: Model) -> Model:
        """The edited model.

        Raises:
            EffcError: what `run` gives as a failure.
        """
        ran = self.run(model)
        if ran.failure is not None:
            raise EffcError(ran.failure)
        return ran.model

    def run(self, model: Model) -> Ran:
        """Run all rules on a clone. `model` is not changed; a rule that fails is the end, and told."""
        if not isinstance(model, Model):
            raise TypeError(
                f"a pipeline edits models; write effc.trace(module, inputs) of {type(model).__name__}"
            )
        now = model.clone()
        now.materialize()
        probes = calls(now, self.inputs, self.seed)
        nothing = Rewriter(now).state_map()
        steps: list[Step] = []
        mapping = nothing
        for instrument in self.instruments:
            instrument.begin(now, probes)
        for number in range(1, self.rounds + 1):
            changed = False
            for one in self.rules:
                for instrument in self.instruments:
                    instrument.before(_name(one), now)
                rw = Rewriter(now, _name(one))
                try:
                    step = self._verified(one, now, rw, probes, number)
                except EffcError as problem:
                    return Ran(model, tuple(steps), nothing, problem.diagnostics[0])
                if step.edits:
                    now, changed = rw.model, True
                    mapping = mapping.then(rw.state_map())
                steps.append(step)
                for instrument in self.instruments:
                    instrument.after(step, now)
            if not changed:
                break
        else:
            if self.until == "settled":
                return Ran(model, tuple(steps), nothing, _restless(self.rounds, steps))
        return Ran(now, tuple(steps), mapping)

    def _verified(
        self, one: Rule | Rewrite, before: Model, rw: Rewriter, probes: Sequence[Call], number: int
    ) -> Step:
        """Run one rule and check what it left. Raises EffcError with what is wrong."""
        hits = _applied(one, rw, before)
        edits = tuple(rw.log)
        if not edits:
            return Step(_name(one), number, (), (), ())
        if found := flaw(before, rw, probes):
            raise EffcError(_broken(one, found, hits, rw.log))

        def again(model: Model) -> Model:
            other = Rewriter(model, rw.origin)
            _repeat(one, other, hits)
            return other.done()

        fidelity = _fidelity(one)
        measures = measured(fidelity, before, rw.done(), again, probes)
        for measure in measures:
            if not measure.held:
                where = _culprit(one, before, hits, probes, fidelity)
                raise EffcError(_moved(one, measure, where or _places(hits, rw.log)))
        return Step(_name(one), number, tuple(hits), edits, tuple(measures))


def _name(one: Rule | Rewrite) -> str:
    return one.name if isinstance(one, Rule) else one.kind


def _fidelity(one: Rule | Rewrite) -> Fidelity:
    return one.fidelity if isinstance(one, Rule) else one.contract.fidelity


def _applied(one: Rule | Rewrite, rw: Rewriter, before: Model) -> list[Hit]:
    """Run a rule; what it raises is told with the place where it did."""
    try:
        with torch.no_grad():
            if isinstance(one, Rule):
                return one.sweep(rw)
            if problems := [d for d in one.refuses(before, ()) if d.severity == "error"]:
                raise EffcError(*problems)
            one.rewrite(rw)
            return []
    except Failed as failed:
        cause = failed.__cause__
        said = f"{type(cause).__name__}: {cause}" if not isinstance(cause, EffcError) else str(cause)
        raise EffcError(
            Diagnostic(
                "E409",
                f"rule `{_name(one)}` fails at {failed.hit}",
                notes=(said,),
                help="the model is as it was; a condition in the pattern leaves such places out",
            )
        ) from failed


def _repeat(one: Rule | Rewrite, rw: Rewriter, hits: Sequence[Hit]) -> None:
    """The same edits on another clone."""
    with torch.no_grad():
        if isinstance(one, Rewrite):
            one.rewrite(rw)
            return
        for hit in hits:
            one(rw, hit)


def _culprit(
    one: Rule | Rewrite, before: Model, hits: Sequence[Hit], probes: Sequence[Call], fidelity: Fidelity
) -> str:
    """The first place whose edit takes the error over the bound, found by editing one place after another."""
    if isinstance(one, Rewrite):
        return ""
    wide = wide_of(before) if fidelity.name == "EXACT" else None
    left = widened(before, wide) if wide else before
    given = cast(probes, wide) if wide else list(probes)
    want = [run(left, call) for call in given]
    rw = Rewriter(left, one.name)
    for hit in hits:
        with torch.no_grad():
            one(rw, hit)
        now = widened(rw.model, wide) if wide else rw.model
        error = max(apart(a, run(now, call)) for a, call in zip(want, given, strict=True))
        if fidelity.tolerance is not None and error > fidelity.tolerance:
            return str(hit)
    return ""


def _places(hits: Sequence[Hit], log: Sequence[Edit]) -> str:
    return str(hits[0]) if hits else log[0].path


def _broken(one: Rule | Rewrite, found: Flaw, hits: Sequence[Hit], log: Sequence[Edit]) -> Diagnostic:
    near = next((hit for hit in hits if any(_touch(found.node, path) for path in hit.paths.values())), None)
    notes = [f"{found.node}: {found.said}"]
    if near or hits:
        notes.append(f"edited at {near or hits[0]}")
    return Diagnostic(
        "E409",
        f"rule `{_name(one)}` leaves wrong {found.check} at `{found.node}`",
        notes=tuple(notes),
        help="the model is as it was; " + _REMEDIES[found.check],
    )


_REMEDIES = {
    "graph": "make edits through the rewriter's verbs, or in rw.surgery",
    "shapes": "swap in a module of the shape that its readers take",
    "roles": "give rw.insert a role, or keep to canonical paths",
    "ties": "write rw.untie(path) first where sharing should end",
}


def _touch(node: str, path: str) -> bool:
    return node == path or node.startswith(f"{path}.") or path.startswith(f"{node}.")


def _moved(one: Rule | Rewrite, measure: Measured, where: str) -> Diagnostic:
    return Diagnostic(
        "E409",
        f"rule `{_name(one)}` does not keep its contract {_fidelity(one)}",
        notes=(f"at {where}", f"the outputs move by {measure}"),
        help="the model is as it was; correct the rule, or state what it promises: contract=effc.LOSSY",
    )


def _restless(rounds: int, steps: Sequence[Step]) -> Diagnostic:
    last = [step for step in steps if step.round == rounds and step.edits]
    return Diagnostic(
        "E412",
        f"the rules still change the model in round {rounds}",
        notes=tuple(f"{step.rule} at {_places(step.hits, step.edits)}" for step in last),
        help='a pattern that no longer holds once edited settles; or write until="once"',
    )
