"""Source: what `data code = corpus(...)` names; documents go in, packed token sequences come out.

A source is opened with the vocabulary of the model that will read it, so one source serves models of
different tokenizers, each with its own packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from effc.runtime.data._packed import Packed, pack
from effc.runtime.data._vocabulary import Vocabulary
from effc.specs.base import Spec, name_by_path
from effc.specs.diagnostic import Diagnostic
from effc.specs.units import Share, Unit

_HERE = "effc.runtime.data."


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a place. `spans` are the character ranges that carry loss; None means all of it."""

    text: str
    where: str
    spans: tuple[tuple[int, int], ...] | None = None
    split: str | None = None
    """The split it is bound to; None lets its content decide."""


class Source(Spec):
    """Base of every source. A subclass reads documents; splitting, tokenizing and packing happen here."""

    examples: ClassVar[tuple[str, ...]]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        name_by_path(cls, _HERE)

    def documents(self, vocabulary: Vocabulary) -> Sequence[Document]:
        """Everything the source holds, in an order that depends on nothing but its content.

        Raises: E620 missing, E621 empty, E622 not UTF-8, and what the format of the source adds.
        """
        raise NotImplementedError

    def notices(self) -> tuple[Diagnostic, ...]:
        """Warnings about the source, e.g. files of a corpus that this machine lacks."""
        return ()


class Sequences(Source):
    """A source whose documents are packed into sequences of one length."""

    seq: Annotated[int, Unit("tokens")] = Field(default=256, ge=8, description="tokens in one sequence")
    heldout: Share = Field(
        default=0.05, gt=0, lt=1, description="share of the documents that no training sees"
    )
    seed: int = Field(default=0, ge=0, description="order of the documents and of the sequences")

    def open(self, files: Mapping[str, bytes], store: Path | None = None) -> Packed:
        """Tokenize and pack for the vocabulary in `files` (tokenizer.json and its companions).

        Kept in memory for the life of the process, and under `store` on disk where one is given.

        Raises: as `documents`; E624 when there is too little text to hold any of it out; E625 without
        a tokenizer.
        """
        vocabulary = Vocabulary.of(files)
        documents = self.documents(vocabulary)
        return pack(documents, vocabulary, self.seq, self.heldout, self.seed, store, self.notices())
