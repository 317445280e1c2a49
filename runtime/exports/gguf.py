"""A GGUF file for llama.cpp and what builds on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.model import Model
from effc.compiler.presence import cast_lazily, computed, loaded
from effc.compiler.weights import LazyTensor
from effc.runtime.consumer import ask, need
from effc.runtime.exports import _gguf_model as layout
from effc.runtime.exports import _gguf_tokens as tokens
from effc.runtime.exports._export import Export, Verdict, continued, probe
from effc.specs.diagnostic import Diagnostic

TOLERANCE = {"F32": 5e-3, "F16": 5e-3, "Q8_0": 4e-2, "Q4_0": 6e-2}
"""Largest relative RMS of llama.cpp's logits against effc's on the same stored weights. llama.cpp rounds
activations to half precision or to 8 bits in groups of 32, which effc does not."""


class Gguf(Export):
    """Write one file with weights, hyperparameters and tokenizer; llama, mistral, qwen2 and qwen3 layouts.

    Weights packed in 4 or 8 bits, symmetric, in groups of 32 with half-precision scales are written without
    loss as Q4_0 or Q8_0. Dense weights become `type`; in q4_0, embedding and head become Q8_0.
    """

    examples: ClassVar[tuple[str, ...]] = ('gguf("out/small.gguf")', 'gguf("out/small.gguf", type = q8_0)')

    path: str = Field(min_length=1, description="the file to write")
    type: Literal["f16", "q8_0", "q4_0"] = Field(default="f16", description="how dense weights are stored")

    def refuses(self, model: Model) -> Sequence[Diagnostic]:
        found = list(layout.problems(model, self.type))
        return [*found, *tokens.problems(model.tokenizer.files if model.tokenizer else {})]

    def ready(self) -> None:
        need("llama_cpp")

    def write(self, model: Model, place: Path) -> None:
        """Stream the tensors into the file at `place`, one in memory at a time."""
        import gguf

        assert model.tokenizer is not None
        file = gguf.GGUFWriter(place, layout.NAMES[model.architecture])
        found = layout.hyperparameters(model)
        for key, value in found.items():
            _add(file, f"{layout.NAMES[model.architecture]}.{key}", value)
        for key, value in tokens.metadata(model.tokenizer.files, found["vocab_size"]).items():
            _add(file, f"tokenizer.{key}", value)
        file.add_quantization_version(gguf.GGML_QUANT_VERSION)
        file.add_file_type({"f16": 1, "q8_0": 7, "q4_0": 2}[self.type])
        listed = list(layout.entries(model))
        for entry in listed:
            kind = gguf.GGMLQuantizationType[layout.kind_of(entry, self.type)]
            shape = _shape(entry)
            count, size = gguf.GGML_QUANT_SIZES[kind]
            file.add_tensor_info(entry.name, shape, np.dtype(np.float32), _count(shape) // count * size, kind)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_ti_data_to_file()
        for entry in listed:
            whole = replace(entry, module=loaded(model, entry.path))
            file.write_tensor_data(layout.numbers(whole, layout.kind_of(entry, self.type)))
        file.close()

    def verify(self, place: Path, model: Model) -> Verdict:
        """llama.cpp continues a probe with the tokens that effc chooses on the very weights of the file."""
        reference = stored(place, model)
        ids = probe(model)
        answer = ask("llama_cpp", place, ids, new_tokens=8)
        want = computed(reference, ids).float()
        allowed = max(TOLERANCE[layout.kind_of(entry, self.type)] for entry in layout.entries(model))
        return Verdict.of(answer, want, allowed, continued(reference, ids, answer.greedy))


def stored(place: Path, model: Model) -> Model:
    """The model with the weights that the file holds, rounded as they were written, read when needed."""
    import gguf

    kept = {tensor.name: tensor for tensor in gguf.GGUFReader(place).tensors}
    reference = cast_lazily(model, torch.float32)
    for entry in layout.entries(model):
        if isinstance(entry.module, Packed) and entry.slot == "weight":
            continue
        name = f"{entry.path}.{entry.slot}"
        read = partial(_numbers, place, kept[entry.name], entry)
        owner = reference.ties().get(name, name)
        tensor = reference.tensors()[owner]
        reference.weights[owner] = LazyTensor(tuple(tensor.shape), torch.float32, read)
        reference.place(name, torch.empty_like(tensor, device="meta"))
    return reference


def _numbers(place: Path, tensor: Any, entry: layout.Entry) -> Tensor:
    """One tensor of the file in float32, read past the map of the reader, which would count as resident."""
    import gguf

    raw = np.fromfile(place, np.uint8, count=int(tensor.n_bytes), offset=int(tensor.data_offset))
    data = raw.view(tensor.data.dtype).reshape(tensor.data.shape)
    numbers = gguf.quants.dequantize(data, tensor.tensor_type)
    rows = layout.returned(torch.from_numpy(np.array(numbers, np.float32)), entry.heads)
    if isinstance(entry.module, Norm) and entry.slot == "weight":
        rows = rows - entry.module.offset
    return rows.float()


def _shape(entry: layout.Entry) -> tuple[int, ...]:
    module = entry.module
    if entry.slot == "weight" and isinstance(module, Packed):
        return (module.rows, module.in_features)
    tensor: Tensor = getattr(module, entry.slot)
    return tuple(tensor.shape)


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _add(file: object, key: str, value: object) -> None:
    """Add one value under the type that llama.cpp expects of it."""
    kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    getattr(file, kinds[type(value)])(key, value)
