"""Export: a format a model leaves in. Written aside, read by its consumer in a fresh process, then published.

Shapes: B rows, T tokens, V vocabulary, N new tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from effc.compiler.blocks import PatchEmbed
from effc.compiler.emitted import left_behind
from effc.compiler.model import Model
from effc.compiler.presence import computed
from effc.runtime.consumer import Answer
from effc.runtime.durable import refused, sync_folder
from effc.runtime.exports._aside import OLD, aside
from effc.runtime.exports._mark import MARK, put
from effc.runtime.heap import returning
from effc.runtime.machine import memory_bytes
from effc.specs.base import Spec, name_by_path
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.units import fmt_bytes

_HERE = "effc.runtime.exports."


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the consumer made of the files, against what effc computes."""

    consumer: str
    error: float
    """RMS of the difference of the logits, relative to that of the logits."""
    tolerance: float
    greedy: float | None = None
    """Share of greedy tokens that are also effc's first choice; None when none were asked for."""

    @classmethod
    def of(cls, answer: Answer, want: Tensor, tolerance: float, chosen: Tensor | None = None) -> Self:
        """Compare logits [B, T, V], and effc's logits [B, N, V] where the consumer chose its tokens.

        A token that is not effc's first choice is excused when effc holds the two for equal within the
        tolerance.

        Raises:
            EffcError: E552 when they differ by more.
        """
        error = float((answer.logits - want).square().mean().sqrt() / want.square().mean().sqrt())
        agreed = None
        lag = 0.0
        if chosen is not None and answer.greedy.numel():
            best = chosen.max(-1).values
            given = chosen.gather(-1, answer.greedy.unsqueeze(-1)).squeeze(-1)
            lag = float(((best - given) / chosen.square().mean().sqrt()).max())
            agreed = float((given == best).float().mean())
        if not error <= tolerance or lag > 4 * tolerance:
            measured = f"logits differ by {error:.2e} of their size, at most {tolerance:.0e} is allowed"
            notes = [f"{answer.version}: {measured}"]
            if agreed is not None:
                notes.append(f"{agreed:.0%} of the greedy tokens agree")
            raise EffcError(
                Diagnostic(
                    "E552",
                    "the consumer computes something else from the exported files",
                    notes=tuple(notes),
                    help="nothing was published; please report it with the model's config",
                )
            )
        return cls(answer.version, error, tolerance, agreed)


class Export(Spec):
    """Base of every format. A subclass says what it cannot express, writes, and lets its consumer verify."""

    examples: ClassVar[tuple[str, ...]]
    loader: ClassVar[str] = ""
    """Who loads the result, in words."""

    path: str = Field(min_length=1, description="where the result goes")

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        name_by_path(cls, _HERE)

    def ready(self) -> None:
        """Raise EffcError E550 at once when the consumer is not installed."""

    def refuses(self, model: Model) -> Sequence[Diagnostic]:
        """Everything about the model, possibly on meta, that the format cannot express."""
        return ()

    def names(self, model: Model) -> Mapping[str, str] | None:
        """Name in the safetensors -> tensor of the model, where `write` stores each as it is; else None."""
        return None

    def write(self, model: Model, place: Path) -> None:
        """Write a file or a new folder at `place`, which does not exist yet, weight by weight."""
        raise NotImplementedError

    def verify(self, place: Path, model: Model) -> Verdict:
        """Let the consumer load what was written. Raises EffcError E551 or E552."""
        raise NotImplementedError

    def alike(self, place: Path, model: Model, sources: Sequence[Model]) -> Verdict | None:
        """What can be said without a consumer where only numbers differ from a source; None to ask it."""
        return None

    def publish(self, model: Model, sources: Sequence[Model] = ()) -> Verdict:
        """Check, write aside, verify, then move to `path`; what was there is replaced only then.

        `sources` are the loaded models that the model was merged from, if no other stage made it.

        Raises:
            EffcError: E550-E553 as above, E561 when a folder is in the way that no export made, E601 when the
                disk is full, E602 when the place cannot be written.
        """
        self.ready()
        if problems := [d for d in self.refuses(model) if d.severity == "error"]:
            raise EffcError(*problems)
        target = Path(self.path)
        _refuse_foreign(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with returning(), aside(target) as folder:
                made = folder / target.name
                self.write(model.clone(), made)
                if made.is_dir():
                    put(made, self.kind, listed=self.kind != "artifact")
                verdict = self.alike(made, model, sources) or self._verified(made, model)
                _settle(made, target, folder / OLD)
        except OSError as problem:
            raise refused(problem, target) from problem
        return verdict

    def reread(self, place: Path, model: Model) -> tuple[str, float]:
        """Compare the files with the model, block by block, where no consumer can hold them.

        Returns what was compared, and the largest relative error that was found.

        Raises:
            EffcError: E414 to E418 for files that cannot be read, E443, E444 or E552 for other content.
        """
        raise NotImplementedError

    def _verified(self, place: Path, model: Model) -> Verdict:
        return self.verify(place, model.clone()) if _fits(model) else self._read_again(place, model)

    def _read_again(self, place: Path, model: Model) -> Verdict:
        """What can be said of a model that is too large for its consumer; the verdict says that none ran.

        A single file goes to its consumer all the same, which reads it piece by piece.
        """
        if place.is_file():
            return self.verify(place, model.clone())
        compared, error = self.reread(place, model)
        needed = fmt_bytes(CONSUMER * _bytes(model))
        remedy = f"`effc verify --deep {self.path}` does that where {needed} of memory are"
        left = f"too large here for {self.loader}, which has not loaded it ({remedy})"
        return Verdict(f"{left}; effc compared {compared}", error, 0.0)


CONSUMER = 2
"""Bytes that a consumer needs for each of the model's; some hold a copy in float32 for a while."""


def _fits(model: Model) -> bool:
    """Whether a consumer has room for the model beside the rest."""
    return CONSUMER * _bytes(model) <= memory_bytes()


def _bytes(model: Model) -> int:
    return sum(t.numel() * t.element_size() for t in model.tensors().values())


def probe(model: Model, rows: int = 2, length: int = 16) -> Tensor:
    """ids [rows, length] int64 to try a model on, or images [rows, C, h, w]; the same at every call."""
    embedding: Any = model.module("embedding")
    dice = torch.Generator().manual_seed(0)
    if isinstance(embedding, PatchEmbed):
        return torch.randn(rows, embedding.channels, embedding.image, embedding.image, generator=dice)
    return torch.randint(0, embedding.vocab, (rows, length), generator=dice)


def lost(model: Model) -> tuple[Diagnostic, ...]:
    """A warning that names the poolers and task heads that an export leaves behind; empty for none."""
    if not (names := left_behind(model)):
        return ()
    more = [f"and {len(names) - 6} more"] if len(names) > 6 else []
    return (
        Diagnostic(
            "W553",
            f"the export leaves {len(names)} tensors of the source behind: its pooler or task head",
            notes=("they were made for another width or vocabulary", *names[:6], *more),
            help="train a new head on the exported model",
            severity="warning",
        ),
    )


def continued(model: Model, ids: Tensor, greedy: Tensor) -> Tensor:
    """effc's logits [B, N, V] at the places where a consumer chose the tokens `greedy` [B, N]."""
    logits = computed(model, torch.cat([ids, greedy], 1)).float()
    return logits[:, ids.shape[1] - 1 : -1]


def _refuse_foreign(target: Path) -> None:
    """Replace only folders that carry the mark of an export, or are empty."""
    if target.is_dir() and not (target / MARK).is_file() and any(target.iterdir()):
        raise EffcError(
            Diagnostic(
                "E561",
                f"`{target}` is a folder that no export made",
                notes=("publishing there would remove what it holds",),
                help="export to another path, or move the folder away",
            )
        )


def _settle(made: Path, target: Path, old: Path) -> None:
    """Sync what was written and give it its name; a folder in the way moves aside first."""
    files = [made] if made.is_file() else [path for path in made.rglob("*") if path.is_file()]
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if target.is_dir():
        os.replace(target, old)
    os.replace(made, target)
    sync_folder(target.parent)
