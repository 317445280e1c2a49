"""The tables of the report: waterfall, error of each layer, contracts, plan against run, expectations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from effc.runtime.report_words import (
    MEASURES,
    Measure,
    Record,
    fmt_change,
    fmt_number,
    tone_of,
    value_of,
    worded,
)
from effc.specs.units import fmt_bytes, fmt_count, fmt_seconds


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    change: str
    tone: str
    """better, worse or same; empty for a model that was loaded."""
    now: float
    """share of the widest bar of the column, 0..1"""
    before: float


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    method: str
    source: str
    seconds: str
    cells: tuple[Cell | None, ...]
    notes: tuple[str, ...]


def rows_of(stages: Mapping[str, Record]) -> list[Row]:
    measures = [m for m in MEASURES if any(value_of(s, m.key) is not None for s in stages.values())]
    widest = {
        m.key: max(v for s in stages.values() if (v := value_of(s, m.key)) is not None) for m in measures
    }
    rows = []
    for name, stage in stages.items():
        source = next((n for n in stage.get("inputs", ()) if n in stages), "")
        cells = tuple(_cell(m, stage, stages.get(source), widest[m.key]) for m in measures)
        seconds = "cached" if stage.get("cached") else fmt_seconds(stage.get("seconds") or 0.0)
        rows.append(Row(name, stage["method"], source, seconds, cells, tuple(stage.get("notes", ()))))
    return rows


def _cell(measure: Measure, stage: Record, source: Record | None, widest: float) -> Cell | None:
    value = value_of(stage, measure.key)
    if value is None:
        return None
    before = value_of(source, measure.key) if source else None
    scale = widest or 1.0
    if before is None:
        return Cell(worded(measure, value), "", "", value / scale, 0.0)
    change, tone = fmt_change(before, value), tone_of(measure, before, value)
    return Cell(worded(measure, value), change, tone, value / scale, before / scale)


# ---- the tables


def strip_of(stage: Record) -> dict[str, Any]:
    """Errors of one stage as a grid: a row a role, a column a layer, darkness by rank of the error."""
    errors: Mapping[str, float] = stage["errors"]
    places = {path: _place(path) for path in errors}
    columns = sorted({layer for layer, _ in places.values()})
    roles = list(dict.fromkeys(role for _, role in places.values()))
    worst = max(errors.values()) or 1.0
    cells = [
        {
            "x": columns.index(places[path][0]),
            "y": roles.index(places[path][1]),
            "path": path,
            "error": f"{error:.3g}",
            "dark": round(0.12 + 0.88 * error / worst, 3),
        }
        for path, error in errors.items()
    ]
    ranked = sorted(errors.items(), key=lambda item: -item[1])
    return {
        "stage": stage["name"],
        "method": stage["method"],
        "columns": ["" if c < 0 else str(c) for c in columns],
        "roles": roles,
        "cells": cells,
        "worst": [(path, f"{error:.3g}") for path, error in ranked[:3]],
        "all": [(path, f"{error:.4g}") for path, error in ranked],
    }


def _place(path: str) -> tuple[int, str]:
    """`layers.3.mlp.up` -> (3, "mlp.up"); a path outside the layers -> (-1, path)."""
    words = path.split(".")
    if len(words) > 2 and words[0] == "layers" and words[1].isdigit():
        return int(words[1]), ".".join(words[2:])
    return -1, path


def contract_of(stage: Record) -> dict[str, Any] | None:
    contract = stage.get("contract") or {}
    if not contract.get("fidelity"):
        return None
    error, limit = contract.get("error"), contract.get("tolerance")
    return {
        "stage": stage["name"],
        "method": stage["method"],
        "fidelity": contract["fidelity"],
        "limit": "no bound" if limit is None else f"at most {limit:.3g}",
        "error": "not measured" if error is None else f"{error:.3g}",
        "facts": ", ".join(contract.get("gives", ())),
        "held": contract.get("held"),
    }


def predictions_of(record: Record, stages: Mapping[str, Record]) -> Iterator[dict[str, Any]]:
    """Plan against run: parameters and bytes exactly, peak within 25 %, time within a factor of 2."""
    planned = {s["name"]: s for s in (record.get("plan") or {}).get("stages", ())}
    for name, stage in stages.items():
        if name not in planned:
            continue
        want = planned[name]
        yield {
            "stage": name,
            "params": _exact(want, stage, "params", fmt_count),
            "bytes": _exact(want, stage, "bytes", fmt_bytes),
            "peak": _within(want, stage, "peak_bytes", fmt_bytes, 1.25),
            "seconds": _within(want, stage, "seconds", fmt_seconds, 2.0),
        }
    for row in record.get("predictions", ()):
        if "params" not in row:  # no stage: opening data, judging, exporting
            run, plan = {"seconds": row["seconds"]["measured"]}, {"seconds": row["seconds"]["planned"]}
            nothing = {"text": "", "ok": None}
            seconds = _within(plan, run, "seconds", fmt_seconds, 2.0)
            yield {
                "stage": row["name"],
                **dict.fromkeys(("params", "bytes", "peak"), nothing),
                "seconds": seconds,
            }


def _exact(plan: Record, run: Record, key: str, words: Any) -> dict[str, Any]:
    same = plan.get(key) == run.get(key)
    text = words(run[key]) if same else f"{words(plan[key])} → {words(run[key])}"
    return {"text": text, "ok": same}


def _within(plan: Record, run: Record, key: str, words: Any, factor: float) -> dict[str, Any]:
    want, got = plan.get(key), run.get(key)
    if not want or not got or run.get("cached"):
        return {"text": words(want) + " planned" if want else "", "ok": None}
    ratio = max(want / got, got / want)
    return {"text": f"{words(want)} → {words(got)}", "ok": ratio <= factor}


def expect_of(expect: Record) -> dict[str, Any]:
    words = _bytes if ".bytes" in expect["text"] or ".kv_bytes" in expect["text"] else fmt_number
    return {**expect, "left": words(expect.get("left")), "right": words(expect.get("right"))}


def _bytes(value: float | None) -> str:
    return fmt_number(None) if value is None else fmt_bytes(value)
