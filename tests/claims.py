"""Claims as a table: what each method promises, what was measured, and whether it holds.

A claim test may ask for `measured` and hand it each number with its limit. `make claims` leaves
docs/claims.md and docs/claims.json: `--write-claims` puts the rows of each test that has run in place of its
old ones, so that one file of claims can be run again alone, and a run of all drops the rows of tests that
are gone. A claim that fails is in the table as failed, also where its test expects that; one without numbers
has its sentence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs"


class Measured(Protocol):
    """Record a number and demand that it lies below, or above, its limit; exactly one limit is given."""

    def __call__(
        self, method: str, claim: str, value: float, *, below: float | None = None, above: float | None = None
    ) -> None: ...


@dataclass(frozen=True)
class Row:
    """One number of one test. A test without numbers has a row with words in place of them."""

    method: str
    claim: str
    numbers: str
    verdict: str
    """holds, fails or skipped"""
    test: str = ""


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    properties: list[tuple[str, object]] = request.node.user_properties

    def record(
        method: str, claim: str, value: float, *, below: float | None = None, above: float | None = None
    ) -> None:
        limit, sign = (below, "<") if above is None else (above, ">")
        if limit is None or (below is not None and above is not None):
            raise ValueError("give either `below` or `above`")
        holds = value < limit if sign == "<" else value > limit
        numbers = f"{value:.4g} {sign} {limit:.4g}"
        row = Row(method, claim, numbers, "holds" if holds else "fails")
        properties.append(("measured", asdict(row)))
        assert holds, f"{method}: {claim}: {numbers} does not hold"

    return record


def whole(config: pytest.Config) -> bool:
    """Whether this run is of all claims: nothing narrows it."""
    narrowed = config.getoption("keyword") or config.getoption("lf", False)
    everywhere = [Path(a).resolve() for a in config.args] in ([FOLDER.parent], [FOLDER.parent / "tests"])
    return config.getoption("markexpr") == "claim" and everywhere and not narrowed


class Table:
    """The rows on disk, brought up to date as each test ends: a run that dies loses one test."""

    def __init__(self, folder: Path, whole: bool) -> None:
        self.folder, self.whole = folder, whole
        self.rows: dict[str, list[Row]] = {}
        """Rows by test."""
        self.run: set[str] = set()
        if (old := folder / "claims.json").is_file():
            for row in json.loads(old.read_text()):
                self.rows.setdefault(row["test"], []).append(Row(**row))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        if report.nodeid not in self.run:
            self.rows[report.nodeid] = []
        self.run.add(report.nodeid)
        self.rows[report.nodeid] += rows_of(report)
        self.write()

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if self.whole and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self.rows = {test: rows for test, rows in self.rows.items() if test in self.run}
            self.write()

    def write(self) -> None:
        rows = [row for found in self.rows.values() for row in found]
        self.folder.mkdir(exist_ok=True)
        (self.folder / "claims.md").write_text(page(rows))
        (self.folder / "claims.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


def rows_of(report: pytest.TestReport) -> Iterator[Row]:
    """The rows of one test: its numbers, or its sentence, and the error where one stopped it."""
    given: list[Mapping[str, Any]] = [dict(v) for k, v in report.user_properties if k == "measured"]  # type: ignore[call-overload]
    rows = [Row(**{**row, "test": report.nodeid}) for row in given]
    yield from rows
    told = any(row.verdict == "fails" for row in rows)
    if (report.passed and rows) or told:
        return
    file, _, name = report.nodeid.partition("::")
    about = rows[-1].method if rows else Path(file).stem.removeprefix("test_").replace("_", " ")
    sentence = name.partition("[")[0].removeprefix("test_").replace("_", " ")
    verdict = {"passed": "holds", "failed": "fails"}.get(report.outcome, report.outcome)
    yield Row(about, sentence, "" if report.passed else _last_line(report), verdict, report.nodeid)


def page(rows: Sequence[Row]) -> str:
    """The table in Markdown; the seeds of a claim share a line."""
    together: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        together.setdefault((row.method, row.claim), []).append(row)
    failed = sum(any(r.verdict == "fails" for r in found) for found in together.values())
    lines = [
        "# Claims",
        "",
        f"Written by `make claims`: {len(together)} claims, {failed} of them fail. Each number stands beside "
        f"its limit, one for each seed. torch {torch.__version__.partition('+')[0]}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads.",
        "",
        "| method | claim | measured | verdict |",
        "|---|---|---|---|",
    ]
    for (method, claim), found in sorted(together.items()):
        numbers = "; ".join(dict.fromkeys(r.numbers for r in found if r.numbers))
        cells = (method, claim, numbers, _verdict(found))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _verdict(rows: Sequence[Row]) -> str:
    fails = sum(row.verdict == "fails" for row in rows)
    if fails:
        return f"**fails** in {fails} of {len(rows)}"
    return "skipped" if any(row.verdict == "skipped" for row in rows) else "holds"


def _last_line(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    said = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines() or [""]
    return said[0].removeprefix("E").strip()
