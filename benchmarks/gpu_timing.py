"""Time what a GPU does: CUDA graphs replayed, the cache cold, medians; and values on the GPU before times."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effc.kernels.differs import differs
from effc.kernels.gpu.load import load

Call = Callable[[], Any]
OUT = Path("out/bench")


def gpu() -> str:
    """The name of the GPU; "" where there is none that CUDA knows."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() and torch.version.cuda else ""


def copies(bytes: int) -> int:
    """How many inputs of `bytes` to take in turns so that none is in the cache still: 3 caches full."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, -(-3 * cache // max(1, bytes)) + 1)


def seconds(calls: Sequence[Call], runs: int = 7) -> float:
    """The median time of one of `calls`, which do the same on inputs of their own, in one graph.

    The first replay warms up; each of `runs` replays goes through all calls.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in [*calls[:2], *calls[:2]]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times)


def wrong(op: Any, spec: Any) -> str:
    """The first case of an op, such as kernels/quant_linear/gpu.py, that the GPU gets wrong; "" for none."""
    module = load(op.emit(spec))
    for case in op.cases(spec):
        due = case.due()
        given = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in case.given.items()}
        results = {
            name: torch.full(y.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
            for name, y in due.items()
        }
        getattr(module, case.entry)(**given, **results)
        for name, y in due.items():
            if words := differs(results[name].cpu(), y, max(case.tolerance, 2**-7)):
                return f"{case.label}: {name}{words}"
    return ""


def report(name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print a table and leave the rows as JSON."""
    OUT.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"machine": gpu(), "torch": torch.__version__, "date": date, "rows": list(rows)}
    (OUT / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    wide = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip())
