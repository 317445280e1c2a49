"""Instruments: observers of a pipeline. They time, measure and write down; they never edit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from effc.compiler.equality import Call, apart, run
from effc.compiler.model import Model
from effc.compiler.show import show

if TYPE_CHECKING:
    from effc.compiler.pipeline import Step


class Instrument:
    """Told what a pipeline does. Every method may stay as it is."""

    def begin(self, model: Model, probes: Sequence[Call]) -> None:
        """Before the first rule."""

    def before(self, rule: str, model: Model) -> None:
        """Before a rule."""

    def after(self, step: Step, model: Model) -> None:
        """After a rule that was verified, and edited `model`."""


class Timing(Instrument):
    """Seconds that each rule took, its verification included; a rule that ran again adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def before(self, rule: str, model: Model) -> None:
        self._begun = time.perf_counter()
        self.seconds.setdefault(rule, 0.0)

    def after(self, step: Step, model: Model) -> None:
        self.seconds[step.rule] += time.perf_counter() - self._begun

    def __str__(self) -> str:
        return "\n".join(f"{seconds:9.3f} s  {rule}" for rule, seconds in self.seconds.items())


class Equality(Instrument):
    """How far each step leaves the model from the one that came in, in its own dtype."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, float]] = []

    def begin(self, model: Model, probes: Sequence[Call]) -> None:
        self._probes = list(probes)
        self._want: list[list[Tensor]] = [run(model, call) for call in probes]

    def after(self, step: Step, model: Model) -> None:
        pairs = zip(self._want, self._probes, strict=True)
        self.errors.append((step.rule, max(apart(want, run(model, call)) for want, call in pairs)))

    def __str__(self) -> str:
        return "\n".join(f"{error:9.2g}  {rule}" for rule, error in self.errors)


class Dump(Instrument):
    """A text file a step in a folder: the model as `effc show` prints it, then the edits."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files: list[Path] = []

    def begin(self, model: Model, probes: Sequence[Call]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files = []
        self._write("input", show(model))

    def after(self, step: Step, model: Model) -> None:
        said = [f"{step.rule}, round {step.round}, {len(step.hits)} places", *map(str, step.measures), ""]
        self._write(step.rule, "\n".join([*said, show(model), "", *map(str, step.edits)]))

    def _write(self, name: str, text: str) -> None:
        self.files.append(self.folder / f"{len(self.files):03d}-{name}.txt")
        self.files[-1].write_text(text + "\n", encoding="utf-8")
