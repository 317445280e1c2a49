"""A folder with packed weights that transformers and vLLM load through compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from effc.compiler.architecture import architecture
from effc.compiler.blocks import Linear, LoraLinear, QuantLinear
from effc.compiler.blocks.quant_linear import WHOLE, Packed
from effc.compiler.checkpoint_write import write_folder
from effc.compiler.emitted import emitted
from effc.compiler.exporter import inexpressible, stored_tensors
from effc.compiler.model import Model
from effc.compiler.packing import pack
from effc.compiler.presence import computed, loaded
from effc.compiler.sharing import cloned
from effc.compiler.weights import LazyTensor
from effc.runtime.consumer import ask, need
from effc.runtime.exports._compared import same_config, same_tensors
from effc.runtime.exports._export import Export, Verdict, lost, probe
from effc.runtime.exports._names import spots
from effc.specs.diagnostic import Diagnostic

TOLERANCE = 1e-3
"""Relative RMS of the logits."""


class CompressedTensors(Export):
    """Write the source's layout with each packed linear as int32 words, scales and zero points, without loss.

    1 to 8 bits, per channel or in groups, symmetric or not; what is dense stays dense.
    """

    loader = "transformers"
    examples: ClassVar[tuple[str, ...]] = ('compressed_tensors("out/small-hf")',)

    path: str = Field(min_length=1, description="the folder to write")

    def ready(self) -> None:
        need("compressed_tensors")

    def refuses(self, model: Model) -> Sequence[Diagnostic]:
        if found := inexpressible(model, dense=True):
            return [_cannot(*found)]
        units = dict(model.units())
        if not any(isinstance(unit, Packed) for unit in units.values()):
            help = "quantize first, or export as hf"
            return [Diagnostic("E553", f"`{self.kind}` needs packed weights, and none are", help=help)]
        other: dict[str, list[str]] = {}
        for path, unit in units.items():
            if why := self._unfit(path, unit, model):
                other.setdefault(why, []).append(path)
        kinds = {_kind(unit) for unit in units.values() if isinstance(unit, QuantLinear)}
        if _shifted(kinds) and len(kinds) > 1:
            mixed = "weights with zero points beside weights packed in another way; transformers takes one"
            return [_cannot(mixed)]
        return [_cannot(f"{', '.join(paths[:4])}: {why}") for why, paths in other.items()] or list(
            lost(model)
        )

    def _unfit(self, path: str, unit: torch.nn.Module, model: Model) -> str | None:
        if isinstance(unit, LoraLinear):
            return "an adapter; fold it before quantizing"
        if not isinstance(unit, Packed):
            return None
        if not isinstance(unit, QuantLinear):
            return f"{type(unit).__name__}; the format packs linears alone; do not quantize it"
        if unit.group == WHOLE:
            return "one scale for the whole tensor; use group = channel or a number"
        spot = spots(model).get(path)
        if spot is None or spot.parts:
            return f"{model.architecture} stores it in one matrix with others"
        if any(name.startswith(f"{path}.") for pair in model.ties().items() for name in pair):
            return "its weights are shared with another module"
        return None

    def write(self, model: Model, place: Path) -> None:
        config, tensors = self._contents(model)
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, content in (model.tokenizer.files if model.tokenizer else {}).items():
            (place / name).write_bytes(content)
        write_folder(place, tensors)

    def _contents(self, model: Model) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
        """The config, and the tensors by their names on disk."""
        names = {path: spot.name for path, spot in spots(model).items()}
        tensors = stored_tensors(model)
        for path, unit in model.units():
            if isinstance(unit, QuantLinear):
                del tensors[f"{names[path]}.weight"]
                tensors |= {f"{names[path]}.{key}": lazy for key, lazy in _lazy(model, path, unit)}
        return emitted(model) | {"quantization_config": settings(model, names)}, tensors

    def reread(self, place: Path, model: Model) -> tuple[str, float]:
        """Config, headers, index, and every number with what was due."""
        config, tensors = self._contents(model)
        same_config(place / "config.json", config)
        same_tensors(place, tensors)
        return "config, header, index and every tensor", 0.0

    def verify(self, place: Path, model: Model) -> Verdict:
        ids = probe(model)
        want = computed(model, ids, torch.float32)
        return Verdict.of(ask("compressed_tensors", place, ids), want, TOLERANCE)


def _cannot(*why: str) -> Diagnostic:
    help = "artifact holds every model that effc can make"
    return Diagnostic("E553", "`compressed_tensors` cannot express this model", notes=why, help=help)


def words(unit: QuantLinear) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one linear as pack-quantized names them.

    Codes lie in the same bit stream as ours, padded to whole words: packed [o, ceil(i b / 32)] int32. Zero
    points are packed along the rows: [ceil(o b / 32), G].
    """
    yield "weight_packed", _words(unit.packed)
    _, scale, zero = unit.unpack()
    yield "weight_scale", scale.clone()
    yield "weight_shape", torch.tensor([unit.rows, unit.in_features])
    if zero is not None:
        codes = (zero.t().to(torch.int16) + (1 << (unit.bits - 1))).to(torch.uint8)
        yield "weight_zero_point", _words(pack(codes.contiguous(), unit.bits)).t().contiguous()
    bias = unit._parameters.get("bias")
    if bias is not None:
        yield "bias", bias.detach()


def _lazy(model: Model, path: str, unit: QuantLinear) -> Iterator[tuple[str, LazyTensor]]:
    """The same, made when it is read: shapes follow from the unit, numbers from where its weights lie."""

    def reader(key: str) -> Callable[[], Tensor]:
        return lambda: dict(words(cast(QuantLinear, loaded(model, path))))[key]

    for key, tensor in words(cast(QuantLinear, cloned(unit, {}).to("meta"))):
        yield key, LazyTensor(tuple(tensor.shape), tensor.dtype, reader(key))


def _words(stream: Tensor) -> Tensor:
    """Bytes [R, n] -> little-endian words [R, ceil(n / 4)] int32"""
    return F.pad(stream, (0, -stream.shape[1] % 4)).flatten().view(torch.int32).view(len(stream), -1)


def _kind(unit: QuantLinear) -> tuple[int, int, bool]:
    """Bits, inputs that share a scale (0: all of a row), symmetric."""
    return unit.bits, 0 if unit.group == unit.in_features else unit.group, unit.symmetric


def settings(model: Model, names: dict[str, str]) -> dict[str, Any]:
    """The `quantization_config`: a group for each kind of packing, and the linears that stay dense."""
    groups: dict[tuple[int, int, bool], list[str]] = {}
    ignored: list[str] = []
    for path, unit in model.units():
        if isinstance(unit, QuantLinear):
            groups.setdefault(_kind(unit), []).append(names[path])
        elif isinstance(unit, Linear) and path in names:
            ignored.append(names[path])
    prefix = architecture(model.architecture).prefix
    for module in dict.fromkeys(name.rpartition(".")[0] for name in model.beside):
        ignored += dict.fromkeys((module, module.removeprefix(prefix)))  # as a part and as the whole
    return {
        "quant_method": "compressed-tensors",
        **({"dequantize": True} if _shifted(groups) else {}),
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            f"group_{number}": {
                "targets": sorted(targets) if len(groups) > 1 else ["Linear"],
                "weights": _weights(*kind),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for number, (kind, targets) in enumerate(sorted(groups.items()))
        },
    }


def _shifted(groups: Iterable[tuple[int, int, bool]]) -> bool:
    """Whether some weights have zero points. transformers loads those only dequantized, and is told so."""
    return not all(symmetric for _, _, symmetric in groups)


def _weights(bits: int, group: int, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
