"""A small random copy of a model: the same family, depth and tokenizer, narrow blocks, drawn weights."""

from __future__ import annotations

import math
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from effc.compiler.architecture import architecture, read_config
from effc.compiler.importer import build
from effc.compiler.model import Model
from effc.compiler.weights import LazyTensor

HEADS, HEAD_DIM, HIDDEN = 4, 16, 128
"""Sizes of a small copy; the width is HEADS * HEAD_DIM."""


def smaller(model: Model) -> Model:
    """A narrow copy of `model` with random weights; a model without an architecture file stays as it is."""
    if not model.architecture or not model.config:
        return model
    family = architecture(model.architecture)
    values = read_config(family, model.config)
    config: dict[str, Any] = dict(model.config)
    sizes = {"width": HEADS * HEAD_DIM, "heads": HEADS, "head_dim": HEAD_DIM, "hidden": HIDDEN}
    sizes["kv_heads"] = HEADS if values.get("kv_heads") == values.get("heads") else HEADS // 2
    for word, size in sizes.items():
        if key := family.writes.get(word):
            config[key] = size
    stored = next(t.dtype for t in model.tensors().values() if t.dtype.is_floating_point)
    small = build(family, config, stored)
    small.tokenizer = model.tokenizer
    small.weights = {name: _lazy(name, tensor) for name, tensor in small.tensors().items()}
    return small


def _lazy(name: str, tensor: Tensor) -> LazyTensor:
    shape, dtype = tuple(tensor.shape), tensor.dtype
    return LazyTensor(shape, dtype, partial(_drawn, name, shape, dtype))


def _drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values that keep activations of order one."""
    random = torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:8], "little") >> 1)
    if len(shape) == 1:
        return (torch.randn(shape, generator=random) * 0.1 + (not name.endswith(".bias"))).to(dtype)
    return (torch.randn(shape, generator=random) / math.sqrt(shape[-1])).to(dtype)
