"""A plan for people: a row a stage, the selector report, exports, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effc.specs.units import fmt_bytes, fmt_count, fmt_seconds

Record = Mapping[str, Any]

_HEAD = ("stage", "method", "params", "bytes", "FLOP/token", "KV/token", "peak memory", "disk", "time")


def plan_text(record: Record) -> str:
    """The plan as `effc plan` prints it, from the record that `--json` prints."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Record) -> Iterator[str]:
    stages: Sequence[Record] = record["stages"]
    beside: Sequence[Record] = record.get("around", ())
    reports: Sequence[Record] = record.get("reports", ())
    total = _total(stages, reports, beside)
    yield f"plan of {record['recipe']}" + (f": {record['title']}" if record["title"] else "")
    yield ""
    yield from table([_HEAD, *map(_row, stages), *map(_said, reports), *map(_beside, beside), total], left=2)
    for stage in stages:
        if stage["selected"]:
            yield ""
            yield f"{stage['name']} ({stage['method']}) touches:"
            yield from ("  " + line for line in table(stage["selected"], left=3))
    if record["exports"]:
        yield ""
        yield from table([("export", "as", "where"), *(_export(e) for e in record["exports"])], left=3)
    for model, why in record.get("torch", {}).items():
        yield ""
        yield f"torch runs `{model}`, without a C program: {why}"
    target = record["target"]
    yield ""
    disk = sum(s["disk_bytes"] for s in stages)
    peak = max(s["peak_bytes"] for s in (*stages, *reports))
    yield f"fits `{target['name']}`: {fmt_bytes(peak)} of {fmt_bytes(target['memory_bytes'])} memory" + (
        f", {fmt_bytes(disk)} of {fmt_bytes(record['disk_free'])} disk" if record.get("disk_free") else ""
    )
    if not target["calibrated"]:
        yield "times are guesses: `effc bench --calibrate` measures this machine"


def _row(stage: Record) -> tuple[str, ...]:
    most = "<= " if stage["contract"].get("size") else ""
    return (
        stage["name"],
        stage["method"],
        most + fmt_count(stage["params"]),
        most + fmt_bytes(stage["bytes"]),
        fmt_count(stage["flops_per_token"]),
        _cache(stage),
        fmt_bytes(stage["peak_bytes"]),
        fmt_bytes(stage["disk_bytes"]) if stage["disk_bytes"] else "-",
        fmt_seconds(stage["seconds"]),
    )


def _cache(stage: Record) -> str:
    """Bytes of cache a token, and those that a sequence has however long it is."""
    constant = stage.get("state_bytes", 0)
    grows = fmt_bytes(stage["kv_bytes_per_token"])
    return f"{grows} + {fmt_bytes(constant)}" if constant else grows


def _said(report: Record) -> tuple[str, ...]:
    """An analysis, which makes no model."""
    peak, seconds = fmt_bytes(report["peak_bytes"]), fmt_seconds(report["seconds"])
    return (report["name"], report["method"], "", "", "", "", peak, "-", seconds)


def _beside(row: Record) -> tuple[str, ...]:
    """What is no stage: its time alone."""
    return (row["name"], row["what"], "", "", "", "", "", "", fmt_seconds(row["seconds"]))


def _total(stages: Sequence[Record], reports: Sequence[Record], beside: Sequence[Record]) -> tuple[str, ...]:
    disk = sum(s["disk_bytes"] for s in stages)
    seconds = sum(s["seconds"] for s in (*stages, *reports, *beside))
    peak = max((s["peak_bytes"] for s in (*stages, *reports)), default=0)
    return ("", "", "", "", "", "", fmt_bytes(peak), fmt_bytes(disk), fmt_seconds(seconds))


def _export(export: Record) -> tuple[str, str, str]:
    return export["model"], export["format"], export["path"] or ""


def table(rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Aligned columns; the first `left` are flush left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
