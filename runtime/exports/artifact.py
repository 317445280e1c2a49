"""effc's own format: a folder with the packed weights, the graph, and how the model came to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field, PrivateAttr

from effc.compiler.graph_json import to_json
from effc.compiler.model import Model
from effc.compiler.presence import computed
from effc.runtime import artifact
from effc.runtime.consumer import Answer, ask
from effc.runtime.exports._export import Export, Verdict, probe
from effc.specs.diagnostic import Diagnostic, EffcError

TOLERANCE = 1e-6
"""Relative RMS; the same code reads the same numbers."""


class Artifact(Export):
    """Write a folder NAME.effc: safetensors, structure, recipe, lock, edits, report, tokenizer, manifest.

    `effc run`, `bench`, `show`, `diff` and `verify` take it, and `load` reads it into another recipe.
    """

    loader = "a fresh process"
    examples: ClassVar[tuple[str, ...]] = ('artifact("out/small.effc")',)

    path: str = Field(min_length=1, description="the folder to write, by custom NAME.effc")
    _story: artifact.Story | None = PrivateAttr(None)

    def telling(self, story: artifact.Story) -> Artifact:
        """The same export, which also writes how the model came to be."""
        told = self.model_copy()
        told._story = story
        return told

    def refuses(self, model: Model) -> Sequence[Diagnostic]:
        try:
            to_json(model)
        except EffcError as problem:
            return problem.diagnostics
        return ()

    def names(self, model: Model) -> Mapping[str, str]:
        return {name: name for name in model.tensors()}

    def write(self, model: Model, place: Path) -> None:
        artifact.write(model, place, self._story)

    def verify(self, place: Path, model: Model) -> Verdict:
        """A fresh process loads the folder and computes the same logits."""
        if changed := artifact.check(place):
            raise EffcError(*changed)
        ids = probe(model)
        want = computed(model, ids).float()
        return Verdict.of(ask("effc", place, ids), want, TOLERANCE)

    def reread(self, place: Path, model: Model) -> tuple[str, float]:
        """The hash of every file, structure, headers and index against each other, and the logits."""
        if changed := artifact.check(place):
            raise EffcError(*changed)
        ids = probe(model)
        again = Answer(computed(artifact.read(place), ids).float(), ids[:, :0], "effc")
        verdict = Verdict.of(again, computed(model, ids).float(), TOLERANCE)
        return "hashes, header, index, structure and logits, block by block", verdict.error
