"""Lift: torch's own modules become units where both compute the same, so that methods and JSON know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effc.compiler.blocks import Linear, Norm, Table, Unit


def lifted(module: nn.Module) -> Unit | None:
    """The unit that holds this module's own tensors and computes the same; None when there is none.

    Only exact types: a subclass may compute something else, and hooks would be lost.
    """
    make = _UNITS.get(type(module))
    if make is None or module._forward_hooks or module._forward_pre_hooks:
        return None
    unit = make(module)
    if unit is not None:
        for name, tensor in module._parameters.items():
            unit._parameters[name] = tensor
        unit.train(module.training)
    return unit


def lift_all(root: nn.Module) -> list[str]:
    """Put units in place of every module below `root` that has one; gives their paths."""
    done: dict[int, Unit] = {}
    paths: list[str] = []
    for path, parent in list(root.named_modules(remove_duplicate=False)):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            unit = done.get(id(child)) or lifted(child)
            if unit is not None:
                done[id(child)] = unit
                parent._modules[name] = unit
                paths.append(f"{path}.{name}" if path else name)
    return paths


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _linear(module: Any) -> Unit:
    return Linear(
        in_features=module.in_features,
        out_features=module.out_features,
        bias=module.bias is not None,
        dtype=_dtype(module.weight),
    )


def _layer_norm(module: Any) -> Unit | None:
    if len(module.normalized_shape) != 1 or not module.elementwise_affine:
        return None
    bias = module.bias is not None
    return Norm(
        width=module.normalized_shape[0],
        eps=module.eps,
        form="layer",
        bias=bias,
        dtype=_dtype(module.weight),
    )


def _rms_norm(module: Any) -> Unit | None:
    if len(module.normalized_shape) != 1 or not module.elementwise_affine:
        return None
    eps = module.eps if module.eps is not None else torch.finfo(module.weight.dtype).eps
    return Norm(width=module.normalized_shape[0], eps=eps, dtype=_dtype(module.weight))


def _embedding(module: Any) -> Unit | None:
    if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        return None
    return Table(rows=module.num_embeddings, width=module.embedding_dim, dtype=_dtype(module.weight))


_UNITS: dict[type, Callable[[Any], Unit | None]] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.Embedding: _embedding,
}
