"""Run a compiled recipe: stage after stage, each taken from the store or made and kept there.

Behind each stage come the expects and exports that it made possible (`gates.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from effc.compiler.adapters import adapted
from effc.compiler.contract import EXACT_FLOAT32
from effc.compiler.cost import count
from effc.compiler.findings import Findings
from effc.compiler.method import Context, Method
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.compiler.selected import selector_report
from effc.compiler.shapes import Analyze, Merge
from effc.runtime.analyzing import analyze
from effc.runtime.artifact import Story
from effc.runtime.bind import method_of
from effc.runtime.compiled import Compiled, ExpectRun, ReportRun, StageRun
from effc.runtime.data._several import Several
from effc.runtime.gates import Gates
from effc.runtime.judging import Judging
from effc.runtime.key import key_of, seed_for, stage_parts
from effc.runtime.last import bundled
from effc.runtime.opening import Opening, placed
from effc.runtime.peak import Peak
from effc.runtime.progress import Event, Observer
from effc.runtime.reports import keep_report, kept_report
from effc.runtime.stage import run_stage, shape_of
from effc.runtime.stopping import Stopping
from effc.runtime.store import Result, Store
from effc.runtime.tiny import shrink
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.recipe import Binding, Recipe


def compile(
    recipe: Recipe,
    store: Store | Path | str = ".effc",
    *,
    device: str = "cpu",
    observers: Sequence[Observer] = (),
    tiny: bool = False,
) -> Compiled:
    """Run a checked recipe, or go on with it. Same recipe, machine and libraries: same bytes.

    Raises:
        EffcError: what a stage, a file or the disk refuses, with its place; results so far are kept.
        KeyboardInterrupt: after SIGINT or SIGTERM; the same call goes on from the last finished unit.
    """
    place = store if isinstance(store, Store) else Store(Path(store))
    recipe = shrink(recipe, place.folder) if tiny else recipe
    with Stopping() as stop, place.open(), deterministic():
        return Run(recipe, place, torch.device(device), observers, tiny, stop).all()


class Run:
    """One recipe under way."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        device: torch.device,
        observers: Sequence[Observer] = (),
        tiny: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.recipe, self.store, self.device, self.tiny, self.stop = recipe, store, device, tiny, stop
        self.observers = observers
        self.opening = Opening(recipe, store, tiny)
        self.compiled = Compiled(recipe, tiny)
        self.models, self.reports = self.compiled.models, self.compiled.reports
        self.fingerprints: dict[str, str] = {}
        self.judging = Judging(self.opening, self.models, self.fingerprints, device, self.reports)
        self.gates = Gates(
            recipe, self.models, self.reports, self.judging.metric, self._tell, tiny, self._story
        )
        self.gates.clock = self.opening.clock

    def all(self) -> Compiled:
        """Every binding in order; behind each, the expects and exports that have become possible."""
        for binding in self.recipe.bindings:
            if binding.value == "data":
                continue
            if self.stop():
                raise KeyboardInterrupt
            if self.gates.cancels(binding):
                continue
            with placed(binding.call.span or binding.span, binding.call):
                if binding.value == "report":
                    self.reports[binding.name] = self.report(binding)
                else:
                    self.compiled.stages.append(self.binding(binding))
            self.gates.judge()
            self.gates.export()
        self.compiled.expects, self.compiled.exports = self.gates.close()
        self.compiled.problems += self.gates.problems
        self.compiled.warnings = list(self.opening.warnings)
        self.compiled.around = self.opening.clock.rows()
        return self.compiled

    def _story(self, model: str, judged: list[ExpectRun]) -> Story:
        """What an artefact of a model tells about itself."""
        from effc.runtime.story import story_of

        return story_of(self.compiled, judged, model, self.store)

    # -- stages

    def binding(self, binding: Binding) -> StageRun:
        """Load a model or run a stage, and describe what came out."""
        if binding.keyword == "model":
            return self._load(binding)
        method = method_of(binding.call)
        first = self.models[binding.call.models[0].name]
        data = self.opening.data_of(binding, first)
        key, parts = self.key(binding, method, data)
        result = self.store.get(key)
        cached = result is not None
        if result is None:
            result, cached = self._made(binding, method, key, parts, data)
        if cached:
            self._tell("cached", binding.name)
        self.models[binding.name], self.fingerprints[binding.name] = result.model, result.fingerprint
        return self._described(binding, method, result, cached, data)

    def report(self, binding: Binding) -> ReportRun:
        """Run an analysis, or take what it said before."""
        method = method_of(binding.call)
        assert isinstance(method, Analyze)
        name, first = binding.name, self.models[binding.call.models[0].name]
        key, parts = self.key(binding, method, {})
        cached = (said := kept_report(self.store, key)) is not None
        if said is None:
            with self.store.writing(key, lambda who: self._tell("waiting", name, who), self.stop):
                self._tell("start", name, method.kind)
                found = analyze(method, first, Context(seed=seed_for(_seed(binding), method.kind)))
                about = {"recipe": self.recipe.name, "stage": name, "method": method.kind, "parts": parts}
                said = {**found.findings.as_json(), "peak_bytes": found.peak_bytes, "seconds": found.seconds}
                keep_report(self.store, key, said, about)
            self._tell("done", name, seconds=found.seconds)
        else:
            self._tell("cached", name)
        inputs = tuple(ref.name for ref in binding.call.models)
        peak, seconds = int(said["peak_bytes"]), float(said["seconds"])
        return ReportRun(name, method.kind, inputs, Findings.from_json(said), peak, seconds, cached, key)

    def key(self, binding: Binding, method: Method, data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The key of a stage whose inputs exist, and its parts."""
        call = binding.call
        inputs = {ref.name: self.fingerprints[ref.name] for ref in call.models}
        for name, value in call.arguments.items():
            if isinstance(found := data.get(name), Several):
                inputs |= found.fingerprints
            elif name in data:
                inputs[value.name] = data[name].fingerprint  # type: ignore[union-attr]
        for ref in self.opening.names_within(binding):
            if ref.name not in inputs:
                inputs[ref.name] = self.fingerprints[ref.name]
        parts = stage_parts(binding, shape_of(method), inputs, _seed(binding), self.device)
        return key_of(parts), parts

    def _made(
        self, binding: Binding, method: Method, key: str, parts: Mapping[str, Any], data: Mapping[str, Any]
    ) -> tuple[Result, bool]:
        """Run a stage and publish it, unless another process does so first."""
        name, inputs = binding.name, [self.models[ref.name] for ref in binding.call.models]
        with self.store.writing(key, lambda who: self._tell("waiting", name, who), self.stop) as waited:
            if waited and (found := self.store.get(key)) is not None:
                return found, True
            journal = self.store.work(key)
            self._tell("start", name, method.kind)
            if units := journal.units():
                self._tell("resumed", name, units[-1])
            context = Context(
                seed=seed_for(_seed(binding), method.kind),
                data=data,
                models=self.opening.models_of(binding, self.models),
                journal=journal,
                progress=lambda done, of, unit: self._tell("progress", name, done=done, of=of, unit=unit),
                device=self.device,
                workdir=journal.spill(),
                names=self._names(binding, method, inputs),
                stop=self.stop,
            )
            outcome = run_stage(method, inputs, context)
            about = {"recipe": self.recipe.name, "stage": name, "method": method.kind, "parts": parts}
            names = bundled(self.recipe, name, outcome.model)
            result = self.store.publish(key, outcome, about, names)
            journal.drop()
        self._tell("done", name, seconds=float(result.measures["seconds"]))
        return result, False

    def _names(self, binding: Binding, method: Method, inputs: Sequence[Model]) -> Mapping[str, str] | None:
        """Under which names a merge writes its result; adapters come from elsewhere than its stream."""
        if not isinstance(method, Merge) or any(adapted(model) for model in inputs):
            return None
        return bundled(self.recipe, binding.name, inputs[0])

    def _load(self, binding: Binding) -> StageRun:
        with Peak() as peak:
            model, print_ = self.opening.model(binding, self.models)
        self.models[binding.name], self.fingerprints[binding.name] = model, print_
        self._tell("done", binding.name, binding.call.kind, seconds=peak.seconds)
        losses = self.judging.losses(binding.name, self._measured_on(model))
        return StageRun(
            binding.name,
            binding.call.kind,
            tuple(ref.name for ref in self.recipe.inputs_of(binding) if ref.name in self.models),
            count(model, ATTENDED),
            peak.bytes,
            seconds=peak.seconds,
            fingerprint=print_,
            loss=losses,
            latency=self.judging.latency(binding.name),
        )

    def _described(
        self, binding: Binding, method: Method, result: Result, cached: bool, data: Mapping[str, Any]
    ) -> StageRun:
        name, first = binding.name, binding.call.models[0].name
        readable = {k: d for k, d in data.items() if hasattr(d, "batch")}
        contract = self.judging.contract(method, first, name, readable)
        if contract["held"] is False:
            self.compiled.problems.append(_broken(binding, contract))
        record = self.store.record(result.key) or {}
        return StageRun(
            name,
            method.kind,
            tuple(ref.name for ref in self.recipe.inputs_of(binding) if ref.name in self.models),
            count(result.model, ATTENDED),
            int(result.measures.get("peak_bytes", 0)),
            sum(self.store.files_of(record).values()) if record else 0,
            float(result.measures.get("seconds", 0.0)),
            cached,
            contract,
            result.key,
            result.fingerprint,
            self.judging.losses(name, self._measured_on(result.model)),
            self.judging.latency(name),
            result.measures,
            tuple((edit.verb, edit.path, edit.detail) for edit in result.log),
            tuple(selector_report(method, self.models[first])),
        )

    def _measured_on(self, model: Model) -> dict[str, Any]:
        """The data that the report measures losses on: all sequences of the recipe."""
        names = [b.name for b in self.recipe.bindings if b.value == "data"]
        opened = {name: self.opening.data(name, model) for name in names}
        return {name: data for name, data in opened.items() if hasattr(data, "batch")}

    def _tell(self, what: Any, name: str, text: str = "", **more: Any) -> None:
        event = Event(what, name, text, **more)
        for observer in self.observers:
            observer(event)


@contextmanager
def deterministic() -> Iterator[None]:
    """Algorithms that give the same bits every time; the caller's own choice is put back."""
    before = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")  # unlike use_deterministic_algorithms, imports no inductor
    settings.fill_uninitialized_memory = False  # a tenth of the time; nothing reads it
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        settings.fill_uninitialized_memory = filled


def _seed(binding: Binding) -> int:
    seed = binding.call.arguments.get("seed")
    return seed if isinstance(seed, int) else 0


def _broken(binding: Binding, contract: Mapping[str, Any]) -> Diagnostic:
    span = binding.call.span or binding.span
    limit, wide = contract["tolerance"], contract.get("error_float64")
    if wide is None:
        notes = [f"error {contract['error']:.3g}" + (f", at most {limit:.3g} is promised" if limit else "")]
    else:
        notes = [f"error {wide:.3g} in float64, at most {limit:.3g} is promised"]
        notes += [
            f"error {contract['error_float32']:.3g} in float32, at most {EXACT_FLOAT32:.3g} is promised"
        ]
    notes += [f"does not hold: {fact}" for fact in contract.get("broken", ())]
    title = f"`{binding.name}` did not keep the contract {contract['fidelity']} of `{binding.call.kind}`"
    return Diagnostic("E302", title, (Label(span),) if span else (), tuple(notes))
