"""Shapes of every value in a traced graph, found by a run without numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from effc.compiler.trace import TracedModel


class _Shapes(fx.Interpreter):
    """Keeps the shape of each tensor that a node gives."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def graph_shapes(model: TracedModel) -> dict[str, tuple[int, ...]]:
    """Node name -> shape, for the example inputs that the model was traced with.

    Nothing is computed: weights and inputs are on the meta device. What cannot run so (an answer that depends
    on numbers) leaves its node and those behind it out.
    """
    gm = copy.deepcopy(model.gm).to("meta")
    inputs = [x.to("meta") if isinstance(x, Tensor) else x for x in model.inputs]
    run = _Shapes(gm)
    try:
        with torch.no_grad():
            run.run(*inputs)
    except (NotImplementedError, RuntimeError, ValueError):
        pass
    return run.shapes
