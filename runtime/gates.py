"""Gates: when an `expect` is judged, what one that fails cancels, and when an export may be published.

An `expect` is judged as soon as its models exist. It is about those of its models that none of the others is
made from: `small.loss <= base.loss + 3%` judges small. One that fails cancels every stage behind the model
it is about. An export is published once each `expect` about its model, or about what made it, holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter

from effc.compiler.around import exported
from effc.compiler.model import Model
from effc.runtime.artifact import Story
from effc.runtime.bind import spec_of
from effc.runtime.clock import Clock
from effc.runtime.compiled import ExpectRun, ExportRun
from effc.runtime.exports.artifact import Artifact
from effc.runtime.opening import placed
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.recipe import Binding, Expect, Export, Metric, Recipe, judge

RANDOM = "not judged, the weights are random"


class Gates:
    """The expects and exports of one run."""

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[str, Model],
        reports: Mapping[str, object],
        measure: Callable[[Metric], float],
        tell: Callable[..., None],
        tiny: bool,
        story: Callable[[str, list[ExpectRun]], Story],
    ) -> None:
        """`models` and `reports` grow as stages finish; `tell(what, name, text)` reports; `story(model,
        expects)` is what an artefact tells about itself."""
        self.story = story
        self.recipe, self.models, self.measure, self.tell, self.tiny = recipe, models, measure, tell, tiny
        self.reports = reports
        self.clock = Clock()
        """What exports take; the run gives its own."""
        self.problems: list[Diagnostic] = []
        self._failed: dict[str, str] = {}
        """Model -> why nothing behind it runs."""
        self._judged: dict[int, ExpectRun] = {}
        self._exported: dict[int, ExportRun] = {}

    def cancels(self, binding: Binding) -> bool:
        """Whether a failed `expect` stands before this stage; then it is noted and told."""
        reason = self._reason(self.recipe.ancestors(binding.name))
        if reason:
            self._failed[binding.name] = reason
            self.tell("cancelled", binding.name, reason)
        return bool(reason)

    def judge(self) -> None:
        """Judge every `expect` that has become possible."""
        for number, expect in enumerate(self.recipe.expects):
            known = {*self.models, *self.reports}
            if number not in self._judged and all(m.model in known for m in expect.metrics()):
                with placed(expect.span):
                    self._judged[number] = self._verdict(expect)

    def export(self) -> None:
        """Publish every export that may be."""
        for number, export in enumerate(self.recipe.exports):
            about = {export.model, *self.recipe.ancestors(export.model)}
            if number not in self._exported and export.model in self.models and not self._open(about):
                reason = self._reason(about)
                self._exported[number] = self._refused(export, reason) if reason else self._published(export)

    def close(self) -> tuple[list[ExpectRun], list[ExportRun]]:
        """All expects and exports in the order of the recipe; what never became possible says why."""
        for number, expect in enumerate(self.recipe.expects):
            if number not in self._judged:
                reason = self._reason({metric.model for metric in expect.metrics()})
                self._judged[number] = ExpectRun(
                    expect.text, None, words=f"{expect.text}: not judged, {reason}"
                )
        for number, export in enumerate(self.recipe.exports):
            if number not in self._exported:
                about = {export.model, *self.recipe.ancestors(export.model)}
                self._exported[number] = self._refused(export, self._reason(about))
        return (
            [self._judged[i] for i in range(len(self.recipe.expects))],
            [self._exported[i] for i in range(len(self.recipe.exports))],
        )

    # -- expects

    def _verdict(self, expect: Expect) -> ExpectRun:
        found = judge(expect, self.measure)
        if self.tiny:
            words = f"{expect.text}: {RANDOM}"
            self.tell("expect", "", words)
            return ExpectRun(expect.text, None, found.left, found.right, words)
        self.tell("expect", "", found.text)
        if not found.holds:
            self.problems.append(_fails(expect, found.text))
            for name in self._about(expect):
                self._failed.setdefault(name, f"`{expect.text}` does not hold")
        return ExpectRun(expect.text, found.holds, found.left, found.right, found.text)

    def _about(self, expect: Expect) -> set[str]:
        names = {name for metric in expect.metrics() for name in self._speaks_of(metric.model)}
        older = {other for name in names for other in self.recipe.ancestors(name)}
        return names - older

    def _speaks_of(self, name: str) -> list[str]:
        """The model itself; of a report, the models that it is about."""
        binding = self.recipe.stage(name)
        return [ref.name for ref in binding.call.models] if binding.value == "report" else [name]

    def _open(self, models: set[str]) -> bool:
        """Whether an `expect` about one of these models is still to be judged."""
        return any(
            number not in self._judged and models & self._about(expect)
            for number, expect in enumerate(self.recipe.expects)
        )

    def _reason(self, models: set[str]) -> str:
        """Why nothing is done with these models; empty when nothing failed."""
        return next((self._failed[name] for name in self._failed if name in models), "")

    # -- exports

    def _published(self, export: Export) -> ExportRun:
        name = exported(export.call.kind, export.model)
        self.tell("start", name, "is written and verified")
        start = perf_counter()
        with placed(export.call.span or export.span, export.call), self.clock.on("export", name):
            format_ = spec_of("export", export.call)
            if isinstance(format_, Artifact):
                judged = [self._judged[i] for i in sorted(self._judged)]
                format_ = format_.telling(self.story(export.model, judged))
            verdict = format_.publish(self.models[export.model], self._merged_from(export.model))
        self.tell("export", name, str(format_.path))
        seconds = perf_counter() - start
        verified = f"{verdict.consumer}, error {verdict.error:.1e}"
        return ExportRun(export.model, export.call.kind, str(format_.path), verified, seconds=seconds)

    def _merged_from(self, name: str) -> list[Model]:
        """The loaded models behind one that only merges made; else none."""
        behind = [b for b in self.recipe.bindings if b.name in {name, *self.recipe.ancestors(name)}]
        made = [b for b in behind if b.keyword != "model"]
        if not made or any(not b.call.kind.startswith("merge.") for b in made):
            return []
        return [self.models[b.name] for b in behind if b.keyword == "model"]

    def _refused(self, export: Export, reason: str) -> ExportRun:
        self.tell("cancelled", f"{export.call.kind} of {export.model}", reason)
        path = str(export.call.arguments.get("path", ""))
        return ExportRun(export.model, export.call.kind, path, refused=reason or "its model does not exist")


def _fails(expect: Expect, words: str) -> Diagnostic:
    labels = (Label(expect.span),) if expect.span else ()
    advice = "change the recipe, or the limit if the result is good enough"
    return Diagnostic("E605", f"`{expect.text}` does not hold", labels, (words,), advice)
