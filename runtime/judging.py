"""Numbers about finished models: the contract of a stage, losses for the report, sides of an `expect`.

All of them are remembered in the store under the content they are about, except times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effc import passes
from effc.compiler.around import LOSSES, REPORTED, judged, reportable, streams
from effc.compiler.fit import untimed
from effc.compiler.method import Method
from effc.compiler.model import Model
from effc.compiler.plan import promise
from effc.compiler.probe import probe
from effc.runtime.closure import fingerprint
from effc.runtime.compiled import ReportRun
from effc.runtime.evaluate import loss
from effc.runtime.heap import returning
from effc.runtime.key import numeric_class
from effc.runtime.machine import memory_bytes
from effc.runtime.metrics import COUNTED, latency, measure
from effc.runtime.opening import Opening
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Metric


class Judging:
    """Measures the models of one run; `fingerprints` grows with it."""

    def __init__(
        self,
        opening: Opening,
        models: Mapping[str, Model],
        fingerprints: Mapping[str, str],
        device: torch.device,
        reports: Mapping[str, ReportRun],
    ) -> None:
        self.reports = reports
        self.opening, self.models, self.fingerprints, self.device = opening, models, fingerprints, device
        self._memory = memory_bytes()

    def metric(self, metric: Metric) -> float:
        """One side of an `expect`.

        Raises:
            EffcError: E351 for the latency of a model that memory cannot hold, and as `measure` does.
        """
        if metric.metric == "findings":
            return float(len(self.reports[metric.model].findings.findings))
        model = self.models[metric.model]
        if metric.metric == "latency":
            self._hold(metric.model)
        data = self.opening.data(metric.data.name, model) if metric.data else None
        split = metric.data.split if metric.data else None

        def measured() -> float:
            present = model if metric.metric in COUNTED else self._present(metric.model)
            if metric.metric == "latency":
                present = present.clone().materialize()
            return float(measure(present, metric.metric, data, metric.arguments, split))

        if metric.metric == "latency":
            return measured()
        print_ = data.fingerprint if data is not None else None
        question = [metric.metric, self.fingerprints[metric.model], print_, split]
        question += [[str(argument) for argument in metric.arguments], *self._class("effc.runtime.metrics")]
        with self.opening.clock.on("expect", judged(self.opening.recipe)), self._room(metric.model):
            return float(self._remember(question, measured))

    def losses(self, name: str, data: Mapping[str, Any]) -> dict[str, float]:
        """Loss of a model on the first held-out tokens of each data; empty when it is too large to hold."""
        if not self.fits(name):
            return {}
        found = {}
        for label, opened in data.items():
            length = opened.batch("heldout", [0]).ids.shape[1]
            limit = max(1, REPORTED // length)
            question = ["loss", self.fingerprints[name], opened.fingerprint, limit]
            question += self._class("effc.runtime.evaluate")
            measured = partial(self._loss, name, opened, limit)
            with self.opening.clock.on("report", LOSSES):
                found[label] = float(self._remember(question, measured))
        return found

    def _loss(self, name: str, opened: Any, limit: int) -> float:
        return loss(self._present(name), opened, "heldout", limit)

    def latency(self, name: str) -> float | None:
        """Seconds of one decoded token; None when the model is too large to hold."""
        if not self.fits(name):
            return None
        with self.opening.clock.on("report", LOSSES):
            return latency(self._present(name).clone().materialize())

    def contract(self, method: Method, before: str, after: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """What the contract promised and whether it was kept, on random and held-out inputs."""
        contract = promise(method.contract)
        wide = method.contract.fidelity.name == "EXACT"  # measured on clones in float64, which must fit
        if (wide or streams(self.opening.recipe)) and not (self.fits(before) and self.fits(after)):
            return contract
        heldout = [_ids(opened) for opened in data.values()]
        question = [
            "contract", method.kind, method.model_dump(mode="json"), self.fingerprints[before],
            self.fingerprints[after], [opened.fingerprint for opened in data.values()],
            *self._class("effc.compiler.probe", passes.module_of(method.kind)),
        ]  # fmt: skip

        def measured() -> dict[str, Any]:
            found = probe(method, self._present(before), self._present(after), heldout)
            facts = sorted(name for name, true in found.facts.items() if true)
            return {
                "error": found.error,
                "error_float64": found.error_float64,
                "error_float32": found.error_float32,
                "held": found.held,
                "broken": list(found.broken),
                "facts": facts,
            }

        with self.opening.clock.on("report", LOSSES), self._room(before, after):
            found: dict[str, Any] = self._remember(question, measured)
        return contract | found

    def fits(self, name: str) -> bool:
        """Whether a model is small enough to be held for the report."""
        model = self.models[name]
        most = reportable(self.opening.recipe, self._memory)
        return sum(t.numel() * t.element_size() for t in model.tensors().values()) <= most

    def _hold(self, name: str) -> None:
        """Refuse to time a model that is larger than memory, which would have to be read for every token."""
        nbytes = sum(t.numel() * t.element_size() for t in self.models[name].tensors().values())
        if found := untimed(self.opening.recipe.expects, {name: nbytes}, self._memory):
            raise EffcError(found[0])

    def _present(self, name: str) -> Model:
        """The model in memory; one that is too large stays on disk and is read block by block."""
        model = self.models[name]
        return model.clone().materialize() if self.fits(name) else model

    def _room(self, *names: str) -> AbstractContextManager[None]:
        """Blocks of a model that is read from disk go back to the system one by one."""
        return nullcontext() if all(map(self.fits, names)) else returning()

    def _class(self, *modules: str) -> list[Any]:
        return [numeric_class(self.device), fingerprint(modules, docstrings=False)]

    def _remember(self, question: list[Any], measured: Callable[[], Any]) -> Any:
        with torch.no_grad():
            return self.opening.remembered.get(question, measured)


def _ids(opened: Any) -> Tensor:
    ids: Tensor = opened.batch("heldout", [0]).ids
    return ids
