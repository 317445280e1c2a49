"""Op graphs with labels: each op under its own name, so that a leak names the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effc.compiler.labels import Flow, Labelling, union
from effc.compiler.op_graph import Op, OpGraph
from effc.compiler.step import Step

ROWWISE = {"expert_linear": 2}
"""Ops that are written for all rows at once, but in which a row of the result reads the same row of the
values (all but the weights) alone -> how many axes the rows have."""


def follow(
    flow: Flow, graph: OpGraph, block: nn.Module, x: Tensor, step: Step | None, past: Any, path: str
) -> tuple[Tensor, Any]:
    """Run an op graph with labels, each op under its name -> (y, the past after it)."""
    from effc.compiler.ops import OPS

    tensors = dict(block.named_parameters(remove_duplicate=False)) | dict(
        block.named_buffers(remove_duplicate=False)
    )
    values: dict[int, Any] = {0: x, 1: step, 2: past}
    for op in graph.ops:
        if op.name == "weight":
            values[op.gives[0]] = tensors[op.attributes["name"]]
            continue
        flow.node = f"{path}: {_label(op)}"
        kind = OPS[op.name]
        given = [None if n is None else values[n] for n in op.takes]
        if op.name in ROWWISE:
            with torch.no_grad():
                result = kind.run(*given, **op.attributes)
            _by_rows(flow, given, result, ROWWISE[op.name])
        else:
            with torch.no_grad(), Labelling(flow):
                result = kind.run(*given, **op.attributes)
        results = result if kind.gives > 1 else (result,)
        values.update(zip(op.gives, results, strict=True))
    return values[graph.output], None if graph.state is None else values[graph.state]


def _label(op: Op) -> str:
    return f"%{op.gives[0]} {op.name}"


def _by_rows(flow: Flow, given: Sequence[Any], result: Tensor, axes: int) -> None:
    """Each row of the result reads the same row of every value that has those rows; all of the others."""
    rows = result.shape[:axes]
    labels = torch.zeros(rows, dtype=torch.int64)
    for tensor in given:
        if not isinstance(tensor, Tensor):
            continue
        own = flow.of(tensor)
        if own.shape[:axes] == rows:
            labels = labels | union(own, list(range(axes, own.ndim))).reshape(rows)
        else:
            labels = labels | union(own, None)
    flow.keep(result, labels.view(*rows, *[1] * (result.ndim - axes)))
