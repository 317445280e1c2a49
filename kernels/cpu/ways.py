"""Ways: how a kernel may go about its rows with the same bits each way; a machine measures the fastest.

The text of such a kernel holds a table: for each bucket of rows the number of a way. It is filled when a
program is loaded, so one text, one key and one lock serve all machines. What changes the order of a sum is
no way: it stands in the spec.

What was measured lies in the user's cache, a file for each device and set of instructions, and in it an entry
for each kernel: its ways by bucket, and the seconds that were measured. An entry is for one text of a kernel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from effc.kernels.cpu.build import compiler
from effc.kernels.cpu.isa import Isa
from effc.specs import user_cache

BUCKETS = (1, 2, 4, 8, 16, 64)
"""The least number of rows in each bucket."""
TRIED = (1, 3, 6, 12, 24, 96)
"""The number of rows that stands for each bucket when it is measured."""

WAYS = rf"""
#ifndef WAYS
#define WAYS {len(BUCKETS)}
/* which bucket a number of rows is in: {", ".join(map(str, BUCKETS))} and more */
INLINE int bucket_of(long M) {{ return {" + ".join(f"(M >= {least})" for least in BUCKETS[1:])}; }}
#endif
"""

_ABOUT = ("model name", "cpu family", "model", "stepping", "cache size", "flags")


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured of one kernel on this machine."""

    ways: tuple[int, ...]
    """Number of the fastest way, by bucket."""
    seconds: tuple[Mapping[int, float], ...]
    """Way -> the least seconds of the calls that were tried, by bucket."""

    def faster(self, bucket: int) -> float:
        """How many times as fast the chosen way is as the best of the others; 1 when there is no other."""
        tried = self.seconds[bucket]
        others = [s for way, s in tried.items() if way != self.ways[bucket]]
        return min(others) / tried[self.ways[bucket]] if others else 1.0


@cache
def device(isa: Isa) -> str:
    """Names this processor, its set of instructions and the compiler whose code was measured."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        first = []
    lines = sorted(line for line in first if line.partition("\t")[0].partition(":")[0].strip() in _ABOUT)
    words = json.dumps([lines, str(isa), (compiler() or ("", ""))[1]])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def read(isa: Isa, texts: Mapping[str, str], ways: int) -> dict[str, Found]:
    """Kernel -> what was measured of it here, where its text is the same; `ways`: how many there are."""
    held = user_cache.read(_name(isa), device(isa))
    found = {}
    for key, text in texts.items():
        entry = held.get(key) if isinstance(held, dict) else None
        if isinstance(entry, dict) and entry.get("text") == _digest(text):
            made = _found(entry, ways)
            if made is not None:
                found[key] = made
    return found


def write(isa: Isa, texts: Mapping[str, str], found: Mapping[str, Found]) -> None:
    """Add entries; when two processes write at once, those of one may be measured again another day."""
    held = user_cache.read(_name(isa), device(isa))
    entries: dict[str, Any] = held if isinstance(held, dict) else {}
    for key, one in found.items():
        seconds = [{str(way): s for way, s in tried.items()} for tried in one.seconds]
        entries[key] = {"text": _digest(texts[key]), "ways": list(one.ways), "seconds": seconds}
    user_cache.write(_name(isa), device(isa), entries)


def words(names: Sequence[str], usual: Sequence[int], found: Found | None) -> list[tuple[str, str, str]]:
    """(rows, way, why) for runs of buckets that go one way: as measured, or the usual way."""
    chosen = usual if found is None else found.ways
    starts = [i for i in range(len(BUCKETS)) if i == 0 or chosen[i] != chosen[i - 1]]
    lines = []
    for start, end in zip(starts, [*starts[1:], len(BUCKETS)], strict=True):
        why = "usual, not measured on this machine yet" if found is None else _why(found, start, end)
        lines.append((_rows(start, end), names[chosen[start]], why))
    return lines


def _why(found: Found, start: int, end: int) -> str:
    gains = [found.faster(i) for i in range(start, end)]
    low, high = f"{min(gains):.2f}x", f"{max(gains):.2f}x"
    if not any(len(tried) > 1 for tried in found.seconds[start:end]):
        return "the only way for its columns"
    return f"measured: {low if low == high else f'{low} to {high}'} as fast as the other"


def _rows(start: int, end: int) -> str:
    """`1 row`, `2 to 7 rows`, `from 8 rows`"""
    least = BUCKETS[start]
    if end == len(BUCKETS):
        return f"from {least} rows" if start else "any rows"
    most = BUCKETS[end] - 1
    return f"{least} to {most} rows" if most > least else "1 row"


def _found(entry: Mapping[str, Any], ways: int) -> Found | None:
    """An entry as it is used, if every number in it is in its range."""
    try:
        chosen = tuple(int(way) for way in entry["ways"])
        seconds = tuple({int(w): float(s) for w, s in tried.items()} for tried in entry["seconds"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    whole = len(chosen) == len(seconds) == len(BUCKETS) and all(0 <= way < ways for way in chosen)
    timed = whole and all(
        way in tried and min(tried.values()) > 0 for way, tried in zip(chosen, seconds, strict=True)
    )
    return Found(chosen, seconds) if timed else None


def _name(isa: Isa) -> str:
    return f"ways-{device(isa)}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
