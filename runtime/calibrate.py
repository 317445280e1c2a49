"""Calibrate: run a stage that needs activations, streamed layer by layer.

The hidden states of all sequences are carried forward. A layer's weights are read, its watched modules see
their inputs, the method edits it, the states run through the *edited* layer, and it is saved and given up.
The peak is two layers, their statistics and the states; a killed stage goes on behind the last layer that was
saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from effc.compiler.layers import segments
from effc.compiler.method import Context, Data, Journal, Outcome
from effc.compiler.model import Model
from effc.compiler.presence import owners_below
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Calibrate, Inspect, Observe, Statistic, Survey
from effc.compiler.step import Step
from effc.compiler.weights import LazyTensor
from effc.runtime.data._several import Several, split_of
from effc.runtime.heap import keeping, returning
from effc.runtime.hidden import Hidden
from effc.runtime.peak import trim
from effc.runtime.watch import Snapshot, Watch, restore
from effc.specs.diagnostic import Diagnostic, EffcError

TOKENS = 4096
"""Tokens that run through a layer at once."""


def calibrate(method: Calibrate, model: Model, context: Context) -> Outcome:
    """Run a calibrating stage; `model` is not changed.

    Raises:
        EffcError: E610 when the data has no sequence to show.
        KeyboardInterrupt: when the context asks to stop; what is in the journal stays.
    """
    with returning(), torch.no_grad():
        if isinstance(method, Survey):
            return _surveyed(method, model, context)
        run = _Run(method, model, context)
        try:
            if isinstance(method, Inspect):
                return run.inspected(method)
            return run.observed(method) if isinstance(method, Observe) else run.rewritten()
        finally:
            run.hidden.drop()


@dataclass(frozen=True, slots=True)
class Part:
    """A run of nodes that is worked on as one: what lies before the layers, a layer, what lies behind."""

    name: str
    nodes: Sequence[fx.Node]
    paths: Sequence[str]
    """Selected module paths inside."""
    blocks: Sequence[str]
    """Paths of the blocks that are called."""


class _Run:
    """One calibration: the rewriter, the batches and the hidden states between two parts."""

    def __init__(self, method: Calibrate, model: Model, context: Context) -> None:
        self.method, self.context = method, context
        self.rw = Rewriter(model, method.kind)
        before, self.layers, after = segments(self.rw.model.gm.graph)
        targets: list[str] = list(method.targets(model)) if isinstance(method, Selects) else []
        targets += method.watched(model) if isinstance(method, Survey | Inspect) else []
        self.before = _part("before", before, targets)
        self.parts = [_part(f"layer-{i}", layer.nodes, targets) for i, layer in enumerate(self.layers)]
        self.after = _part("after", after, targets)
        self.batches: list[list[int]] = []
        if method.data is not None:  # a method may do without, and is streamed all the same
            self.data = context.data["data"]
            self.split = split_of(method)
            self.batches = _batches(self.data, self.split, method.samples, context.seed)
        self.saved = lru_cache(maxsize=1)(lambda unit: cast(Journal, context.journal).read(unit)[0])
        self.steps: list[Step] = []
        self.hidden = Hidden(context.workdir)

    def observed(self, method: Observe) -> Outcome:
        """Score all layers of the unchanged model, then edit it as one piece."""
        seen: dict[int, Tensor] = {}
        self._enter()
        for index, part in enumerate(self.parts):
            with self._present(part), keeping():
                for batch in self.hidden:
                    before = self.hidden.get(batch)
                    after = self._through(index, batch, before)
                    stat = method.observe(index, before, after)
                    seen[index] = seen[index] + stat if index in seen else stat
                    self.hidden.put(batch, after)
            self._tick(index + 1)
        scores = dict(method.rewrite(self.rw, seen))
        return self._outcome({"scores": scores})

    def inspected(self, method: Inspect) -> Outcome:
        """Look at watched modules of the unchanged model, then edit it as one piece; without data, edit."""
        kept: dict[str, list[Tensor]] = {}
        if self.batches:
            self._enter()
        for index, part in enumerate(self.parts if self.batches else []):
            with self._present(part), self._looking(method, part.paths, kept):
                for batch in self.hidden:
                    self.hidden.put(batch, self._through(index, batch, self.hidden.get(batch)))
            self._tick(index + 1)
        seen = {path: torch.cat(found) for path, found in kept.items()}
        return self._outcome({"scores": dict(method.rewrite(self.rw, seen))})

    @contextmanager
    def _looking(
        self, method: Inspect, paths: Sequence[str], kept: dict[str, list[Tensor]]
    ) -> Iterator[None]:
        def look(path: str) -> Callable[[Any, tuple[Any, ...]], None]:
            return lambda module, args: kept.setdefault(path, []).append(method.inspect(module, *args))

        handles = [self.rw.module(path).register_forward_pre_hook(look(path)) for path in paths]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def seen(self) -> dict[str, Statistic]:
        """The statistics of all watched modules of the unchanged model."""
        found: dict[str, Statistic] = {}
        self._enter()
        for index, part in enumerate(self.parts):
            with self._present(part):
                found |= self._watch(part, index)
                self._carry(index)
            self._tick(index + 1)
        return found

    def rewritten(self) -> Outcome:
        """Edit part after part; each sees what the edited ones before it produce."""
        errors: dict[str, float] = {}
        if self.method.foresees:
            self.method = self.method.settled(self.rw.model, self._foreseen())
        if self.before.paths:
            with self._present(self.before):
                errors |= self._unit(self.before, {})
        self._enter()
        for index, part in enumerate(self.parts):
            with self._present(part):
                errors |= self._unit(part, self._watch(part, index))
                if index + 1 < len(self.parts) or self.after.paths:
                    self._carry(index)
            self._tick(index + 1)
        if self.after.paths:
            with self._present(self.after):
                errors |= self._unit(self.after, self._watch(self.after, None))
        return self._outcome({"errors": errors})

    def _foreseen(self) -> dict[str, float]:
        """What the method says of every module of the unchanged model; a unit of the journal."""
        journal = self.context.journal
        if journal is not None and journal.done("foreseen"):
            return dict(journal.read("foreseen")[1]["numbers"])
        found: dict[str, float] = {}
        self._enter()
        for index, part in [*enumerate(self.parts), (None, self.after)]:
            with self._present(part):
                if part.paths:
                    found |= self.method.foresee(self.rw, part.paths, self._watch(part, index))
                for batch in self.hidden if index is not None else []:
                    self.hidden.put(batch, self._through(index, batch, self.hidden.get(batch)))
        self.hidden.drop()
        self.steps.clear()
        if journal is not None:
            journal.save("foreseen", {}, {"numbers": found})
        return found

    # -- one part

    def _unit(self, part: Part, seen: Mapping[str, Statistic]) -> dict[str, float]:
        """Edit a part, or take the edit from the journal; a unit of it is a part."""
        journal = self.context.journal
        if journal is None or not part.paths:
            return self._edit(part, seen)
        if journal.done(part.name):
            return restore(self.rw, *journal.read(part.name))
        before = Snapshot(self.rw)
        errors = self._edit(part, seen)
        tensors, data = before.changes(self.rw, errors)
        journal.save(part.name, tensors, data)
        return errors

    def _edit(self, part: Part, seen: Mapping[str, Statistic]) -> dict[str, float]:
        """Call the method, unless nothing is selected here."""
        return dict(self.method.rewrite_layer(self.rw, part.paths, seen)) if part.paths else {}

    def _watch(self, part: Part, index: int | None) -> dict[str, Statistic]:
        """Run all sequences through a part and gather the statistics of its watched modules."""
        journal = self.context.journal
        if not part.paths or (journal is not None and journal.done(part.name)):
            return {}
        watched = self.method.watch(self.rw, part.paths)
        with Watch(self.method, self.rw, watched) as watch, keeping():
            for batch in self.hidden if watched else []:
                watch.forget_inputs()
                self._through(index, batch, self.hidden.get(batch))
        return watch.seen

    @contextmanager
    def _present(self, part: Part) -> Iterator[None]:
        """The weights of a part in memory; on leaving, those that were read are given up again."""
        model = self.rw.model
        tensors = model.tensors()
        read = [name for name in owners_below(model, part.blocks) if tensors[name].is_meta]
        model.materialize(read)
        yield
        if read and self.context.journal is not None:
            read += self._lazy(part, self.context.journal)
        model.release(read)
        trim()  # the C library keeps what a layer freed, and pieces of every layer would add up

    def _lazy(self, part: Part, journal: Journal) -> list[str]:
        """From now on read what was made here from the journal: a model larger than memory stays on disk."""
        if not part.paths or not journal.done(part.name):
            return []
        weights, tensors = self.rw.model.weights, self.rw.model.tensors()
        names = [name for name in owners_below(self.rw.model, part.blocks) if name not in weights]
        for name in names:
            weights[name] = LazyTensor(
                tuple(tensors[name].shape), tensors[name].dtype, self._reader(part, name)
            )
        return names

    def _reader(self, part: Part, name: str) -> Callable[[], Tensor]:
        return lambda: self.saved(part.name)[name]

    # -- running

    def _enter(self) -> None:
        """Token ids -> the states that enter the first layer."""
        entry = self.layers[0].entry
        with self._present(self.before):
            for number, indices in enumerate(self.batches):
                batch = self.data.batch(self.split, indices)
                self.steps.append(batch.step)
                given = {"ids": batch.ids, "step": batch.step}
                env = {n: given[str(n.target)] for n in self.before.nodes if n.op == "placeholder"}
                self._run(self.before.nodes, env)
                self.hidden.put(number, cast(Tensor, env[cast(fx.Node, entry)]))

    def _carry(self, index: int) -> None:
        """Take the states of all batches through a layer."""
        with keeping():
            for batch in self.hidden:
                self.hidden.put(batch, self._through(index, batch, self.hidden.get(batch)))

    def _through(self, index: int | None, batch: int, x: Tensor) -> Tensor:
        """The states x [B, T, D] of a batch through one layer (None: through what lies behind the layers)."""
        part = self.after if index is None else self.parts[index]
        layer = self.layers[-1 if index is None else index]
        source = layer.exit if index is None else layer.entry
        step = self.steps[batch]
        env: dict[fx.Node, Any] = {cast(fx.Node, source): x}
        env |= {n: step for n in self.before.nodes if n.op == "placeholder" and n.target == "step"}
        self._run(part.nodes, env)
        step.memo.clear()  # masks and rotary tables of every batch would add up
        return x if index is None else cast(Tensor, env[cast(fx.Node, layer.exit)])

    def _run(self, nodes: Sequence[fx.Node], env: dict[fx.Node, Any]) -> None:
        for node in nodes:
            if node.op in ("placeholder", "output"):
                continue
            args = map_arg(node.args, lambda n: env[n])
            kwargs = map_arg(node.kwargs, lambda n: env[n])
            if node.op == "call_module":
                env[node] = self.rw.model.module(str(node.target))(*args, **kwargs)
            elif node.op == "call_function":
                env[node] = cast(Any, node.target)(*args, **kwargs)
            else:
                env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)

    def _tick(self, done: int) -> None:
        self.context.progress(done, len(self.parts), "layer")
        if self.context.stop():
            raise KeyboardInterrupt

    def _outcome(self, measures: dict[str, Any]) -> Outcome:
        sequences = sum(map(len, self.batches))
        return Outcome(self.rw.done(), tuple(self.rw.log), measures | {"sequences": sequences})


def _surveyed(method: Survey, model: Model, context: Context) -> Outcome:
    """Look at the unchanged model on each data, then edit it; a stopped survey starts again."""
    seen: list[Mapping[str, Statistic]] = []
    sequences = 0
    for data in cast(Several, context.data["data"]).each():
        run = _Run(method, model, replace(context, data={"data": data}, journal=None))
        try:
            seen.append(run.seen())
        finally:
            run.hidden.drop()
        sequences += sum(map(len, run.batches))
    rw = Rewriter(model, method.kind)
    rw.model.materialize()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        errors = dict(method.rewrite(rw, seen))
    return Outcome(rw.done(), tuple(rw.log), {"errors": errors, "sequences": sequences})


def _part(name: str, nodes: Sequence[fx.Node], targets: Sequence[str]) -> Part:
    blocks = [str(n.target) for n in nodes if n.op == "call_module"]
    inside = [path for path in targets if any(f"{path}.".startswith(f"{b}.") for b in blocks)]
    return Part(name, nodes, inside, blocks)


def _batches(data: Data, split: str, samples: int, seed: int) -> list[list[int]]:
    """Which sequences are seen, drawn without repetition by the seed, in batches of about TOKENS tokens."""
    size = data.size(split)
    if size == 0:
        raise EffcError(Diagnostic("E610", f"there is no sequence to calibrate on in the split `{split}`"))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed % 2**63))[:samples].tolist()
    length = data.batch(split, order[:1]).ids.shape[1]
    rows = max(1, TOKENS // length)
    return [order[i : i + rows] for i in range(0, len(order), rows)]
