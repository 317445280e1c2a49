"""Plain text files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from effc.runtime.data import _files
from effc.runtime.data._source import Document, Sequences
from effc.runtime.data._vocabulary import Vocabulary

_PART = 2000
"""Characters that a part of a single text has at least."""


class Text(Sequences):
    """Text files by path, folder or glob; a document is a file, or a part of it where there is one only."""

    examples: ClassVar[tuple[str, ...]] = ('text("notes/*.md", seq = 256)',)

    path: str = Field(min_length=1, description="file, folder or glob")
    document: Literal["auto", "file", "part"] = Field(
        default="auto", description="what is held out as a whole: a file, or a part of one cut at blank lines"
    )

    def documents(self, vocabulary: Vocabulary) -> Sequence[Document]:
        files = _files.find(self.path)
        texts = [(path, _files.read(path)) for path in files]
        parts = self.document == "part" or (self.document == "auto" and len(files) == 1)
        found = [
            Document(piece, str(path))
            for path, text in texts
            for piece in (_parts(text) if parts else [text])
            if piece.strip()
        ]
        _files.refuse_empty(self.kind, files, found, "text")
        return found


def _parts(text: str) -> list[str]:
    """Cut at blank lines into parts of at least `_PART` characters; the parts add up to the text."""
    out, start = [], 0
    for blank in re.finditer(r"\n[ \t]*\n", text):
        if blank.end() - start >= _PART:
            out.append(text[start : blank.end()])
            start = blank.end()
    return [*out, text[start:]]
