"""Op graphs with labels: each op under its own name, so that a leak names the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effc.compiler.labels import Flow, Labelling, union
from effc.compiler.op_graph import Op, OpGraph
from effc.compiler.step import Step

ROWWISE = {"expert_linear": 2}
"""Ops that are written for all rows at once, but in which a row of the result reads the same row of the
values (all but the weights) alone -> how many axes the rows have."""


RAGGED = ("enter", "leave", "attend_among")
"""Ops on tokens of several rows one after another [1, N, ...], in which a token of the result, and what the
sides of the step say of it, reads tokens of its own row alone."""


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
        if op.name in ROWWISE or op.name in RAGGED:
            with torch.no_grad():
                result = kind.run(*given, **op.attributes)
            if op.name in ROWWISE:
                _by_rows(flow, given, result, ROWWISE[op.name])
            else:
                _by_sequence(flow, given, result, op)
        else:
            with torch.no_grad(), Labelling(flow):
                result = kind.run(*given, **op.attributes)
        results = result if kind.gives > 1 else (result,)
        values.update(zip(op.gives, results, strict=True))
    return values[graph.output], None if graph.state is None else values[graph.state]


def _label(op: Op) -> str:
    return f"%{op.gives[0]} {op.name}"


def _by_sequence(flow: Flow, given: Sequence[Any], result: Any, op: Op) -> None:
    """Whatever was given of a row is in all that comes out for it, sides of the step included."""
    step = next(value for value in given if isinstance(value, Step))
    loop = op.attributes["how"].loop if "how" in op.attributes else op.attributes["loop"]
    row = step.sides[f"alive {loop}"].nonzero()[:, 0]
    count = step.sides[f"alive {loop}"].shape[0]
    labels = torch.zeros(count, dtype=torch.int64)
    tensors = [t for t in _flat((*given, step.positions, step.key_mask, step.sides)) if t.ndim]
    for tensor in tensors:
        own = flow.of(tensor)
        if tensor.shape[0] == count:
            labels = labels | union(own, list(range(1, own.ndim))).reshape(count)
        elif tensor.shape[:2] == (1, len(row)):
            ones = union(own[0], list(range(1, own.ndim - 1))).reshape(len(row))
            for number in range(count):
                labels[number] |= union(ones[row == number], None) if bool((row == number).any()) else 0
        elif bool((own != 0).any()):
            raise TypeError(f"{op.name} reads a tensor {list(tensor.shape)} that belongs to no row")
    for tensor in _flat((result, step.sides)):
        per = labels[row][None] if tensor.shape[:2] == (1, len(row)) and count > 1 else labels
        flow.keep(tensor, per.view(*per.shape, *[1] * (tensor.ndim - per.ndim)))


def _flat(values: Any) -> list[Tensor]:
    """Every tensor in nested tuples and mappings."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


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
