"""Reading text files of a source, with errors that say which file and where."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from effc.specs.diagnostic import Diagnostic, EffcError


def find(pattern: str) -> list[Path]:
    """The files that a path or a glob names, sorted; a folder stands for the files below it.

    Raises: E620 when there is none.
    """
    if any(sign in pattern for sign in "*?["):
        found = [Path(p) for p in glob.glob(pattern, recursive=True)]
    elif Path(pattern).is_dir():
        found = list(Path(pattern).rglob("*"))
    else:
        found = [Path(pattern)]
    files = sorted(p for p in found if p.is_file())
    if files:
        return files
    parent = Path(pattern).parent
    beside = sorted(p.name for p in parent.iterdir())[:8] if parent.is_dir() else []
    raise EffcError(
        Diagnostic(
            "E620",
            f"no data is at `{pattern}`",
            notes=(f"looked in `{Path.cwd()}`", *([f"beside it: {', '.join(beside)}"] if beside else [])),
            help="give a path or a glob relative to the working directory",
        )
    )


def read(path: Path) -> str:
    """The text of a file.

    Raises: E620 when it cannot be opened, E622 when it is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise EffcError(
            Diagnostic("E620", f"`{path}` cannot be read", notes=(problem.strerror or str(problem),))
        ) from problem
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        raise EffcError(
            Diagnostic(
                "E622",
                f"`{path}` is not UTF-8 text",
                notes=(f"byte {problem.start}, line {line}: 0x{raw[problem.start]:02x}",),
                help="convert it, e.g. `iconv -f latin1 -t utf-8`, or name other files",
            )
        ) from problem


def refuse_empty(kind: str, files: Sequence[Path], found: Sequence[object], what: str) -> None:
    """Raises: E621 when files held nothing of what was looked for."""
    if not found:
        names = ", ".join(f"`{f}`" for f in files[:3])
        raise EffcError(
            Diagnostic("E621", f"`{kind}` found no {what} in {names}", help="name files that hold some")
        )
