"""Contenders for one job on a GPU: each with operands of its own, warm and beyond the cache."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from gpu_timing import Call, copies, gpu, report, seconds, wrong

Make = Callable[[], Call]
"""Makes operands and gives a call that uses them."""
MOST = 48
"""Sets of operands at most."""
COLUMNS = ("job", "contender", "warm us", "cold us", "times as fast", "memory MB", "problem")
Row = dict[str, Any]


def asked(words: str | None) -> int:
    """Runs, from the command line; 0 after one line where no GPU is at hand."""
    parser = argparse.ArgumentParser(description=words)
    parser.add_argument("--runs", type=int, default=7)
    runs: int = parser.parse_args().runs
    if not gpu():
        print("nothing measured: no GPU that torch can use")
        return 0
    if torch.cuda.get_device_capability() < (9, 0):
        print(f"nothing measured: {gpu()} is older than Hopper, for which the kernels are")
        return 0
    return runs


def dense(m: int, n: int, k: int) -> Make:
    """Torch's own product in bfloat16: x [m, k], W [n, k]."""

    def make() -> Call:
        x, w = (torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for rows in (m, n))
        return lambda: torch.nn.functional.linear(x, w)

    return make


def contest(job: str, contenders: Mapping[str, Make], size: int, runs: int) -> list[Row]:
    """Microseconds of a call, and memory that it takes beside operands; ratios are to the first, cold.

    `size` is the bytes that a set of operands has, of which there are so many that each is out of the cache
    when its turn comes.
    """
    rows: list[Row] = []
    for name, make in contenders.items():
        row: Row = {"job": job, "contender": name}
        rows.append(row)
        try:
            calls = [make() for _ in range(min(MOST, copies(size)))]
            calls[0]()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            calls[0]()
            torch.cuda.synchronize()
            row["memory MB"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
            row["warm us"] = round(1e6 * seconds([calls[0]] * len(calls), runs), 1)
            row["cold us"] = round(1e6 * seconds(calls, runs), 1)
            if basis := rows[0].get("cold us"):
                row["times as fast"] = round(basis / row["cold us"], 2)
        except Exception as error:  # a peer that is not installed, or refuses, is a line of the table
            row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        torch.cuda.empty_cache()
    return rows


def checked(pairs: Sequence[tuple[Any, Any]]) -> bool:
    """Whether this GPU gives the values that are due of each (op, spec); prints the first it does not."""
    for op, spec in pairs:
        if words := wrong(op, spec):
            print(f"wrong values, nothing measured: {spec.describe()}: {words}")
            return False
    return True


def table(name: str, rows: Sequence[Row]) -> None:
    """Prints rows and writes JSON to out/bench."""
    report(name, rows, COLUMNS)
