"""Isolation: a proof that no output row of a model depends on another row of its batch, or where it does.

The model runs once, on few rows, with labels beside its numbers (`labels`): a block by its ops, where it has
them, since those are what is lowered, else by its own code. The proof is about the operations and their
shapes; it covers neither time nor mistakes in kernels.

Shapes: ids [B, T].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from effc.compiler.blocks import PatchEmbed, Unit
from effc.compiler.label_names import WHY
from effc.compiler.label_ops import follow
from effc.compiler.labels import RANDOM, ROWS, Flow, Labelling, Place
from effc.compiler.model import Model
from effc.compiler.op_graph import OpGraph, expand
from effc.compiler.presence import loaded
from effc.compiler.step import Cache, Step
from effc.compiler.trace import TracedModel

REPAIRS: Mapping[str, str] = {
    WHY["reduce"]: "take it along each row alone: a scale, a rank or a sum for each row or token",
    WHY["move"]: "index within a row",
    WHY["product"]: "multiply within each sample, as a batched product does",
    WHY["index"]: "let each row be read by its own indices alone",
    WHY[
        "decide"
    ]: "let no number of the batch decide what runs: mask instead, and drop no row for another's sake",
    WHY["norm"]: "call .eval(), so that running statistics are used, or normalize within a sample",
    WHY["unknown"]: "write it in operations that have a rule, or state its rule in compiler/label_rules.py",
    WHY["point"]: "combine rows with themselves alone",
}


@dataclass(frozen=True, slots=True)
class Leak:
    """Where rows meet, so that an output row depends on another."""

    phase: str
    node: str
    op: str
    why: str
    rows: tuple[int, ...]

    @property
    def repair(self) -> str:
        return REPAIRS.get(self.why, REPAIRS[WHY["unknown"]])


@dataclass(frozen=True, slots=True)
class Isolation:
    """What the proof found."""

    leaks: tuple[Leak, ...]
    random: tuple[str, ...]
    """Phases whose outputs depend on numbers drawn at random."""
    phases: tuple[str, ...]
    outputs: int
    """Output elements that were judged."""
    operations: int
    """Operations of torch that were followed."""

    @property
    def isolated(self) -> bool:
        return not self.leaks


def isolation(model: Model, batch: int = 2, length: int = 5, training: bool = False) -> Isolation:
    """Follow a model of token ids or images through its phases: whole sequences, padded ones, and, of a
    decoder, a further token behind a cache. `training` follows the blocks' own code as training runs it.

    Raises:
        ValueError: fewer than two rows, which cannot show anything, or more than can be told apart.
    """
    runs: list[_Run] = []
    if isinstance(model, TracedModel):
        runs.append(_Traced(model, batch, training))
    else:
        takes_ids = not isinstance(model.module("embedding"), PatchEmbed)
        runs.append(_Blocks(model, batch, length, training, padded=False))
        if takes_ids:
            runs.append(_Blocks(model, batch, length, training, padded=True))
    leaks: list[Leak] = []
    noisy: list[str] = []
    outputs = operations = 0
    for run in runs:
        for phase, out, axis in run.phases():
            found, random, count = _judged(run.flow, phase, out, axis)
            leaks += [leak for leak in found if leak not in leaks]
            noisy += [phase] if random else []
            outputs += count
        operations += run.flow.operations
    phases = tuple(dict.fromkeys(p for run in runs for p in run.ran))
    unique = {(leak.node, leak.op, leak.why): leak for leak in reversed(leaks)}
    return Isolation(
        tuple(reversed(unique.values())), tuple(dict.fromkeys(noisy)), phases, outputs, operations
    )


def _judged(flow: Flow, phase: str, out: Sequence[Tensor], axis: int) -> tuple[list[Leak], bool, int]:
    """Leaks into outputs, whether they are random, and how many elements they have."""
    leaks: list[Leak] = []
    random, count = False, 0
    for tensor in out:
        labels = flow.of(tensor) | flow.decided
        count += labels.numel()
        random = random or bool((labels & RANDOM).any())
        own = torch.ones(labels.shape[axis], dtype=torch.int64) << torch.arange(labels.shape[axis])
        shape = [1] * labels.ndim
        shape[axis] = -1
        foreign = labels & ROWS & ~own.view(shape)
        if bool(foreign.any()):
            places = flow.reached(labels[foreign != 0])
            unnamed = Place("output", "", WHY["move"], ())
            leaks += [Leak(phase, p.node, p.op, p.why, p.rows) for p in places or [unnamed]]
    return leaks, random, count


class _Run:
    """One flow of labels through a model; its phases follow each other."""

    def __init__(self) -> None:
        self.flow = Flow()
        self.ran: list[str] = []

    def phases(self) -> Iterator[tuple[str, list[Tensor], int]]:
        """Name of each phase, what it gives, and the axis of rows."""
        raise NotImplementedError


class _Blocks(_Run):
    """A model of blocks: prefill, then a step behind it."""

    def __init__(self, model: Model, batch: int, length: int, training: bool, padded: bool) -> None:
        super().__init__()
        self.model, self.batch, self.length, self.training, self.padded = (
            model,
            batch,
            length,
            training,
            padded,
        )
        self.past: dict[str, Any] = {}

    def phases(self) -> Iterator[tuple[str, list[Tensor], int]]:
        words = "padded rows" if self.padded else "whole rows"
        first = f"training, {words}" if self.training else f"prefill, {words}"
        x, step = self._inputs(self.length, Cache(2 * self.length) if self._decodes() else None)
        self.ran.append(first)
        yield first, [self._run(x, step)], 0
        if not self._decodes() or step.cache is None:
            return
        step.cache.filled = self.length
        self.ran.append(f"decode, {words}")
        x, step = self._inputs(1, step.cache)
        yield f"decode, {words}", [self._run(x, step)], 0

    def _decodes(self) -> bool:
        """Whether the blocks keep a past: decoders outside of training."""
        return not self.training and "head" in dict(self.model.gm.named_children())

    def _inputs(self, length: int, cache: Cache | None) -> tuple[Tensor, Step]:
        """Labelled inputs: ids or an image, and a step whose tensors belong to their rows."""
        embedding: Any = self.model.module("embedding")
        start = cache.filled if cache is not None else 0
        if isinstance(embedding, PatchEmbed):
            x = torch.zeros(self.batch, embedding.channels, embedding.image, embedding.image)
            x = x.to(next(self.model.gm.parameters()).dtype)
        else:
            x = torch.ones(self.batch, length, dtype=torch.int64)
        mask = torch.ones(self.batch, start + length, dtype=torch.int64)
        if self.padded:
            mask[0, :2] = 0
        step = self.model.step(x, mask if self.padded else None, cache)
        for tensor in (x, step.positions, step.key_mask):
            if tensor is not None:
                self.flow.rows_of(tensor)
        return x, step

    def _run(self, x: Tensor, step: Step) -> Tensor:
        values: dict[fx.Node, Any] = {}
        out = x
        for node in self.model.gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = step if node.name == "step" else x
            elif node.op == "output":
                out = values[node.args[0]]
            else:
                args: Any = map_arg(node.args, lambda n: values[n])
                self.flow.node = str(node.target) if node.op == "call_module" else node.name
                values[node] = self._value(node, args)
        return out

    def _value(self, node: fx.Node, args: Any) -> Any:
        if node.op == "call_module":
            path = str(node.target)
            block = loaded(self.model, path)
            if isinstance(block, Unit) and not self.training and (graph := _expanded(block)) is not None:
                step = args[1] if len(args) > 1 else None
                y, self.past[path] = follow(self.flow, graph, block, args[0], step, self.past.get(path), path)
                return y
            return _called(self.flow, block, args, self.training)
        target: Any = node.target
        with torch.no_grad(), Labelling(self.flow):
            return target(*args) if node.op == "call_function" else getattr(args[0], target)(*args[1:])


class _Traced(_Run):
    """A traced module: its graph, node by node, on its example inputs."""

    def __init__(self, model: TracedModel, batch: int, training: bool) -> None:
        super().__init__()
        self.model, self.batch, self.training = model, batch, training

    def phases(self) -> Iterator[tuple[str, list[Tensor], int]]:
        phase = "training" if self.training else "inference"
        self.ran.append(phase)
        inputs = [_rows(x, self.batch) if isinstance(x, Tensor) and x.ndim else x for x in self.model.inputs]
        for x in inputs:
            if isinstance(x, Tensor) and x.ndim:
                self.flow.rows_of(x)
        gm = copy.deepcopy(self.model.gm).train(self.training)  # training changes running statistics
        out = _Following(gm, self.flow).run(*inputs)
        yield phase, [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)], 0


class _Following(fx.Interpreter):
    """Runs a traced graph with labels, each operation under the name of its node."""

    def __init__(self, gm: fx.GraphModule, flow: Flow) -> None:
        super().__init__(gm)
        self.flow = flow

    def run_node(self, n: fx.Node) -> Any:
        self.flow.node = str(n.target) if n.op in ("call_module", "get_attr") else n.name
        if n.op in ("placeholder", "output", "get_attr"):
            return super().run_node(n)
        with torch.no_grad(), Labelling(self.flow):
            return super().run_node(n)


def _rows(x: Tensor, batch: int) -> Tensor:
    """As many rows as asked for, of an example."""
    count = -(-batch // max(1, x.shape[0]))
    return x.repeat(count, *[1] * (x.ndim - 1))[:batch].clone()


def _expanded(block: Unit) -> OpGraph | None:
    try:
        return expand(block)
    except TypeError:
        return None


def _called(flow: Flow, block: nn.Module, args: Any, training: bool) -> Any:
    """A block's own code, of a copy: in training it may change its statistics."""
    own = copy.deepcopy(block).train(training) if training else block
    with torch.no_grad(), Labelling(flow):
        return own(*args)
