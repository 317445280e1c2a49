"""Edits of traced graphs that give layers branches, make branches one layer, and multiply layers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import Role
from effc.passes.reparam._branches import Conv, Sum, merged


def stand(rw: Rewriter, path: str, mine: Any, parts: Sequence[tuple[Any, Any]]) -> None:
    """Put the new modules into the graph: norm(own) + norm(layer(x)) + ..."""
    node = rw.node(path)
    source, readers, layer = node.args[0], list(node.users), rw.role(path).layer
    with (
        rw.surgery(path, f"{len(parts)} branches beside it") as graph,
        graph.inserting_before(_first(graph, readers)),
    ):

        def call(name: str, module: nn.Module | None, role: str, x: Any) -> Any:
            if module is None:
                return x
            rw.model.gm.add_submodule(name, module)
            rw.model.roles[name] = Role(role, layer)
            return graph.call_module(name, (x,))

        total = call(f"{path}_norm", mine, "norm", node)
        for number, (beside, norm) in enumerate(parts, 1):
            name = f"{path}_branch{number}"
            y = call(f"{name}_norm", norm, "norm", call(name, beside, "conv", source))
            total = graph.call_function(operator.add, (total, y))
        for user in readers:
            user.replace_input_with(node, total)


def _first(graph: fx.Graph, nodes: Sequence[fx.Node]) -> fx.Node:
    wanted = set(nodes)
    found: fx.Node = next(n for n in graph.nodes if n in wanted)
    return found


def merge(rw: Rewriter, found: Sum) -> None:
    """One layer in place of branches."""
    modules = [rw.module(path) for path in found.layers]
    like = max(modules, key=lambda m: m.weight.numel())
    path = found.layers[0]
    known = not any(m.weight.is_meta for m in modules)
    pair = merged(rw.model, found) if known else None
    rw.swap(path, _layer_of(like, pair), f"{len(found.branches)} branches in one")
    one = rw.node(path)
    with rw.surgery(path, f"in place of {len(found.branches)} branches") as graph:
        with graph.inserting_before(found.root):
            total: Any = one
            for leaf in found.rest:
                total = graph.call_function(operator.add, (total, leaf))
        found.root.replace_all_uses_with(total)


def _layer_of(like: Any, pair: tuple[Tensor, Tensor] | None) -> Any:
    """A layer of the same form with a bias."""
    dtype, device = like.weight.dtype, like.weight.device
    if isinstance(like, Conv):
        form = {n: getattr(like, n) for n in ("stride", "padding", "dilation", "groups", "padding_mode")}
        made: Any = type(like)(
            like.in_channels, like.out_channels, like.kernel_size, **form, dtype=dtype, device="meta"
        )
    else:
        made = Linear(
            in_features=like.in_features,
            out_features=like.out_features,
            bias=True,
            dtype=str(dtype).removeprefix("torch."),
        )
    made.requires_grad_(False)
    if pair is not None:
        made.weight, made.bias = (nn.Parameter(t.to(dtype).to(device), requires_grad=False) for t in pair)
    return made


def multiply(rw: Rewriter, first: str, second: str) -> None:
    """V (W x + b) + c = (V W) x + (V b + c)"""
    one, two = rw.module(first), rw.module(second)
    made = Linear(
        in_features=one.in_features,
        out_features=two.out_features,
        bias=one.bias is not None or two.bias is not None,
        dtype=str(two.weight.dtype).removeprefix("torch."),
    )
    if not one.weight.is_meta and not two.weight.is_meta:
        outer = two.weight.detach().double()
        made.weight = nn.Parameter(
            (outer @ one.weight.detach().double()).to(two.weight.dtype), requires_grad=False
        )
        if made.bias is not None:
            bias = torch.zeros(two.out_features, dtype=torch.float64)
            bias = bias if one.bias is None else outer @ one.bias.detach().double()
            bias = bias if two.bias is None else bias + two.bias.detach().double()
            made.bias = nn.Parameter(bias.to(two.weight.dtype), requires_grad=False)
    rw.swap(second, made, f"times {first}")
    rw.remove(first)
