"""Vocabulary: a model's tokenizer as data reads it: text to ids, the ids around a document, the template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from effc.specs.diagnostic import Diagnostic, EffcError

Ids = NDArray[np.int32]


class Vocabulary:
    """Encodes documents; `before` and `after` are the ids around one, often `[bos]` and `[eos]`."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.fingerprint = sha256(files["tokenizer.json"]).hexdigest()
        self.tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.settings: dict[str, Any] = json.loads(files.get("tokenizer_config.json", b"{}"))
        self._template = files.get("chat_template.jinja")
        close = self.token("eos_token")
        close_id = None if close is None else self.tokenizer.token_to_id(close)
        around = self.tokenizer.encode("").ids
        self.before: tuple[int, ...] = tuple(around[:1])
        self.after: tuple[int, ...] = tuple(around[1:]) or (() if close_id is None else (close_id,))

    @staticmethod
    def of(files: Mapping[str, bytes]) -> Vocabulary:
        """The vocabulary in the files of a model; built once per process.

        Raises: E625 without tokenizer.json, or when it cannot be read.
        """
        if "tokenizer.json" not in files:
            raise EffcError(
                Diagnostic(
                    "E625",
                    "the model has no tokenizer, and text data needs one",
                    notes=(f"found: {', '.join(sorted(files)) or 'no tokenizer files'}",),
                    help="put the model's `tokenizer.json` beside its config.json",
                )
            )
        try:
            return _of(tuple(sorted(files.items())))
        except Exception as problem:  # the tokenizers library raises bare Exception
            raise EffcError(
                Diagnostic(
                    "E625",
                    "the model's tokenizer cannot be read",
                    notes=(str(problem).splitlines()[0] if str(problem) else type(problem).__name__,),
                    help="export the tokenizer again with `save_pretrained` of a fast tokenizer",
                )
            ) from problem

    def token(self, name: str) -> str | None:
        """The text of a special token such as `eos_token`."""
        value = self.settings.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        return value if isinstance(value, str) else None

    @property
    def template(self) -> str | None:
        """The chat template that travels with the model."""
        if self._template is not None:
            return self._template.decode()
        found = self.settings.get("chat_template")
        return found if isinstance(found, str) else None

    def encode(self, texts: Sequence[str], around: bool = False) -> list[Ids]:
        """Ids of every text; with `around`, opened and closed as a document."""
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        before, after = (self.before, self.after) if around else ((), ())
        return [np.array([*before, *e.ids, *after], dtype=np.int32) for e in found]

    def encode_spans(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids of a text that brings its own special tokens, and which of them lie in one of the spans.

        A token counts where its first character lies in a span.
        """
        found = self.tokenizer.encode(text, add_special_tokens=False)
        inside = [any(a <= start < b for a, b in spans) for start, _ in found.offsets]
        return np.array(found.ids, dtype=np.int32), np.array(inside, dtype=bool)


@lru_cache(maxsize=16)
def _of(files: tuple[tuple[str, bytes], ...]) -> Vocabulary:
    return Vocabulary(dict(files))
