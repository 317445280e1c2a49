"""Flat: a whole model as one list of ops, blocks expanded; what lowering and analysis read.

Numbers name values: 0 the token ids, 1 the step, 2 the cache (none before the first token), then every
result in order. Each op remembers the block that it came from.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

from effc.compiler.blocks.unit import Unit
from effc.compiler.model import Model
from effc.compiler.op_graph import Op, expand

IDS, STEP, PAST = 0, 1, 2


@dataclass(frozen=True, slots=True)
class FlatOp:
    """One op of the whole model. A `weight` names its tensor canonically."""

    op: Op
    path: str
    """Module path of the block; empty for plain arithmetic between blocks."""


@dataclass(slots=True)
class Flat:
    """All ops of a model in order."""

    ops: list[FlatOp] = field(default_factory=list)
    output: int = IDS

    def makers(self) -> dict[int, FlatOp]:
        """Which op made a value."""
        return {number: flat for flat in self.ops for number in flat.op.gives}

    def readers(self) -> dict[int, list[FlatOp]]:
        """Which ops read a value, in order."""
        found: dict[int, list[FlatOp]] = {}
        for flat in self.ops:
            for number in dict.fromkeys(n for n in flat.op.takes if n is not None):
                found.setdefault(number, []).append(flat)
        return found


def flatten(model: Model) -> Flat:
    """The model in ops; it needs no weights.

    Raises:
        TypeError: a node of its graph is neither a block nor an addition, or a block has no expansion.
    """
    flat, count = Flat(), PAST + 1
    numbers: dict[object, int] = {}
    for node in model.gm.graph.nodes:
        if node.op == "placeholder":
            numbers[node] = IDS if not numbers else STEP
        elif node.op == "output":
            flat.output = numbers[node.args[0]]
        elif node.op == "call_function" and node.target is operator.add:
            takes = tuple(numbers[arg] for arg in node.args)
            flat.ops.append(FlatOp(Op("add", takes, (count,)), ""))
            numbers[node], count = count, count + 1
        elif node.op == "call_module" and isinstance(block := model.module(str(node.target)), Unit):
            path = str(node.target)
            graph = expand(block)
            local = {0: numbers[node.args[0]], 1: STEP, 2: PAST}
            for op in graph.ops:
                for number in op.gives:
                    local[number], count = count, count + 1
                flat.ops.append(FlatOp(_renamed(op, local, path), path))
            numbers[node] = local[graph.output]
        else:
            raise TypeError(f"`{node.name}` ({node.op} {node.target}) is no block and no addition")
    return flat


def _renamed(op: Op, local: dict[int, int], path: str) -> Op:
    attributes = dict(op.attributes)
    if op.name == "weight":
        attributes["name"] = f"{path}.{attributes['name']}"
    takes = tuple(None if n is None else local[n] for n in op.takes)
    return replace(op, takes=takes, gives=tuple(local[n] for n in op.gives), attributes=attributes)
