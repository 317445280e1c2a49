"""Presence: the weights of a few modules in memory for a while, of a model that may be larger than memory.

Shapes: ids [B, T] int64 -> logits [B, T, V] of a decoder, hidden states [B, T, D] of an encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from effc.compiler.model import Model
from effc.compiler.sharing import cloned, put
from effc.compiler.weights import LazyTensor


def owners_below(model: Model, blocks: Sequence[str]) -> list[str]:
    """Names of the tensors that blocks use; a tied one under its owner's name."""
    ties = model.ties()
    found = []
    for block in blocks:
        module = model.module(block)
        inner = (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        found += [ties.get(f"{block}.{name}", f"{block}.{name}") for name, _ in inner]
    return list(dict.fromkeys(found))


@contextmanager
def present(model: Model, blocks: Sequence[str]) -> Iterator[None]:
    """The weights below some paths in memory; on leaving, those that were read are given up again."""
    tensors = model.tensors()
    read = [name for name in owners_below(model, blocks) if tensors[name].is_meta]
    model.materialize(read)
    try:
        yield
    finally:
        model.release(read)


def loaded(model: Model, path: str) -> nn.Module:
    """The module at a path with its weights in memory, for reading; the model itself stays as it is."""
    module = model.module(path)
    names = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    if not names:
        return module
    ties = model.ties()
    own = cloned(module, {})
    for name in names:
        source: LazyTensor = model.weights[ties.get(f"{path}.{name}", f"{path}.{name}")]
        put(cast(fx.GraphModule, own), [name], source.read())
    return own


def computed(model: Model, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a model computes, one block in memory at a time; in another dtype where one is given.

    The same numbers as `model(ids)`, or `model.to(dtype)(ids)`.
    """
    step = model.step(ids)
    last = {node: user for user in model.gm.graph.nodes for node in user.all_input_nodes}
    env: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in model.gm.graph.nodes:
            if node.op == "placeholder":
                env[node] = ids if node.name != "step" else step
                continue
            args, kwargs = (map_arg(part, lambda n: env[n]) for part in (node.args, node.kwargs))
            if node.op == "output":
                return cast(Tensor, args[0])
            if node.op == "call_module":
                env[node] = _block(model, str(node.target), dtype)(*args, **kwargs)
            elif node.op == "call_function":
                env[node] = node.target(*args, **kwargs)
            elif node.op == "call_method":
                env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                env[node] = _attribute(model, str(node.target), dtype)
            for old in node.all_input_nodes:
                if last[old] is node:
                    del env[old]
    raise TypeError("the graph has no output")


def _block(model: Model, path: str, dtype: torch.dtype | None) -> nn.Module:
    """A block with its weights in memory, cast on a copy of its own."""
    whole = loaded(model, path)
    return whole if dtype is None else cloned(whole, {}).to(dtype)


def _attribute(model: Model, name: str, dtype: torch.dtype | None) -> Tensor:
    held: Any = model.gm
    for word in name.split("."):
        held = getattr(held, word)
    if held.is_meta:
        held = model.weights[model.ties().get(name, name)].read()
    return cast(Tensor, held.to(dtype) if dtype is not None and held.is_floating_point() else held)
