"""Curve: the loss over the steps of a training, in at most 200 means, whatever the number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_POINTS = 200


class Curve:
    """Sums of every loss term over runs of steps."""

    def __init__(self, steps: int) -> None:
        self._width = -(-steps // _POINTS)
        self._sums: dict[str, list[float]] = {}
        self._counts: list[int] = []

    def add(self, step: int, losses: Mapping[str, float]) -> None:
        """The terms of one step; steps come in order."""
        place = step // self._width
        if place == len(self._counts):
            self._counts.append(0)
            for name in losses:
                self._sums.setdefault(name, []).append(0.0)
        self._counts[place] += 1
        for name, value in losses.items():
            self._sums[name][place] += value

    def ends(self) -> tuple[float, float]:
        """Mean total loss of the first and of the last run of steps."""
        total = self._sums.get("total", [])
        if not total:
            return 0.0, 0.0
        return total[0] / self._counts[0], total[-1] / self._counts[-1]

    def as_json(self) -> dict[str, Any]:
        """{"every": steps of a point, "losses": {term: [mean, ...]}}"""
        losses = {
            name: [round(s / n, 6) for s, n in zip(sums, self._counts, strict=True)]
            for name, sums in self._sums.items()
        }
        return {"every": self._width, "losses": losses}

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {"sums": self._sums, "counts": self._counts}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: list(sums) for name, sums in state["sums"].items()}
        self._counts = list(state["counts"])
