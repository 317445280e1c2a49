"""Scores of a stage as text: a matrix where they are of pairs, else a column, the smallest first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from effc.compiler.plan_text import table

_SHOWN = 20
_NUMBER = re.compile(r"\d+")


def score_lines(scores: Mapping[str, float]) -> Iterator[str]:
    """A name is a path, or two paths with a space between: then what they score together.

    Pairs are half a matrix, each path named by its last number; the other half mirrors it.
    """
    if not all(name.count(" ") == 1 for name in scores):
        ranked = sorted(scores.items(), key=lambda item: item[1])
        yield from table([(name, f"{value:.3g}") for name, value in ranked[:_SHOWN]], left=1)
        if len(ranked) > _SHOWN:
            yield f"and {len(ranked) - _SHOWN} more (--json has all)"
        return
    pairs: dict[tuple[str, str], float] = {}
    for name, value in scores.items():
        first, second = name.split(" ")
        pairs[first, second] = value
    paths = list(dict.fromkeys(path for pair in pairs for path in pair))
    rows = [("", *(_short(path) for path in paths[1:]))]
    for path in paths[:-1]:
        cells = (f"{pairs[path, other]:.3f}" if (path, other) in pairs else "" for other in paths[1:])
        rows.append((path, *cells))
    yield from table(rows, left=1)


def _short(path: str) -> str:
    numbers = _NUMBER.findall(path)
    return numbers[-1] if numbers else path
