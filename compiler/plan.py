"""The planner: what every stage will cost, before a weight is read (levels L3 and L4).

It carries a model on the meta device from stage to stage: `refuses` asks whether the method can take it,
`outline` makes the structural change, and the cost of the outlined model is the prediction, so that predicted
parameters and bytes equal the measured ones exactly. Whoever knows files and methods hands in `Sources`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from effc.compiler.around import Around, Text, around
from effc.compiler.contract import Contract
from effc.compiler.cost import Cost, count
from effc.compiler.effort import merging, peak_of, seconds_of
from effc.compiler.fit import disk_full, too_large, untimed
from effc.compiler.method import Method, Work
from effc.compiler.model import Model
from effc.compiler.placed import placed
from effc.compiler.plan_report import ReportPlan, reported
from effc.compiler.rewrite import Rewriter
from effc.compiler.selected import selector_report
from effc.compiler.shapes import Merge, Train
from effc.compiler.stand_in import selector_problems, stands_in
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.recipe import Binding, Export, Recipe
from effc.specs.target import Target

ATTENDED = 512
"""Keys that a token attends to on average in `flops_per_token`: the mean of a 1024-token prefill."""
AT_MOST = "at_most"
"""A fact of outlined models alone: their size is the most that may come out, since it follows from data."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A stage ready to be outlined: its method, the models it takes, and the length of its sequences."""

    method: Method
    models: tuple[str, ...]
    """Names of the models it is given by position; the first one is edited."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Further models by field, e.g. teacher -> base."""
    seq: int = 0


class Sources(Protocol):
    """What the planner cannot know: files, methods, exports."""

    def model(self, binding: Binding, models: Mapping[str, Model]) -> Model:
        """The model of a `model` binding, on meta; `models` are those before it, for an adapter."""
        ...

    def stage(self, binding: Binding) -> Staged: ...
    def refuses(self, export: Export, model: Model) -> Sequence[Diagnostic]:
        """Why the export's format cannot express the model."""
        ...

    def text(self, binding: Binding) -> Text:
        """How much a `data` binding reads; empty where that is not known."""
        ...

    def missing(self, binding: Binding) -> Sequence[Diagnostic]:
        """Files that a `data` binding names and that are not there."""
        ...

    def disk_free(self) -> int:
        """Bytes free where the store lies."""
        ...


@dataclass(frozen=True, slots=True)
class StagePlan:
    name: str
    method: str
    inputs: tuple[str, ...]
    cost: Cost
    peak_bytes: int
    """Resident memory of the process while the stage runs."""
    disk_bytes: int
    """New bytes in the store."""
    seconds: float
    contract: Mapping[str, Any]
    selected: Sequence[tuple[str, str, str]] = ()
    """Rows of the selector report: role, layers, arguments."""

    def as_json(self) -> dict[str, Any]:
        """The shape that `effc plan --json` and `effc compile --json` share."""
        return {
            "name": self.name,
            "method": self.method,
            "inputs": list(self.inputs),
            "params": self.cost.params,
            "bytes": self.cost.bytes,
            "flops_per_token": self.cost.flops_per_token,
            "kv_bytes_per_token": self.cost.kv_bytes_per_token,
            "state_bytes": self.cost.state_bytes,
            "peak_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "cached": False,
            "contract": dict(self.contract),
            "selected": [list(row) for row in self.selected],
        }


@dataclass(frozen=True, slots=True)
class Plan:
    recipe: Recipe
    target: Target
    stages: tuple[StagePlan, ...]
    models: Mapping[str, Model]
    """Every model of the recipe on meta, as it will be."""
    warnings: tuple[Diagnostic, ...] = ()
    around: tuple[Around, ...] = ()
    """What a run does beside the stages."""
    reports: tuple[ReportPlan, ...] = ()

    def stage(self, name: str) -> StagePlan:
        return next(s for s in self.stages if s.name == name)

    @property
    def seconds(self) -> float:
        told = sum(r.seconds for r in self.reports)
        return sum(s.seconds for s in self.stages) + told + sum(a.seconds for a in self.around)

    @property
    def peak_bytes(self) -> int:
        peaks = [*(s.peak_bytes for s in self.stages), *(r.peak_bytes for r in self.reports)]
        return max(peaks, default=0)

    @property
    def disk_bytes(self) -> int:
        return sum(s.disk_bytes for s in self.stages)

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.name,
            "title": self.recipe.title,
            "target": self.target.model_dump(mode="json"),
            "stages": [s.as_json() for s in self.stages],
            "reports": [r.as_json() for r in self.reports],
            "around": [a.as_json() for a in self.around],
            "expects": [{"text": e.text, "holds": None} for e in self.recipe.expects],
            "exports": [
                {"model": e.model, "format": e.call.kind, "path": e.call.arguments.get("path")}
                for e in self.recipe.exports
            ],
            "warnings": [w.as_json() for w in self.warnings],
        }


def plan(recipe: Recipe, sources: Sources, target: Target) -> Plan:
    """Plan every binding of the recipe; every problem found is reported at once.

    Raises:
        EffcError: E3 what a method or an export cannot take, E2 selectors that match nothing, E4 files that
            cannot be read, E351 memory and E352 disk that do not suffice, with the setting that would.
    """
    models: dict[str, Model] = {}
    refused: dict[str, Model] = {}
    stages: list[StagePlan] = []
    reports: list[ReportPlan] = []
    problems: list[Diagnostic] = []
    texts = {b.name: sources.text(b) for b in recipe.bindings if b.value == "data"}
    for binding in recipe.bindings:
        if binding.value == "data":
            problems += [placed(d, binding.call) for d in sources.missing(binding)]
        if binding.value == "report":
            reports += reported(binding, sources.stage(binding), models, target, _opened(texts), problems)
        if binding.value != "model":
            continue
        staged = None
        try:
            if binding.keyword == "model":
                made = sources.model(binding, models)
            else:
                staged = sources.stage(binding)
                needs = (*staged.models, *staged.named.values())
                if any(name not in models for name in needs):  # what it is made from was refused already
                    problems += _followed(binding, staged, models | refused, refused)
                    continue
                made, warned = _outlined(staged, models)
                problems += [placed(d, binding.call) for d in warned]
        except EffcError as problem:
            problems += [placed(d, binding.call) for d in problem.diagnostics]
            if staged is not None:
                _followed(binding, staged, models, refused)
            continue
        models[binding.name] = made
        stage = _costed(binding, staged, made, models, target, texts)
        stages.append(stage)
        if staged is not None and stage.peak_bytes > target.memory_bytes:
            source, opened = models[staged.models[0]], _opened(texts)
            resident = partial(_peak, staged, source, target, opened)
            problems.append(too_large(binding, staged.method, resident, target))
    for export in recipe.exports:
        if export.model in models:
            try:
                found = sources.refuses(export, models[export.model])
            except EffcError as problem:
                found = problem.diagnostics
            problems += [placed(d, export.call) for d in found]
    sizes = {stage.name: stage.cost.bytes for stage in stages}
    problems += untimed(recipe.expects, sizes, target.memory_bytes, target.base_bytes)
    warnings = tuple(d for d in problems if d.severity == "warning")
    beside = tuple(around(recipe, models, texts, target))
    result = Plan(recipe, target, tuple(stages), models, warnings, beside, tuple(reports))
    errors = [d for d in problems if d.severity == "error"]
    free = target.disk_bytes if target.disk_bytes is not None else sources.disk_free()
    if not errors and result.disk_bytes > free:
        errors.append(disk_full(recipe.name, {s.name: s.disk_bytes for s in stages}, free))
    if errors:
        raise EffcError(*errors)
    return result


def _outlined(staged: Staged, models: Mapping[str, Model]) -> tuple[Model, Sequence[Diagnostic]]:
    """The structure after the stage, on meta, and what the method warns of."""
    first, *others = [models[name] for name in staged.models]
    others += [models[name] for name in staged.named.values()]
    told = staged.method.refuses(first, others)
    if refused := [d for d in told if d.severity == "error"]:
        raise EffcError(*refused)
    rewriter = Rewriter(first, staged.method.kind)
    staged.method.outline(rewriter, others)
    if isinstance(staged.method, Train):
        rewriter.model.facts["learned"] = True
    if staged.method.at_most:
        rewriter.model.facts[AT_MOST] = True  # and so are all that are made of it
    return rewriter.done(), told


def _followed(
    binding: Binding, staged: Staged, models: Mapping[str, Model], refused: dict[str, Model]
) -> list[Diagnostic]:
    """Problems with selectors of a stage that cannot be planned; `refused` gets what stands in for it."""
    first = models.get(staged.models[0])
    if first is None:
        return []
    if (model := stands_in(staged.method, first)) is not None:
        refused[binding.name] = model
    return [placed(d, binding.call) for d in selector_problems(staged.method, first)]


def _costed(
    binding: Binding,
    staged: Staged | None,
    made: Model,
    models: Mapping[str, Model],
    target: Target,
    texts: Mapping[str, Text],
) -> StagePlan:
    cost = count(made, ATTENDED)
    if staged is None:
        seconds = 0.05 + cost.bytes / target.disk_read  # read once, for its fingerprint
        return StagePlan(binding.name, binding.call.kind, (), cost, target.base_bytes, 0, seconds, {})
    source = models[staged.models[0]]
    work = _work(staged, staged.method, source)
    return StagePlan(
        binding.name,
        binding.call.kind,
        (*staged.models, *staged.named.values()),
        cost,
        peak_of(staged.method, source, work, target, _opened(texts), staged.seq),
        cost.bytes,
        seconds_of(staged.method, source, work, target) + cost.bytes / target.disk_write,
        promise(staged.method.contract) | ({"size": "at most"} if made.facts.get(AT_MOST) else {}),
        selector_report(staged.method, source),
    )


def _work(staged: Staged, method: Method, source: Model) -> Work:
    """The stage's own work; a merge says nothing of it, since it depends on how many models come in."""
    work = method.work(source, staged.seq)
    if isinstance(method, Merge):
        work += merging(source, len(staged.models) + len(staged.named), method.rounds)
    return work


def _peak(staged: Staged, source: Model, target: Target, opened: int, method: Method) -> int:
    """Resident bytes with `method` in place of the stage's own, which may differ in an argument."""
    return peak_of(method, source, _work(staged, method, source), target, opened, staged.seq)


def _opened(texts: Mapping[str, Text]) -> int:
    return sum(text.bytes for text in texts.values())


def promise(contract: Contract) -> dict[str, Any]:
    """A contract as JSON; `error` and `held` are filled by a run."""
    return {
        "fidelity": contract.fidelity.name,
        "tolerance": contract.fidelity.tolerance,
        "needs": [str(f) for f in contract.needs],
        "gives": [str(f) for f in contract.gives],
        "error": None,
        "held": None,
    }
