"""What compiling a recipe gives: stages, expects, exports and models; as data, shaped as `plan`'s."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from effc.compiler.around import Around
from effc.compiler.cost import Cost
from effc.compiler.findings import Findings
from effc.compiler.model import Model
from effc.specs.diagnostic import Diagnostic
from effc.specs.recipe import Recipe

Record = dict[str, Any]
PREDICTED = ("params", "bytes", "peak_bytes", "seconds")
"""What a plan says of a stage that a run measures."""


@dataclass(frozen=True, slots=True)
class StageRun:
    """One model of the recipe as it came out."""

    name: str
    method: str
    inputs: tuple[str, ...]
    cost: Cost
    peak_bytes: int = 0
    """Largest resident memory while the stage ran."""
    disk_bytes: int = 0
    seconds: float = 0.0
    cached: bool = False
    contract: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    """Key of the result in the store; empty for a model that was loaded."""
    fingerprint: str = ""
    loss: Mapping[str, float] = field(default_factory=dict)
    """Nats a token on the first held-out sequences of each data."""
    latency: float | None = None
    """Seconds of one decoded token."""
    measures: Mapping[str, Any] = field(default_factory=dict)
    log: tuple[tuple[str, str, str], ...] = ()
    selected: tuple[tuple[str, ...], ...] = ()

    def as_json(self) -> Record:
        errors = self.measures.get("errors") or {}
        rest = {k: v for k, v in self.measures.items() if k not in ("errors", "peak_bytes", "seconds")}
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
            "cached": self.cached,
            "contract": dict(self.contract),
            "selected": [list(row) for row in self.selected],
            "key": self.key,
            "fingerprint": self.fingerprint,
            "loss": dict(self.loss),
            "latency": self.latency,
            "errors": dict(errors),
            "measures": rest,
            "log": [list(entry) for entry in self.log],
        }


@dataclass(frozen=True, slots=True)
class ReportRun:
    """What an analysis said of a model."""

    name: str
    method: str
    inputs: tuple[str, ...]
    findings: Findings
    peak_bytes: int = 0
    seconds: float = 0.0
    cached: bool = False
    key: str = ""

    def as_json(self) -> Record:
        return {
            "name": self.name,
            "method": self.method,
            "inputs": list(self.inputs),
            **self.findings.as_json(),
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "cached": self.cached,
            "key": self.key,
        }


@dataclass(frozen=True, slots=True)
class ExpectRun:
    """What came of an `expect`; `holds` is None when it was not judged, and `text` of `words` says why."""

    text: str
    holds: bool | None
    left: float | None = None
    right: float | None = None
    words: str = ""

    def as_json(self) -> Record:
        return {
            "text": self.text,
            "left": self.left,
            "right": self.right,
            "holds": self.holds,
            "words": self.words,
        }


@dataclass(frozen=True, slots=True)
class ExportRun:
    """Where an export went, or why it was not published."""

    model: str
    format: str
    path: str
    verified: str = ""
    refused: str = ""
    seconds: float = 0.0

    def as_json(self) -> Record:
        return {
            "model": self.model,
            "format": self.format,
            "path": self.path,
            "verified": self.verified,
            "refused": self.refused,
            "seconds": self.seconds,
        }


@dataclass(slots=True)
class Compiled:
    """A recipe that was run."""

    recipe: Recipe
    tiny: bool = False
    stages: list[StageRun] = field(default_factory=list)
    reports: dict[str, ReportRun] = field(default_factory=dict)
    """What analyses said, by the name of their binding."""
    expects: list[ExpectRun] = field(default_factory=list)
    exports: list[ExportRun] = field(default_factory=list)
    models: dict[str, Model] = field(default_factory=dict)
    """Every model by name; weights are read when they are needed."""
    problems: list[Diagnostic] = field(default_factory=list)
    """What failed: expects and contracts, with their places."""
    warnings: list[Diagnostic] = field(default_factory=list)
    around: tuple[Around, ...] = ()
    """What was done beside the stages, and how long it took."""

    @property
    def exit_code(self) -> int:
        """0, or 3 when an `expect` or a contract did not hold."""
        return 3 if self.problems else 0

    def stage(self, name: str) -> StageRun:
        """The stage of this name. Raises KeyError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def as_json(self, plan: Mapping[str, Any] | None = None) -> Record:
        """The record that `effc compile --json` prints; `plan` is what was predicted."""
        record: Record = {
            "recipe": self.recipe.name,
            "title": self.recipe.title,
            "params": {name: value for name, value in self.recipe.params.items() if _is_plain(value)},
            "tiny": self.tiny,
            "stages": [stage.as_json() for stage in self.stages],
            "reports": [report.as_json() for report in self.reports.values()],
            "around": [row.as_json() for row in self.around],
            "expects": [expect.as_json() for expect in self.expects],
            "exports": [export.as_json() for export in self.exports],
            "warnings": [warning.as_json() for warning in self.warnings],
            "problems": [problem.as_json() for problem in self.problems],
        }
        if plan is None:
            return record
        return record | {"plan": dict(plan), "predictions": list(_predictions(plan, record))}


def _predictions(plan: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[Record]:
    """Planned beside measured, for each stage and each line beside them; what is cached took no time."""
    measured = {stage["name"]: stage for stage in record["stages"]}
    for stage in plan["stages"]:
        if (found := measured.get(stage["name"])) is not None:
            pairs = {k: {"planned": stage[k], "measured": found[k]} for k in PREDICTED}
            yield {"name": stage["name"], "cached": found["cached"], **pairs}
    spent = {(row["name"], row["what"]): row["seconds"] for row in record["around"]}
    for row in plan["around"]:
        seconds = spent.get((row["name"], row["what"]))
        pair = {"planned": row["seconds"], "measured": seconds}
        yield {"name": f"{row['name']}: {row['what']}", "cached": seconds is None, "seconds": pair}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
