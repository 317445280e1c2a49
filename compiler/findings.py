"""Findings: what an analysis says of a model, as data; the value of a report binding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that speaks against the model: where it is, what it does, what to do instead."""

    where: str
    what: str
    repair: str


@dataclass(frozen=True, slots=True)
class Findings:
    """The answer of an analysis."""

    words: str
    """The answer in one sentence."""
    findings: tuple[Finding, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What was looked at, and how much of it."""

    @property
    def holds(self) -> bool:
        """Whether nothing speaks against the model."""
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            "words": self.words,
            "findings": [asdict(finding) for finding in self.findings],
            "numbers": dict(self.numbers),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Findings:
        found = tuple(Finding(**finding) for finding in data["findings"])
        return cls(data["words"], found, dict(data["numbers"]))
