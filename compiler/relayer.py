"""Relayer: give an exported graph its layers back, where one aten call is all that a layer does."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

aten = torch.ops.aten

_LAYERS: dict[Any, tuple[tuple[type, ...], int, int]] = {
    aten.linear.default: ((nn.Linear,), 0, 1),
    aten.conv1d.default: ((nn.Conv1d,), 0, 1),
    aten.conv2d.default: ((nn.Conv2d,), 0, 1),
    aten.layer_norm.default: ((nn.LayerNorm,), 0, 2),
    aten.batch_norm.default: ((nn.BatchNorm1d, nn.BatchNorm2d), 0, 1),
    aten.embedding.default: ((nn.Embedding,), 1, 0),
}
"""aten call -> layer types it may stand for, the argument that is the input, the one that is the weight."""


def relayered(exported: torch.export.ExportedProgram, module: nn.Module) -> fx.GraphModule:
    """The exported graph with calls of the module's own layers instead of aten calls on their weights."""
    gm = exported.module(check_guards=False)
    _plain(gm, exported)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _LAYERS:
            continue
        types, stream, weight = _LAYERS[node.target]
        path = _owner(module, node, weight, types)
        if path is None:
            continue
        _restore(gm, path, module.get_submodule(path))
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(path, (node.args[stream],))
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return fx.GraphModule(gm, gm.graph)


def _plain(gm: fx.GraphModule, exported: torch.export.ExportedProgram) -> None:
    """Let the graph take and give what the module does, without export's own flattening.

    Raises:
        ValueError: an argument is a container, which a graph of plain placeholders cannot take.
    """
    spec, out = exported.call_spec.in_spec, exported.call_spec.out_spec
    if spec is None or out is None or spec.num_leaves != spec.children()[0].num_children:
        raise ValueError("arguments in containers")
    end = next(node for node in gm.graph.nodes if node.op == "output")
    end.args = (pytree.tree_unflatten(list(end.args[0]), out),)
    gm.graph.set_codegen(CodeGen())
    gm.recompile()


def _owner(module: nn.Module, node: fx.Node, place: int, types: tuple[type, ...]) -> str | None:
    """The path of the layer whose `weight` is the argument at `place`; a tied weight has several."""
    weight = node.args[place] if len(node.args) > place else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    try:
        tensor = module.get_parameter(str(weight.target))
    except AttributeError:
        return None
    for path, layer in module.named_modules():
        if isinstance(layer, types) and getattr(layer, "weight", None) is tensor:
            return str(path)
    return None


def _restore(gm: fx.GraphModule, path: str, layer: nn.Module) -> None:
    """Put the module's own layer at its path; its tensors stay where other nodes may read them."""
    parent, _, name = path.rpartition(".")
    holder: nn.Module = gm
    for word in parent.split(".") if parent else ():
        if word not in holder._modules:
            holder.add_module(word, nn.Module())
        holder = cast(nn.Module, holder._modules[word])
    holder._modules[name] = layer
