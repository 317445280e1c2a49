"""The residual branches of each layer, of models whose layers are x + F(x), and gates on them."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx, nn

from effc.compiler.blocks.learned_scale import LearnedScale
from effc.compiler.layers import Segment, segments
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import Role

_GATE = "fold_gate"


def branches(model: Model) -> list[list[str] | None]:
    """For every layer the nodes whose values are added to the stream, None where it is not x + F(x).

    Raises:
        EffcError: E402 when the model has no layers that can be told apart.
    """
    return [_added(segment) for segment in segments(model.gm.graph)[1]]


def _added(segment: Segment) -> list[str] | None:
    """From the layer's end along the stream to its entry, through additions alone."""
    found: list[str] = []
    node = cast(fx.Node, segment.exit)
    while node is not segment.entry:
        if node.target is not operator.add:
            return None
        on = [a for a in node.all_input_nodes if a is segment.entry or a.target is operator.add]
        off = [a for a in node.all_input_nodes if a not in on]
        if len(on) != 1 or len(off) != 1:
            return None
        found.insert(0, _name(off[0]))
        node = on[0]
    return found or None


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def gate(rw: Rewriter, layer: int, ends: list[str], dtype: str) -> None:
    """Multiply all branches of a layer by one number, which has no value yet."""
    weight: nn.Parameter | None = None
    for number, end in enumerate(ends):
        unit = LearnedScale(dtype=dtype)
        unit.weight = weight if weight is not None else unit.weight
        weight = unit.weight
        rw.insert(f"layers.{layer}.{_GATE}{number}", unit, end, Role("scale", layer))


def open_gates(rw: Rewriter) -> None:
    """1 in every gate: the model computes what it computed without them, to the last bit."""
    for path in gates(rw.model).values():
        weight = rw.module(path).weight
        rw.write(path, "weight", torch.ones(weight.shape, dtype=weight.dtype))


def gates(model: Model) -> dict[int, str]:
    """Layer -> the path of its gate, the first where it has several that share a number."""
    paths = (f"layers.{layer}.{_GATE}0" for layer in range(model.layers))
    there = {path for path, _ in model.units()}
    return {layer: path for layer, path in enumerate(paths) if path in there}


def ungate(rw: Rewriter) -> None:
    """Take all gates out of the graph."""
    nodes = [str(n.target) for n in rw.model.gm.graph.nodes if n.op == "call_module"]
    for path in nodes:
        if f".{_GATE}" in path:
            rw.remove(path)
