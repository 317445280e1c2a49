"""Files: bytes of a recipe to a Source, within bounds; the files that `use` names, each read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from effc.dsl import tree
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.source import Source

MOST_FILES = 64
MOST_BYTES = 1 << 20
"""Of one recipe; one of 500 stages has some 60 kB."""

Parse = Callable[[Source], tuple[tree.Document, list[Diagnostic]]]


class Reader:
    """Reads the files that `use` names; each file of a tree is read once."""

    def __init__(self, parse: Parse) -> None:
        self.parse = parse
        self.seen: dict[Path, tree.Document] = {}

    def __call__(self, path: Path, problems: list[Diagnostic]) -> tree.Document:
        """Raises OSError or UnicodeDecodeError; what does not parse goes to `problems`, once."""
        if path not in self.seen:
            if len(self.seen) >= MOST_FILES:
                raise OSError(f"a recipe uses at most {MOST_FILES} files")
            document, found = self.parse(read_source(path))
            problems += found
            self.seen[path] = document
        return self.seen[path]


def read_source(path: Path, name: str | None = None) -> Source:
    """A recipe file as a Source. Raises EffcError E106, E109 or E114."""
    shown = name or str(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise EffcError(Diagnostic("E114", f"`{shown}` cannot be read", notes=(reason.lower(),))) from None
    except ValueError:  # a NUL in the name
        raise EffcError(Diagnostic("E114", f"`{shown}` is no file name")) from None
    return source_of(raw, shown, path.resolve().parent)


def source_of(raw: bytes, name: str, folder: Path | None = None) -> Source:
    """Bytes as a Source. Raises EffcError E106 when they are not UTF-8, E109 when there are too many."""
    if len(raw) > MOST_BYTES:
        note = f"it is larger than {MOST_BYTES} bytes"
        raise EffcError(Diagnostic("E109", f"`{name}` is too large for a recipe", notes=(note,)))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        good = raw[: problem.start].decode("utf-8", "replace")
        line = good.count("\n") + 1
        note = (
            f"byte {raw[problem.start]:#04x} at offset {problem.start}, in line {line}, begins no character"
        )
        help_ = "save the file as UTF-8"
        raise EffcError(
            Diagnostic("E106", f"`{name}` is not UTF-8 text", notes=(note,), help=help_)
        ) from None
    return Source(name, text.replace("\r\n", "\n"), folder)
