"""Multiple choice questions, for accuracy by likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from effc.runtime.data import _files, _lines
from effc.runtime.data._source import Source
from effc.runtime.data._vocabulary import Ids, Vocabulary
from effc.specs.diagnostic import Diagnostic


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its possible continuations, as token ids."""

    prompt: Ids
    choices: tuple[Ids, ...]
    lengths: tuple[int, ...]
    """UTF-8 bytes of every choice, by which its likelihood may be normalized"""
    answer: int


@dataclass(frozen=True, slots=True)
class Questions:
    """What `acc` reads. All of it is held out: no stage trains on it."""

    items: tuple[Question, ...]
    fingerprint: str
    vocabulary: str
    notices: tuple[Diagnostic, ...] = ()


class Choices(Source):
    """JSON lines of questions: a prompt, a list of choices, the number of the right one counted from 0."""

    examples: ClassVar[tuple[str, ...]] = ('choices("quiz.jsonl")',)

    path: str = Field(min_length=1, description="file, folder or glob")
    prompt: str = Field(default="prompt", min_length=1, description="the field that holds the question")
    choices: str = Field(
        default="choices", min_length=1, description="the field that holds the list of answers"
    )
    answer: str = Field(
        default="answer", min_length=1, description="the field that holds the number of the right one"
    )

    def open(self, files: Mapping[str, bytes], store: Path | None = None) -> Questions:
        """Tokenize every question.

        Raises: E620, E621, E622 for the files; E623 for a malformed question; E625 without a tokenizer.
        """
        vocabulary = Vocabulary.of(files)
        paths, rows = _lines.rows(self.path)
        items, prints = [], []
        for where, row in rows:
            prompt, texts, answer = self._question(where, row)
            items.append(_encode(vocabulary, prompt, texts, answer))
            prints.append(repr((prompt, texts, answer)))
        _files.refuse_empty(self.kind, paths, items, "question")
        whole = sha256("\n".join([vocabulary.fingerprint, *prints]).encode()).hexdigest()
        return Questions(tuple(items), whole, vocabulary.fingerprint)

    def _question(self, where: str, row: dict[str, Any]) -> tuple[str, list[str], int]:
        prompt, texts, answer = (_lines.take(where, row, f) for f in (self.prompt, self.choices, self.answer))
        if not isinstance(prompt, str) or not prompt.strip():
            raise _lines.malformed(where, f"has no text in `{self.prompt}`", f"it is {type(prompt).__name__}")
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t for t in texts):
            raise _lines.malformed(where, "has no list of at least two choices", repr(texts)[:80])
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
            raise _lines.malformed(where, f"has no answer between 0 and {len(texts) - 1}", repr(answer)[:80])
        return prompt, texts, answer


def _encode(vocabulary: Vocabulary, prompt: str, texts: list[str], answer: int) -> Question:
    """A choice is what its text adds to the tokens of the prompt: both are encoded together, then cut.

    Blanks at the end of the prompt move to the choice, where a tokenizer expects them.
    """
    bare = prompt.rstrip()
    gap = prompt[len(bare) :]
    opening = vocabulary.encode([bare])[0]
    wholes = vocabulary.encode([bare + gap + t for t in texts])
    first = np.array(vocabulary.before, dtype=np.int32)
    lengths = tuple(len(t.encode()) for t in texts)
    cut = min([len(opening), *(len(w) - 1 for w in wholes)])
    return Question(np.concatenate([first, opening[:cut]]), tuple(w[cut:] for w in wholes), lengths, answer)
