"""The report of a compiled recipe: one self-contained HTML page, and the same facts as JSON.

Input is the record that `effc compile --json` prints (stages, expects, exports, plan); this file arranges it.
The page answers at one look what shrank, by how much, what it cost in loss, which stage cost most and whether
all held. Pictures are inline SVG; the page loads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from effc.runtime.report_tables import contract_of, expect_of, predictions_of, rows_of, strip_of
from effc.runtime.report_words import (
    MEASURES,
    Measure,
    Record,
    fmt_change,
    many,
    tone_of,
    value_of,
    worded,
)
from effc.specs.units import fmt_bytes, fmt_seconds


def page(record: Record) -> str:
    """The HTML page of one record."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html", "jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(**view(record))


def write(record: Record, path: Path) -> None:
    """Write the page at `path` and the record beside it, as `.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(record), encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def view(record: Record) -> dict[str, Any]:
    """Everything the template prints, already in words."""
    stages = {s["name"]: s for s in record["stages"] if s.get("bytes") is not None}
    last = _result(record, stages)
    first = _origin(last, stages)
    return {
        "record": record,
        "verdict": _verdict(record),
        "tiles": [tile for m in MEASURES if (tile := _tile(m, stages[first], stages[last]))],
        "first": first,
        "last": last,
        "sentences": list(_sentences(stages, first, last)),
        "measures": [m for m in MEASURES if any(value_of(s, m.key) is not None for s in stages.values())],
        "rows": rows_of(stages),
        "layers": [strip_of(s) for s in stages.values() if s.get("errors")],
        "contracts": [c for s in stages.values() if (c := contract_of(s))],
        "predictions": list(predictions_of(record, stages)),
        "expects": [expect_of(e) for e in record["expects"]],
        "warnings": list({w["title"]: w for w in record.get("warnings", ())}.values()),
        "total_seconds": fmt_seconds(sum(s.get("seconds") or 0.0 for s in stages.values())),
    }


# ---- which models the headline compares


def _result(record: Record, stages: Mapping[str, Record]) -> str:
    """The smallest exported model; without exports the last stage."""
    exported = [e["model"] for e in record["exports"] if e["model"] in stages]
    return min(exported, key=lambda n: stages[n]["bytes"]) if exported else list(stages)[-1]


def _origin(name: str, stages: Mapping[str, Record]) -> str:
    """The loaded model that the chain of first inputs starts from."""
    while (inputs := stages[name].get("inputs")) and inputs[0] in stages:
        name = inputs[0]
    return name


def _chain(first: str, last: str, stages: Mapping[str, Record]) -> list[str]:
    names = [last]
    while names[-1] != first:
        names.append(stages[names[-1]]["inputs"][0])
    return names[::-1]


# ---- the headline


def _verdict(record: Record) -> dict[str, Any]:
    """Did everything hold? Counts, and what did not."""
    judged = [e for e in record["expects"] if e.get("holds") is not None]
    promised = [s for s in record["stages"] if s.get("contract", {}).get("held") is not None]
    broken = [e["text"] for e in judged if not e["holds"]]
    broken += [f"{s['name']}: {s['contract']['fidelity']}" for s in promised if not s["contract"]["held"]]
    broken += [
        f"{e['format']} of {e['model']} was not published" for e in record["exports"] if e.get("refused")
    ]
    open_ = len(record["expects"]) - len(judged)
    if broken:
        words = f"{len(broken)} did not hold"
    elif judged or promised:
        words = "Everything held"
    else:
        words = "Nothing was judged"
    detail = f"{many(len(judged), 'expectation')} and {many(len(promised), 'contract')} checked"
    if open_:
        detail += f"; {many(open_, 'expectation')} not judged"
    return {
        "ok": not broken and bool(judged or promised),
        "broken": broken,
        "words": words,
        "detail": detail,
    }


def _tile(measure: Measure, first: Record, last: Record) -> dict[str, str] | None:
    before, after = value_of(first, measure.key), value_of(last, measure.key)
    if before is None or after is None:
        return None
    return {
        "title": measure.title,
        "before": worded(measure, before),
        "after": worded(measure, after),
        "change": fmt_change(before, after),
        "tone": tone_of(measure, before, after),
    }


def _sentences(stages: Mapping[str, Record], first: str, last: str) -> Iterator[str]:
    """Which stage saved most, which cost most loss, which took longest."""
    chain = _chain(first, last, stages)
    steps = list(pairwise(chain))
    if not steps:
        return
    saved = {b: stages[a]["bytes"] - stages[b]["bytes"] for a, b in steps}
    most = max(saved, key=lambda n: saved[n])
    if saved[most] > 0:
        yield f"Most bytes were saved by {most} ({stages[most]['method']}): {fmt_bytes(saved[most])}."
    losses = {n: value_of(stages[n], "loss") for n in chain}
    cost = {b: losses[b] - losses[a] for a, b in steps if losses[a] is not None and losses[b] is not None}  # type: ignore[operator]
    if cost and cost[worst := max(cost, key=lambda n: cost[n])] > 0:
        text = f"Most loss was cost by {worst} ({stages[worst]['method']}): {cost[worst]:+.3f} nats"
        healed = [n for n in chain[chain.index(worst) + 1 :] if cost.get(n, 0.0) < 0]
        if healed:
            text += f"; {healed[0]} ({stages[healed[0]]['method']}) took back {-cost[healed[0]]:.3f}"
        yield text + "."
    timed = {n: stages[n].get("seconds") or 0.0 for n in stages}
    longest = max(timed, key=lambda n: timed[n])
    if timed[longest] > 0:
        share = timed[longest] / sum(timed.values())
        yield f"Most time went into {longest}: {fmt_seconds(timed[longest])}, {share:.0%} of the run."
