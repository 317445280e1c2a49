"""Documents to sequences: split by content, tokenize, lay end to end, cut to one length.

Symbols: T tokens in a sequence, B sequences of a batch. A row may hold the end of one document and the start
of the next; segments keep them from seeing each other, and no label crosses between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from effc.compiler.losses import IGNORED
from effc.compiler.method import Batch
from effc.compiler.step import Step
from effc.specs.diagnostic import Diagnostic, EffcError

if TYPE_CHECKING:
    from effc.runtime.data._source import Document
    from effc.runtime.data._vocabulary import Vocabulary

SPLITS = ("train", "heldout")
_FORMAT = "packed 1"
_kept: dict[str, Mapping[str, Stream]] = {}


@dataclass(frozen=True, slots=True)
class Stream:
    """One split: all its tokens in a row, where documents start, which tokens carry loss."""

    ids: NDArray[np.int32]
    """[N]"""
    document: NDArray[np.int32]
    """[N] number of the document a token belongs to, rising"""
    counts: NDArray[np.bool_]
    """[N] whether predicting this token is part of the loss; False for the first token of a document"""
    bytes: int
    """UTF-8 bytes of the text"""


class Packed:
    """Sequences of T tokens in disjoint splits; the `Data` that stages and metrics read."""

    def __init__(
        self,
        streams: Mapping[str, Stream],
        seq: int,
        seed: int,
        fingerprint: str,
        vocabulary: str,
        notices: tuple[Diagnostic, ...] = (),
    ) -> None:
        self.streams = dict(streams)
        self.seq = seq
        self.fingerprint = fingerprint
        self.vocabulary = vocabulary
        self.notices = notices
        self._seed = seed
        self._order = np.random.Generator(np.random.Philox(seed)).permutation(self.size("train"))

    @property
    def bytes_per_token(self) -> float:
        """Held-out bytes of text for each held-out token that carries loss."""
        return self.streams["heldout"].bytes / max(1, self.tokens("heldout"))

    def size(self, split: str) -> int:
        """Sequences in the split."""
        return -(-len(self.streams[split].ids) // self.seq)

    def tokens(self, split: str) -> int:
        """Tokens in the split that carry loss."""
        return int(self.streams[split].counts.sum())

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        """The sequences with these numbers. Train sequences are numbered in shuffled order, so that the
        first n are a fair sample; numbers from `size` on are those of further passes, each of which starts
        at a place of its own and takes the text round to there: a model that sees the same sequences again
        learns them by heart sooner than one that sees the same text at other cuts.

        ids, labels [B, T]; a short last sequence is filled up with a segment of its own and no labels.
        """
        stream, numbers = self.streams[split], np.asarray(indices)
        total = len(stream.ids)
        passes, rows = np.divmod(numbers, self.size(split))
        if split == "train":
            rows = self._order[rows]
        first = np.array([self._first(split, int(number)) for number in passes])[:, None]
        at = first + rows[:, None] * self.seq + np.arange(self.seq + 1)
        inside = at < first + total
        around = at >= total  # behind the end comes the start, which is another document
        at %= total
        ids = np.where(inside, stream.ids[at], 0).astype(np.int64)
        document = np.where(inside, stream.document[at] + around * (stream.document[-1] + 1), -1)
        same = document[:, 1:] == document[:, :-1]
        labelled = same & inside[:, 1:] & stream.counts[at[:, 1:]]
        labels = np.where(labelled, ids[:, 1:], IGNORED)
        starts = np.concatenate([np.ones((len(rows), 1), bool), ~same[:, :-1]], axis=1)
        place = np.arange(self.seq)
        positions = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
        mixed = bool(starts[:, 1:].any())
        segments = torch.from_numpy(starts.cumsum(1)) if mixed else None
        step = Step(torch.from_numpy(positions), segments)
        return Batch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(labels), step)

    def _first(self, split: str, number: int) -> int:
        """Where a pass over the text starts, in tokens."""
        if split != "train" or number == 0:
            return 0
        return int(np.random.Generator(np.random.Philox([self._seed, number])).integers(self.seq))


def pack(
    documents: Sequence[Document],
    vocabulary: Vocabulary,
    seq: int,
    heldout: float,
    seed: int,
    store: Path | None,
    notices: tuple[Diagnostic, ...],
) -> Packed:
    """Split, tokenize and pack, or take what an earlier call kept under the same fingerprint."""
    prints = [_print(d) for d in documents]
    whole = sha256(
        "\n".join([_FORMAT, vocabulary.fingerprint, str(heldout), str(seed), *prints]).encode()
    ).hexdigest()
    if whole not in _kept:
        _kept[whole] = _read(store, whole) or _write(
            store, whole, _streams(documents, prints, vocabulary, heldout, seed)
        )
    fingerprint = sha256(f"{whole} {seq}".encode()).hexdigest()
    return Packed(_kept[whole], seq, seed, fingerprint, vocabulary.fingerprint, notices)


def _print(document: Document) -> str:
    """Content hash of a document; place and name are not content."""
    spans = "" if document.spans is None else json.dumps(document.spans)
    return sha256(document.text.encode() + b"\0" + spans.encode()).hexdigest() + (document.split or "")


def _streams(
    documents: Sequence[Document], prints: Sequence[str], vocabulary: Vocabulary, heldout: float, seed: int
) -> dict[str, Stream]:
    chosen = _split(dict(zip(prints, documents, strict=True)), heldout)
    out = {}
    for split in SPLITS:
        held = sorted(chosen[split], key=lambda p: sha256(f"{seed} {p}".encode()).digest())
        out[split] = _stream([chosen[split][p] for p in held], vocabulary)
    return out


def _split(documents: Mapping[str, Document], heldout: float) -> dict[str, dict[str, Document]]:
    """Assign every distinct document by its content hash; equal documents cannot fall on both sides."""
    out: dict[str, dict[str, Document]] = {split: {} for split in SPLITS}
    free = sorted(print_ for print_, d in documents.items() if d.split is None)
    for print_, document in documents.items():
        if document.split is not None:
            out[document.split][print_] = document
    held = [p for p in free if int(p[:8], 16) < heldout * 2**32] or free[:1]
    for p in free:
        out["heldout" if p in held else "train"][p] = documents[p]
    empty = [split for split in SPLITS if not out[split]]
    if empty:
        raise EffcError(
            Diagnostic(
                "E624",
                "there is too little text to hold any of it out",
                notes=(f"distinct documents: {len(documents)}, at least 2 are needed",),
                help="give more files, or a longer text with blank lines between its parts",
            )
        )
    return out


def _stream(documents: Sequence[Document], vocabulary: Vocabulary) -> Stream:
    plain = [d.text for d in documents if d.spans is None]
    encoded = iter(vocabulary.encode(plain, around=True))
    ids, counts = [], []
    for document in documents:
        if document.spans is None:
            tokens = next(encoded)
            counted = np.ones(len(tokens), dtype=bool)
        else:
            tokens, counted = vocabulary.encode_spans(document.text, document.spans)
        counted[:1] = False
        ids.append(tokens)
        counts.append(counted)
    number = np.repeat(np.arange(len(ids), dtype=np.int32), [len(i) for i in ids])
    size = sum(_bytes(d) for d in documents)
    return Stream(np.concatenate(ids), number, np.concatenate(counts), size)


def _bytes(document: Document) -> int:
    """UTF-8 bytes of the text that carries loss."""
    if document.spans is None:
        return len(document.text.encode())
    return sum(len(document.text[a:b].encode()) for a, b in document.spans)


def _read(store: Path | None, name: str) -> dict[str, Stream] | None:
    if store is None or not (file := store / "data" / f"{name}.safetensors").is_file():
        return None
    try:
        flat = load_file(file)
    except (OSError, SafetensorError):
        return None  # made again and written anew
    return {
        split: Stream(
            flat[f"{split}.ids"],
            flat[f"{split}.document"],
            flat[f"{split}.counts"].astype(bool),
            int(flat[f"{split}.bytes"][0]),
        )
        for split in SPLITS
    }


def _write(store: Path | None, name: str, streams: dict[str, Stream]) -> dict[str, Stream]:
    """Keep the streams beside the store's objects: written aside, then renamed."""
    if store is not None:
        folder = store / "data"
        flat = {}
        for split, stream in streams.items():
            flat[f"{split}.ids"] = stream.ids
            flat[f"{split}.document"] = stream.document
            flat[f"{split}.counts"] = stream.counts.astype(np.uint8)
            flat[f"{split}.bytes"] = np.array([stream.bytes], dtype=np.int64)
        aside = folder / f"{name}.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(flat, aside)
            aside.replace(folder / f"{name}.safetensors")
        except (OSError, SafetensorError):
            with suppress(OSError):  # keeping is a convenience; a full disk is told by what needs it
                aside.unlink()
    return streams
