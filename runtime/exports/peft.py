"""A folder with the adapters alone, which peft puts on the model they were trained on."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from effc.compiler.blocks import LoraLinear
from effc.compiler.checkpoint_write import write_file, write_folder
from effc.compiler.emitted import emitted
from effc.compiler.exporter import inexpressible, stored_tensors
from effc.compiler.model import Model
from effc.compiler.presence import cast_lazily, computed
from effc.compiler.rewrite import Rewriter
from effc.compiler.weights import LazyTensor, resident
from effc.runtime.adapter import CONFIG, WEIGHTS
from effc.runtime.consumer import ask, need
from effc.runtime.exports._compared import same_config, same_tensors
from effc.runtime.exports._export import Export, Verdict, probe
from effc.runtime.exports._names import spots
from effc.specs.diagnostic import Diagnostic

TOLERANCE = 1e-4
"""Relative RMS of the logits, in float32 on both sides."""


class Peft(Export):
    """Write adapter_config.json and adapter_model.safetensors, as peft's `save_pretrained` does.

    The weights beneath are not written. Verified on a float32 copy of them, unpacked where they are packed.
    """

    loader = "peft"
    examples: ClassVar[tuple[str, ...]] = ('peft("out/lora")',)

    path: str = Field(min_length=1, description="the folder to write")

    def ready(self) -> None:
        need("peft")

    def refuses(self, model: Model) -> Sequence[Diagnostic]:
        if found := inexpressible(model, dense=True):
            return [_cannot(*found)]
        places = spots(model)
        units = adapters(model)
        if not units:
            help = "train one with adapt.lora, or export the model as hf"
            return [Diagnostic("E464", f"`{self.kind}` needs an adapter, and the model has none", help=help)]
        shared = [path for path in units if path not in places or places[path].parts]
        if shared:
            why = f"{', '.join(shared[:4])}: {model.architecture} stores them in one matrix with others"
            return [_cannot(why)]
        return ()

    def write(self, model: Model, place: Path) -> None:
        told, tensors = self._contents(model)
        place.mkdir()
        (place / CONFIG).write_text(json.dumps(told, indent=2) + "\n")
        write_file(place / WEIGHTS, tensors)

    def _contents(self, model: Model) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
        """The settings, and the factors by their names on disk."""
        units = adapters(model)
        names = {path: spot.name for path, spot in spots(model).items()}
        told = settings({names[path]: unit for path, unit in units.items()}, list(names.values()), model)
        return told, {
            f"base_model.model.{names[path]}.lora_{factor}.weight": _lazy(model, f"{path}.{factor.lower()}")
            for path in units
            for factor in ("A", "B")
        }

    def verify(self, place: Path, model: Model) -> Verdict:
        """peft puts the adapter on the model's own weights, written for it in the layout of transformers."""
        ids = probe(model)
        want = computed(model, ids, torch.float32)
        with tempfile.TemporaryDirectory(prefix="effc-base-") as work:
            base = Path(work) / "base"
            below = bare(cast_lazily(model, torch.float32))
            base.mkdir()
            (base / "config.json").write_text(json.dumps(emitted(below)), encoding="utf-8")
            write_folder(base, stored_tensors(below))
            answer = ask("peft", place, ids, base=base)
        return Verdict.of(answer, want, TOLERANCE)

    def reread(self, place: Path, model: Model) -> tuple[str, float]:
        """Settings, header, and every factor with what was due."""
        told, tensors = self._contents(model)
        same_config(place / CONFIG, told)
        same_tensors(place / WEIGHTS, tensors)
        return "settings, header and every factor", 0.0


def _lazy(model: Model, name: str) -> LazyTensor:
    tensor = model.tensors()[name]
    return model.weights[name] if tensor.is_meta else resident(tensor.detach())


def _cannot(*why: str) -> Diagnostic:
    help = "artifact holds every model that effc can make; adapt.fold and hf write the sum"
    return Diagnostic("E553", "`peft` cannot express this model", notes=why, help=help)


def adapters(model: Model) -> dict[str, LoraLinear]:
    """Canonical path -> adapter."""
    return {path: unit for path, unit in model.units() if isinstance(unit, LoraLinear)}


def settings(units: dict[str, LoraLinear], names: Sequence[str], model: Model) -> dict[str, Any]:
    """adapter_config.json: names on disk -> adapters; `names` are those of all modules."""
    root = all(unit.scaling == "sqrt_rank" for unit in units.values())
    alphas = {n: u.alpha if root or u.scaling == "rank" else u.factor * u.rank for n, u in units.items()}
    rank = Counter(unit.rank for unit in units.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if "head" in model.roles else "FEATURE_EXTRACTION",
        "base_model_name_or_path": str(model.config.get("_name_or_path") or "") or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(unit.dropout for unit in units.values()),
        "use_rslora": root,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _targets(list(units), names),
        "rank_pattern": {name: unit.rank for name, unit in units.items() if unit.rank != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _targets(adapted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Last parts of names where all modules of that name are adapted, else whole names."""
    inside = set(adapted)
    found: set[str] = set()
    for name in adapted:
        last = name.rpartition(".")[2]
        alike = [n for n in names if n.rpartition(".")[2] == last]
        found.add(last if inside.issuperset(alike) else name)
    return sorted(found)


def bare(model: Model) -> Model:
    """The model without adapters."""
    rw = Rewriter(model)
    for path, unit in adapters(model).items():
        rw.swap(path, rw.module(path).base, f"without its adapter of rank {unit.rank}")
    return rw.done()
