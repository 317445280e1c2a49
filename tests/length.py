"""Fail when a Python file is longer than 300 lines: one idea a file."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 300


def main(paths: list[str]) -> int:
    long = [(path, n) for path in paths if (n := len(Path(path).read_text().splitlines())) > LIMIT]
    for path, n in long:
        print(f"{path}: {n} lines, at most {LIMIT}; which second idea can move out?")
    return bool(long)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
