"""A folder in Hugging Face layout, dense weights only, as transformers and everything built on it load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from effc.compiler.checkpoint_write import write_folder
from effc.compiler.emitted import emitted
from effc.compiler.exporter import inexpressible, stored_names, stored_tensors
from effc.compiler.importer import import_folder
from effc.compiler.model import Model
from effc.compiler.presence import computed
from effc.runtime.consumer import Answer, ask, need
from effc.runtime.exports._compared import same_config, same_form, same_layout, same_tensors
from effc.runtime.exports._export import Export, Verdict, lost, probe
from effc.specs.diagnostic import Diagnostic

TOLERANCE = 2e-5
"""Relative RMS of the logits in float32."""


class Hf(Export):
    """Write config.json, safetensors, tokenizer, generation settings and chat template.

    The config is the source's own with what changed. Weights are written dense: packed or factored ones are
    refused unless `dense = true`, which writes the numbers they stand for and gives up what packing saved.
    """

    loader = "transformers"
    examples: ClassVar[tuple[str, ...]] = ('hf("out/small")', 'hf("out/small", dense = true)')

    path: str = Field(min_length=1, description="the folder to write")
    dense: bool = Field(default=False, description="write packed, factored and adapted weights as dense ones")

    def ready(self) -> None:
        need("transformers")

    def refuses(self, model: Model) -> Sequence[Diagnostic]:
        why = inexpressible(model, self.dense)
        if not why:
            return lost(model)
        fits = "artifact holds every model that effc can make"
        if not self.dense and not inexpressible(model, dense=True):
            packed = "compressed_tensors and gguf hold packed weights, artifact everything"
            fits = f"{packed}; `dense = true` writes them dense, at full size"
        return [Diagnostic("E553", "`hf` cannot express this model", notes=tuple(why), help=fits)]

    def names(self, model: Model) -> Mapping[str, str] | None:
        return None if inexpressible(model) else stored_names(model)

    def write(self, model: Model, place: Path) -> None:
        place.mkdir()
        (place / "config.json").write_text(json.dumps(emitted(model), indent=2) + "\n", encoding="utf-8")
        for name, content in (model.tokenizer.files if model.tokenizer else {}).items():
            (place / name).write_bytes(content)
        write_folder(place, stored_tensors(model))

    def verify(self, place: Path, model: Model) -> Verdict:
        """transformers loads the folder in a fresh process and computes the same."""
        ids = probe(model)
        want = computed(model, ids, torch.float32)
        return Verdict.of(ask("transformers", place, ids), want, self._tolerance(model))

    def alike(self, place: Path, model: Model, sources: Sequence[Model]) -> Verdict | None:
        """Header, index and config against what is due, where a source has the same names, shapes, dtypes."""
        due = stored_tensors(model)
        for source in sources:
            if (folder := same_form(source, emitted(model), due)) is not None:
                same_config(place / "config.json", emitted(model))
                same_layout(place, due)
                rest = f"`effc verify --deep {self.path}` runs transformers"
                return Verdict(f"header, index and config, equal to those of {folder} ({rest})", 0.0, 0.0)
        return None

    def reread(self, place: Path, model: Model) -> tuple[str, float]:
        """Config, headers, index and every number with what was due, and the logits as effc reads them."""
        same_config(place / "config.json", emitted(model))
        same_tensors(place, stored_tensors(model))
        ids = probe(model)
        again = Answer(computed(import_folder(place), ids, torch.float32), ids[:, :0], "effc")
        verdict = Verdict.of(again, computed(model, ids, torch.float32), self._tolerance(model))
        return "config, header, index, every tensor and the logits", verdict.error

    def _tolerance(self, model: Model) -> float:
        """Packed weights written dense in half precision are rounded once more."""
        return 2e-2 if self.dense and inexpressible(model) else TOLERANCE
