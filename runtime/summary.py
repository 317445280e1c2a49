"""What `effc compile` prints at the end: a row a stage with bytes, loss and time; expects; exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effc.compiler.plan_text import table
from effc.runtime.report_words import fmt_change, value_of
from effc.specs.units import fmt_bytes, fmt_count, fmt_seconds

Record = Mapping[str, Any]

_HEAD = ("stage", "method", "", "bytes", "", "params", "loss", "", "time", "planned")
_BAR = 16


def summary(record: Record) -> str:
    """The record of a compiled recipe for a terminal."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Record) -> Iterator[str]:
    stages: Sequence[Record] = record["stages"]
    yield f"{record['recipe']}" + (f": {record['title']}" if record.get("title") else "")
    yield ""
    if stages:
        yield from table([_HEAD, *_rows(stages, record.get("plan"))], left=3)
    yield ""
    for report in record.get("reports", ()):
        about = f"{report['method']} of {', '.join(report['inputs'])}"
        yield f"{'says' if report['holds'] else 'FINDS':<7}{report['name']} ({about}): {report['words']}"
        for finding in report["findings"]:
            yield f"{'':<7}{finding['where']}: {finding['what']}; {finding['repair']}"
    for expect in record["expects"]:
        mark = {True: "holds", False: "FAILS", None: "-"}[expect["holds"]]
        yield f"{mark:<7}{expect.get('words') or expect['text']}"
    for export in record["exports"]:
        if export["refused"]:
            yield f"{'-':<7}{export['format']} of {export['model']} was not published: {export['refused']}"
        else:
            what = f"{export['format']} of {export['model']}"
            yield f"{'wrote':<7}{export['path']} ({what}, checked by {export['verified']})"


def _rows(stages: Sequence[Record], plan: Record | None) -> Iterator[tuple[str, ...]]:
    by_name = {s["name"]: s for s in stages}
    planned = {s["name"]: s for s in plan["stages"]} if plan else {}
    widest = max(s["bytes"] for s in stages) or 1
    for stage in stages:
        source = next((by_name[n] for n in stage["inputs"] if n in by_name), None)
        loss, before = value_of(stage, "loss"), value_of(source, "loss")
        expected = planned.get(stage["name"])
        yield (
            stage["name"],
            stage["method"],
            "█" * max(1, round(_BAR * stage["bytes"] / widest)),
            fmt_bytes(stage["bytes"]),
            fmt_change(source["bytes"], stage["bytes"]) if source else "",
            fmt_count(stage["params"]),
            "" if loss is None else f"{loss:.3f}",
            "" if loss is None or before is None else fmt_change(before, loss),
            "cached" if stage["cached"] else fmt_seconds(stage["seconds"]),
            "" if expected is None or stage["cached"] else fmt_seconds(expected["seconds"]),
        )
