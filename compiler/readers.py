"""Readers: which units multiply the channels that a block of the graph gives, found in the blocks' ops.

A method that scales or turns the channels of a value must do the opposite in all that reads them; what reads
them in another way (a sum with the residual stream, a nonlinear function) forbids it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from effc.compiler.blocks import Unit
from effc.compiler.model import Model
from effc.compiler.op_graph import Op, expand

_PASS = {("flatten", 0), ("spread", 0), ("cast_like", 0), ("cast_to", 0)}
"""Op and place of a value that comes out with the same channels."""
_SHAPE = {("visible", 1), ("token_types", 1), ("shape_like", 1), ("route", 1), ("cast_like", 1)}
"""Op and place of a value of which only shape and dtype are read."""
_MATRIX = ("linear", "expert_linear")


@dataclass(slots=True)
class Readers:
    """What reads a value's channels."""

    units: list[str] = field(default_factory=list)
    """Paths of units that multiply them by a matrix W [o, i], in graph order, each once."""
    others: list[str] = field(default_factory=list)
    """What reads them in another way, in words."""


def readers(model: Model, path: str) -> Readers:
    """All that reads what the block at `path` gives. A path inside a block has one reader: that block."""
    nodes = list(model.gm.graph.nodes)
    calls = [n for n in nodes if n.op == "call_module" and n.target == path]
    found = Readers()
    if not calls:
        found.others.append(f"what follows it inside `{path.rpartition('.')[0]}`")
        return found
    if bare(model, path):
        found.others.append(f"code that reads the tensors of `{path}` itself")
    fed = _fed(model, calls)
    for node in nodes:
        if node in fed and node not in calls:
            continue
        if any(a in fed for a in node.all_input_nodes):
            _read_by(model, node, fed, nodes, found)
    found.units, found.others = list(dict.fromkeys(found.units)), list(dict.fromkeys(found.others))
    return found


def _fed(model: Model, calls: list[fx.Node]) -> set[fx.Node]:
    """The calls, and nodes behind them that hand the same channels on."""
    fed, todo = set(calls), list(calls)
    while todo:
        for user in todo.pop().users:
            if user not in fed and _hands_on(model, user):
                fed.add(user)
                todo.append(user)
    return fed


def _hands_on(model: Model, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.module(str(node.target)), nn.Dropout | nn.Identity)


def _read_by(model: Model, node: fx.Node, fed: set[fx.Node], nodes: list[fx.Node], found: Readers) -> None:
    if node.op == "output":
        found.others.append("the output of the model")
    elif node.op != "call_module":
        if not _asks_shape(node):
            found.others.append("the residual stream" if node.target is operator.add else f"`{node.name}`")
    else:
        path = str(node.target)
        first = [n.args[0] for n in nodes if n.op == "call_module" and n.target == path]
        if any(a not in fed for a in first):
            found.others.append(f"`{path}`, which other blocks feed as well")
            return
        if bare(model, path):
            found.others.append(f"code that reads the tensors of `{path}` itself")
            return
        inside = read_inside(model.module(path))
        found.units += [f"{path}.{unit}" if unit else path for unit in inside.units]
        found.others += [f"{other} in `{path}`" for other in inside.others]


def bare(model: Model, path: str) -> bool:
    """Whether the graph reads tensors of a module by themselves, so that they cannot change with it."""
    return any(n.op == "get_attr" and str(n.target).startswith(f"{path}.") for n in model.gm.graph.nodes)


def runs_once(model: Model, path: str) -> bool:
    """Whether the graph calls a module at one place and reads its tensors nowhere else."""
    calls = [n for n in model.gm.graph.nodes if n.op == "call_module" and n.target == path]
    return len(calls) == 1 and not bare(model, path)


def _asks_shape(node: fx.Node) -> bool:
    """x.shape, x.size() and kin."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim")


def read_inside(block: nn.Module) -> Readers:
    """What a block does with the channels of its input; units by their path inside ("" is the block)."""
    if type(block) is nn.Linear:
        return Readers([""])
    if not isinstance(block, Unit):
        return Readers(others=[type(block).__name__])
    try:
        graph = expand(block)
    except TypeError:
        return Readers(others=[type(block).__name__])
    made = {number: op for op in graph.ops for number in op.gives}
    found, live = Readers(), {0}
    for op in graph.ops:
        for place in _places(op, live):
            if (op.name, place) in _PASS:
                live.update(op.gives)
            elif op.name in _MATRIX and place == 0:
                found.units += dict.fromkeys(_owners(op.takes[1], made))
            elif (op.name, place) not in _SHAPE:
                found.others.append(op.name)
    if graph.output in live:
        found.others.append("what follows")
    return found


def _places(op: Op, live: set[int]) -> list[int]:
    return [place for place, number in enumerate(op.takes) if number in live]


def _owners(number: int | None, made: dict[int, Op]) -> Iterator[str]:
    """Paths of the units whose tensors make a value."""
    if number is None or number not in made:
        return
    op = made[number]
    if op.name == "weight":
        yield str(op.attributes["name"]).rpartition(".")[0]
        return
    yield from _owners(op.takes[0] if op.takes else None, made)
