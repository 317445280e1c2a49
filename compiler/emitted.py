"""The config.json that a model would be written with: its source's, with what stages changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effc.compiler.architecture import Architecture, architecture, read_config
from effc.compiler.blocks import MLP, Attention, Embedding, MoE
from effc.compiler.kin import written_as
from effc.compiler.model import Model


def emitted(model: Model) -> dict[str, Any]:
    """config.json of the model: the source's, with the sizes that stages changed.

    Raises:
        EffcError: E430 for a model without a known architecture, E432 when the source's config is not read.
    """
    family, config = written_as(model)
    before = read_config(family, config)
    for word, value in _sizes(model).items():
        key = family.writes.get(word)
        if key is not None and word in before and before[word] != value:
            config[key] = value
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][: model.layers]
        config["layer_types"] += ["full_attention"] * (model.layers - len(config["layer_types"]))
    if "window" in before:
        windows = [block.window for block in _each(model, Attention)]
        if len(windows) == model.layers and read_config(family, config)["window"] != windows:
            config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    dtype = str(main_dtype(model)).removeprefix("torch.")
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = dtype
    config["architectures"] = [_written(family, config, bool(model.beside) and not left_behind(model))]
    for key in ("auto_map", "quantization_config", "_name_or_path"):
        config.pop(key, None)
    return config


def left_behind(model: Model) -> list[str]:
    """Poolers and task heads of the source that no longer fit the model; empty when all can be written.

    They fit as long as the hidden states and the vocabulary have their sizes.
    """
    if not model.beside:
        return []
    values = read_config(architecture(model.architecture), model.config)
    embedding = model.module("embedding")
    sizes = {word: getattr(embedding, word, None) for word in ("width", "vocab") if word in values}
    return sorted(model.beside) if any(values[word] != size for word, size in sizes.items()) else []


def main_dtype(model: Model) -> torch.dtype:
    """The dtype of the norms, which no stage packs; else that of the first floating tensor."""
    floating = {n: t.dtype for n, t in model.tensors().items() if t.is_floating_point()}
    return next((d for n, d in floating.items() if "norm" in n), next(iter(floating.values()), torch.float32))


def _sizes(model: Model) -> dict[str, Any]:
    """Our words -> sizes as the blocks have them, the first block's where they differ."""
    sizes: dict[str, Any] = {"layers": model.layers}
    for attention in _each(model, Attention)[:1]:
        sizes |= {"heads": attention.heads, "kv_heads": attention.kv_heads, "head_dim": attention.head_dim}
    for mlp in _each(model, MLP)[:1]:
        sizes["hidden"] = mlp.hidden
    for moe in _each(model, MoE)[:1]:
        sizes |= {"hidden": moe.hidden, "experts": moe.n_experts, "active": moe.active}
    for embedding in _each(model, Embedding)[:1]:
        sizes["vocab"] = embedding.vocab
    if "head" in dict(model.gm.named_children()):
        ties = model.ties()
        sizes["tied"] = any(a.startswith("head.") and o.startswith("embedding.") for a, o in ties.items())
    return sizes


def _each(model: Model, kind: type[Any]) -> list[Any]:
    """Blocks of a kind, in the order in which the graph calls them."""
    called = (model.module(str(n.target)) for n in model.gm.graph.nodes if n.op == "call_module")
    return [block for block in called if isinstance(block, kind)]


def _written(family: Architecture, config: Mapping[str, Any], whole: bool) -> str:
    """The class that transformers makes: the source's own where the weights written are all it has.

    `whole`: the source's task head is written too.
    """
    named = config.get("architectures")
    headless = {c for c in family.classes if c.endswith("Model") and not c.endswith("LMHeadModel")}
    if isinstance(named, list) and named and named[0] in family.classes:
        if not family.encoder and named[0] in headless:
            return family.classes[0]
        return family.classes[0] if family.encoder and not whole else str(named[0])
    return family.classes[0]
