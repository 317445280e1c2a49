"""OpGraph: a block written in ops, in single-assignment form, and how it is built and evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from effc.compiler.blocks.unit import Unit
    from effc.compiler.step import Step


@dataclass(frozen=True, slots=True)
class Value:
    """One result in an op graph: its number, and the kind of op that made it."""

    number: int
    made_by: str


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: attributes are data; a `weight` names a tensor of the block and takes no value."""

    name: str
    takes: tuple[int | None, ...]
    gives: tuple[int, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        out = ", ".join(f"%{n}" for n in self.gives)
        given = [f"%{n}" if n is not None else "none" for n in self.takes]
        given += [f"{k} = {v}" for k, v in self.attributes.items()]
        return f"{out} = {self.name}({', '.join(given)})"


@dataclass(slots=True)
class OpGraph:
    """A block in ops. Inputs are x (ids for an embedding), step, and past (the cache, None at first)."""

    inputs: tuple[str, ...] = ("x", "step", "past")
    ops: list[Op] = field(default_factory=list)
    output: int = 0
    state: int | None = None
    """The cache that comes out, of blocks that have one."""

    def __str__(self) -> str:
        head = ", ".join(f"%{i} {name}" for i, name in enumerate(self.inputs))
        tail = f"%{self.output}" + (f", %{self.state}" if self.state is not None else "")
        return "\n".join([f"({head})", *map(str, self.ops), f"return {tail}"])


class Ops:
    """Builds an op graph; nested units write into the graph of their block."""

    def __init__(self) -> None:
        self.graph = OpGraph()
        self.x, self.step, self.past = (Value(i, name) for i, name in enumerate(self.graph.inputs))
        self._count = len(self.graph.inputs)
        self._prefix = ""

    def __call__(self, name: str, *values: Value | None, **attributes: Any) -> Value:
        """Append an op with one result.

        Raises:
            TypeError: there is no such op, or its values or attributes are not those it takes.
        """
        return self.many(name, *values, **attributes)[0]

    def many(self, name: str, *values: Value | None, **attributes: Any) -> tuple[Value, ...]:
        """Append an op with all its results."""
        from effc.compiler.ops import OPS

        kind = OPS.get(name)
        if kind is None:
            raise TypeError(f"there is no op {name!r}")
        if not len(kind.takes) - kind.optional <= len(values) <= len(kind.takes):
            raise TypeError(f"{name} takes {', '.join(kind.takes)}; got {len(values)} values")
        if attributes.keys() != kind.attributes:
            raise TypeError(f"{name} has the attributes {sorted(kind.attributes)}, not {sorted(attributes)}")
        return self._append(name, values, kind.gives, attributes)

    def weight(self, name: str) -> Value:
        """A tensor of the unit that is being expanded."""
        return self._append("weight", (), 1, {"name": self._prefix + name})[0]

    def inline(self, name: str, unit: Unit, x: Value) -> Value:
        """Expand a child in place."""
        outer, self._prefix = self._prefix, f"{self._prefix}{name}."
        try:
            result = unit.expand(self, x)
        finally:
            self._prefix = outer
        return result

    def stacked(self, name: str, unit: Any) -> Value:
        """The weights [E, o, i] of a child that holds a stack of experts."""
        outer, self._prefix = self._prefix, f"{self._prefix}{name}."
        try:
            result: Value = unit.expand_stack(self)
        finally:
            self._prefix = outer
        return result

    def _append(
        self, name: str, values: tuple[Value | None, ...], gives: int, attributes: Mapping[str, Any]
    ) -> tuple[Value, ...]:
        made = tuple(Value(self._count + i, name) for i in range(gives))
        self._count += gives
        takes = tuple(v.number if v is not None else None for v in values)
        self.graph.ops.append(Op(name, takes, tuple(v.number for v in made), dict(attributes)))
        return made


def expand(block: Unit) -> OpGraph:
    """A block as ops.

    Raises:
        TypeError: the block has no expansion.
    """
    ops = Ops()
    ops.graph.output = block.expand(ops, ops.x).number
    return ops.graph


def evaluate(graph: OpGraph, block: nn.Module, x: Tensor, step: Step, past: Any = None) -> tuple[Tensor, Any]:
    """Run an op graph by the definitions of its ops, with the block's tensors -> (y, the cache after it)."""
    from effc.compiler.ops import OPS

    tensors = dict(block.named_parameters(remove_duplicate=False)) | dict(
        block.named_buffers(remove_duplicate=False)
    )
    values: dict[int, Any] = {0: x, 1: step, 2: past}
    for op in graph.ops:
        if op.name == "weight":
            values[op.gives[0]] = tensors[op.attributes["name"]]
            continue
        kind = OPS[op.name]
        given = [None if n is None else values[n] for n in op.takes]
        result = kind.run(*given, **op.attributes)
        results = result if kind.gives > 1 else (result,)
        values.update(zip(op.gives, results, strict=True))
    return values[graph.output], None if graph.state is None else values[graph.state]
