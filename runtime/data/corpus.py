"""A named body of text that needs no download: the interpreter's own standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from effc.runtime.data._source import Document, Sequences
from effc.runtime.data._vocabulary import Vocabulary
from effc.specs.diagnostic import Diagnostic, EffcError


class Corpus(Sequences):
    """Python source: the standard library of the running interpreter, its tests left out.

    The list of files, their content hashes and their splits are fixed. Another version of Python lacks some
    files and has others in another wording; those it has are used under the same split, and a warning
    counts the difference. `heldout` therefore has no effect here.
    """

    examples: ClassVar[tuple[str, ...]] = (
        'corpus("python-stdlib", seq = 256)',
        'corpus("python-stdlib", under = "asyncio")',
    )

    name: Literal["python-stdlib"] = Field(description="which body of text")
    under: str = Field(
        default="", description="only files below this folder of it, e.g. asyncio: a domain of its own"
    )

    def documents(self, vocabulary: Vocabulary) -> Sequence[Document]:
        found = _present(self.name)[0]
        if self.under:
            inside = f"{self.under.strip('/')}/"
            found = tuple(document for document in found if document.where.startswith(inside))
            if {d.split for d in found} != {"train", "heldout"}:
                raise EffcError(self._lacking())
        if {d.split for d in found} != {"train", "heldout"}:
            raise EffcError(
                Diagnostic(
                    "E620",
                    f"the files of `{self.name}` are not on this machine",
                    notes=(f"found {len(found)} of {len(_listed(self.name))} below `{_root()}`",),
                    help="run effc in a Python that ships its standard library as source files",
                )
            )
        return found

    def _lacking(self) -> Diagnostic:
        """No folder of this name has files in both splits."""
        splits: dict[str, set[str]] = {}
        for _, split, path in _listed(self.name):
            folder, slash, _ = path.partition("/")
            splits.setdefault(folder, set()).update([split] if slash else [])
        whole = sorted(folder for folder, found in splits.items() if len(found) == 2)
        return Diagnostic(
            "E620",
            f"`{self.name}` has no text of both splits below `{self.under}`",
            notes=(f"folders that have: {', '.join(whole)}",),
            help="name one of them, or leave `under` out",
            about="under",
        )

    def notices(self) -> tuple[Diagnostic, ...]:
        _, absent, changed = _present(self.name)
        if not absent and not changed:
            return ()
        return (
            Diagnostic(
                "W620",
                f"`{self.name}` differs from the one its results were measured on",
                notes=(f"of {len(_listed(self.name))} files, {absent} are absent and {changed} differ",),
                help="use CPython 3.11.7 to repeat published numbers exactly",
                severity="warning",
            ),
        )


def listed_files(name: str = "python-stdlib") -> Iterator[tuple[Path, str]]:
    """The files of a corpus on this machine with their splits."""
    root = _root()
    for _, split, path in _listed(name):
        if (root / path).is_file():
            yield root / path, split


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@lru_cache
def _listed(name: str) -> tuple[tuple[str, str, str], ...]:
    """(hash, split, path) of every file."""
    text = resources.files("effc.specs.zoo").joinpath(f"{name}.txt").read_text(encoding="utf-8")
    rows = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return tuple((row[0], row[1], row[2]) for row in rows)


@lru_cache
def _present(name: str) -> tuple[tuple[Document, ...], int, int]:
    """The documents here, how many listed files are absent, and how many have other content."""
    documents: dict[str, Document] = {}
    absent = changed = 0
    for known, split, path in _listed(name):
        try:
            raw = (_root() / path).read_bytes()
            text = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            absent += 1
            continue
        found = sha256(raw).hexdigest()
        changed += not found.startswith(known)
        if text.strip():
            documents.setdefault(found, Document(text, path, split=split))
    return tuple(documents.values()), absent, changed
