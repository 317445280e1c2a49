"""A decoder of the llama family as GGUF: what it can express, hyperparameters, tensors in order.

Shapes: W [o, i], H heads of width h. llama.cpp rotates neighboring pairs in llama models, Hugging Face the
two halves of a head; so rows of q and k are reordered, [H, 2, h/2] -> [H, h/2, 2].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm, QuantLinear
from effc.compiler.blocks.quant_linear import Packed, QuantEmbedding
from effc.compiler.model import Model
from effc.specs.diagnostic import Diagnostic

Array = NDArray[Any]

NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architecture -> llama.cpp's name of it."""
BLOCK = 32
"""Weights that share a scale in Q4_0 and Q8_0."""

_LAYER = {
    "norm1": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "norm2": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_OUTSIDE = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file."""

    name: str
    path: str
    module: nn.Module
    slot: str
    """`weight` or `bias`"""
    heads: int
    """Heads whose rows are reordered; 0 for none."""


def entries(model: Model) -> Iterator[Entry]:
    """Every tensor in the order it is written; a tied head is left out, as llama.cpp expects."""
    ties = model.ties()
    turned = NAMES[model.architecture] == "llama"
    for path, short in _OUTSIDE.items():
        if path == "head" and any(alias.startswith("head.") for alias in ties):
            continue
        yield Entry(f"{short}.weight", path, model.module(path), "weight", 0)
    for layer in range(model.layers):
        attention: Any = model.module(f"layers.{layer}.attention")
        for path, short in _LAYER.items():
            if path.endswith("_norm") and not attention.qk_norm:
                continue
            full = f"layers.{layer}.{path}"
            module = model.module(full)
            heads = {"attention.q": attention.heads, "attention.k": attention.kv_heads}.get(path, 0)
            for slot in ("weight", "bias"):
                if slot == "weight" or getattr(module, "bias", None) is not None:
                    yield Entry(f"blk.{layer}.{short}.{slot}", full, module, slot, heads if turned else 0)


def kind_of(entry: Entry, wanted: str) -> str:
    """The stored type of one tensor: F32 for vectors, what is packed as it is packed, else what is wanted."""
    if entry.slot == "bias" or isinstance(entry.module, Norm):
        return "F32"
    if isinstance(entry.module, Packed):
        return "Q4_0" if entry.module.bits == 4 else "Q8_0"
    if wanted == "q4_0" and entry.name in ("token_embd.weight", "output.weight"):
        return "Q8_0"  # tables and heads suffer most and llama.cpp keeps them wider, too
    return {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}[wanted]


def numbers(entry: Entry, kind: str) -> Array:
    """The bytes of a tensor in its stored type: float arrays as such, blocks as uint8 [o, bytes]."""
    module = entry.module
    if entry.slot == "weight" and isinstance(module, Packed):
        q, scale, _ = module.unpack()
        return _blocks(_turned(q, entry.heads), _turned(scale, entry.heads), kind)
    values = getattr(module, entry.slot).detach()
    if isinstance(module, Norm) and entry.slot == "weight":
        values = values.float() + module.offset
    whole: Array = _turned(values.float(), entry.heads).numpy()
    if kind in ("F32", "F16"):
        return whole.astype(np.float32 if kind == "F32" else np.float16)
    import gguf

    packed: Array = gguf.quants.quantize(whole, gguf.GGMLQuantizationType[kind])
    return packed


def _turned(rows: Tensor, heads: int) -> Tensor:
    """Halves of each head -> neighboring pairs, along the rows."""
    if not heads:
        return rows
    pairs: Tensor = rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)
    return pairs


def returned(rows: Tensor, heads: int) -> Tensor:
    """The inverse of what `numbers` did to the rows."""
    if not heads:
        return rows
    halves: Tensor = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
    return halves


def _blocks(q: Tensor, scale: Tensor, kind: str) -> Array:
    """q [o, i] int8, scale [o, i/32] -> [o, bytes]: a half-precision scale, then the codes of its group."""
    rows, groups = scale.shape
    head = scale.to(torch.float16).contiguous().view(torch.uint8).reshape(rows, groups, 2)
    codes = q.reshape(rows, groups, BLOCK)
    if kind == "Q8_0":
        body = codes.contiguous().view(torch.uint8)
    else:
        wide = (codes.to(torch.int16) + 8).to(torch.uint8)
        body = wide[..., : BLOCK // 2] | (wide[..., BLOCK // 2 :] << 4)
    out: Array = torch.cat([head, body], -1).reshape(rows, -1).numpy()
    return out


def hyperparameters(model: Model) -> dict[str, Any]:
    """Key below the architecture -> value."""
    attention: Any = model.module("layers.0.attention")
    norm: Any = model.module("norm")
    embedding: Any = model.module("embedding")
    mlp: Any = model.module("layers.0.mlp")
    rope = attention.rope
    found: dict[str, Any] = {
        "vocab_size": embedding.vocab,
        "context_length": int(model.config.get("max_position_embeddings", 2048)),
        "embedding_length": attention.width,
        "block_count": model.layers,
        "feed_forward_length": mlp.hidden,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": float(norm.eps),
        "rope.dimension_count": attention.head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope.get("rope_type", "default") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return found


def problems(model: Model, wanted: str) -> Iterator[Diagnostic]:
    """Everything about the model that the format, as llama.cpp reads it, cannot express."""
    if model.architecture not in NAMES:
        known = ", ".join(NAMES)
        yield _cannot(f"the architecture {model.architecture or '(none)'}; it knows {known}")
        return
    other: dict[str, list[str]] = {}
    for path, unit in model.units():
        if why := _unfit(unit, wanted, model):
            other.setdefault(why, []).append(path)
    for why, paths in other.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield _cannot(f"`{paths[0]}`{more}: {why}")
    for what, values in _uneven(model).items():
        if len(values) > 1:
            yield _cannot(f"layers with different {what} ({', '.join(map(str, sorted(values)))})")


def _unfit(unit: nn.Module, wanted: str, model: Model) -> str | None:
    """Why a unit cannot be written, in words; None when it can."""
    match unit:
        case QuantEmbedding() | QuantLinear():
            fits = (
                unit.bits in (4, 8)
                and unit.group == BLOCK
                and unit.symmetric
                and unit.scales.dtype == torch.float16
            )
            if not fits:
                takes = "GGUF takes 4 or 8 bits, group = 32, symmetric, scale = fp16"
                return f"{unit.bits} bits in groups of {unit.group}; {takes}"
        case Linear() | Embedding():
            inputs = getattr(unit, "in_features", 0) or getattr(unit, "width", 0)
            if wanted != "f16" and inputs % BLOCK:
                return f"rows of {inputs} do not divide into blocks of {BLOCK}; type = f16 can hold them"
            if isinstance(unit, Embedding) and unit.scale != 1.0:
                return "a scaled embedding"
        case Attention() if type(unit) is Attention:
            rope = unit.rope or {}
            context = int(model.config.get("max_position_embeddings", 2048))
            if rope.get("rope_type", "default") not in ("default", "linear") or not rope:
                return f"positions of type {rope.get('rope_type', 'none')}"
            if (
                rope.get("partial_rotary_factor", 1.0) != 1.0
                or unit.cap is not None
                or unit.scale is not None
            ):
                return "attention with a cap, a scale of its own or partly rotated heads"
            if unit.window is not None and unit.window < context:
                return f"a window of {unit.window} keys, smaller than the context of {context}"
        case MLP():
            if not unit.gated or unit.activation != "silu":
                return f"an MLP with {unit.activation}; the format's has a gate with silu"
        case Norm():
            if unit.form != "rms":
                return "layer normalization"
        case _:
            return f"a block of type {type(unit).__name__}"
    return None


def _uneven(model: Model) -> dict[str, set[Any]]:
    """Sizes that must be the same in every layer."""
    found: dict[str, set[Any]] = {}
    for _, unit in model.units():
        if isinstance(unit, Attention):
            found.setdefault("heads", set()).add((unit.heads, unit.kv_heads, unit.head_dim))
        if isinstance(unit, MLP):
            found.setdefault("hidden widths", set()).add(unit.hidden)
    return found


def _cannot(what: str) -> Diagnostic:
    return Diagnostic(
        "E553",
        "`gguf` cannot express this model",
        notes=(what,),
        help="artifact holds every model effc can make",
    )
