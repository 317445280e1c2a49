"""Text in one field of JSON lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from effc.runtime.data import _files, _lines
from effc.runtime.data._source import Document, Sequences
from effc.runtime.data._vocabulary import Vocabulary


class Jsonl(Sequences):
    """JSON lines, one document a line, its text in one field."""

    examples: ClassVar[tuple[str, ...]] = ('jsonl("notes.jsonl", field = "text", seq = 256)',)

    path: str = Field(min_length=1, description="file, folder or glob")
    field: str = Field(default="text", min_length=1, description="the field that holds the text")

    def documents(self, vocabulary: Vocabulary) -> Sequence[Document]:
        files, rows = _lines.rows(self.path)
        found = []
        for where, row in rows:
            text = _lines.take(where, row, self.field)
            if not isinstance(text, str):
                raise _lines.malformed(
                    where, f"has no text in `{self.field}`", f"it is {type(text).__name__}"
                )
            if text.strip():
                found.append(Document(text, where))
        _files.refuse_empty(self.kind, files, found, "text")
        return found
