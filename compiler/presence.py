"""Presence: the weights of a few modules in memory for a while, of a model that may be larger than memory.

Shapes: ids [B, T] int64 -> logits [B, T, V] of a decoder, hidden states [B, T, D] of an encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from effc.compiler.model import Model
from effc.compiler.sharing import cloned, owned, put
from effc.compiler.step import Step
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


def known(model: Model, path: str) -> bool:
    """Whether the weights of a module are in memory or can be read."""
    module = model.module(path)
    absent = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
    ties = model.ties() if absent else {}
    return all(ties.get(f"{path}.{n}", f"{path}.{n}") in model.weights for n in absent)


def loaded(model: Model, path: str, sources: Mapping[int, LazyTensor] | None = None) -> nn.Module:
    """The module at a path with its weights in memory, for reading; the model itself stays as it is.

    `sources`, by the identity of tensors, go before the model's own, whose names may lag behind an edit.
    """
    module = model.module(path)
    places: dict[int, list[str]] = {}  # one tensor may have several names, within a block too
    for name, tensor in owned(module, once=False):
        if tensor.is_meta:
            places.setdefault(id(tensor), []).append(name)
    if not places:
        return module
    given, ties = sources or {}, model.ties()
    own = cloned(module, {})
    for key, names in places.items():
        first = f"{path}.{names[0]}"
        source = given[key] if key in given else model.weights[ties.get(first, first)]
        put(own, names, source.read())
    return own


def computed(model: Model, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a model computes, one block in memory at a time; in another dtype where one is given.

    The same numbers as `model(ids)`, or `model.to(dtype)(ids)`.
    """
    return next(computed_each(model, [(ids, model.step(ids))], dtype))


def computed_each(
    model: Model, inputs: Sequence[tuple[Tensor, Step]], dtype: torch.dtype | None = None
) -> Iterator[Tensor]:
    """The same of several inputs, each block read once for all; the last block runs as results are taken."""
    nodes = list(model.gm.graph.nodes)
    last = {node: user for user in nodes for node in user.all_input_nodes}
    envs: list[dict[fx.Node, Any]] = [
        {n: ids if n.name != "step" else step for n in nodes if n.op == "placeholder"} for ids, step in inputs
    ]
    final = max(place for place, node in enumerate(nodes) if node.op == "call_module")
    with torch.no_grad():
        for node in nodes[:final]:
            held = _held(model, node, dtype)
            for env in envs:
                _run(node, held, env, last)
            del held
        held = _held(model, nodes[final], dtype)
    while envs:
        env = envs.pop(0)
        with torch.no_grad():
            for node in nodes[final:-1]:
                _run(node, held if node is nodes[final] else _held(model, node, dtype), env, last)
            out = env[nodes[-1].args[0]]
        del env
        yield cast(Tensor, out)


def _run(node: fx.Node, held: Any, env: dict[fx.Node, Any], last: Mapping[fx.Node, fx.Node]) -> None:
    """Compute one node, and forget what no later one reads."""
    if node.op == "placeholder":
        return
    args: Any = map_arg(node.args, lambda n: env[n])
    kwargs: Any = map_arg(node.kwargs, lambda n: env[n])
    if node.op == "get_attr":
        env[node] = held
    elif node.op == "call_method":
        env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        env[node] = held(*args, **kwargs)
    for old in node.all_input_nodes:
        if last[old] is node:
            del env[old]


def _held(model: Model, node: fx.Node, dtype: torch.dtype | None) -> Any:
    """What a node calls or gets, its weights in memory."""
    if node.op == "call_module":
        return _block(model, str(node.target), dtype)
    return _attribute(model, str(node.target), dtype) if node.op == "get_attr" else node.target


def cast_lazily(model: Model, dtype: torch.dtype) -> Model:
    """A clone in another dtype; weights on disk stay there and are cast when they are read."""
    clone = model.clone().to(dtype)
    for name, tensor in clone.tensors().items():
        lazy = clone.weights.get(name)
        if tensor.is_meta and lazy is not None and tensor.dtype != lazy.dtype:
            clone.weights[name] = LazyTensor(lazy.shape, dtype, partial(_cast, lazy, dtype))
    return clone


def _cast(lazy: LazyTensor, dtype: torch.dtype) -> Tensor:
    return lazy.read().to(dtype)


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
