"""Watch the inputs of modules while a part of a model runs; record an edit, and make it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from effc.compiler.blocks import LoraLinear, Unit
from effc.compiler.rewrite import Edit, Rewriter
from effc.compiler.shapes import Calibrate, Look, Statistic
from effc.compiler.step import Step


class Watch:
    """Hooks on modules; those that read the very same tensor share one statistic.

    A stack of experts is watched expert by expert, under `path[e]`; a block that mixes positions is looked at
    with its step.
    """

    def __init__(self, method: Calibrate, rw: Rewriter, paths: Sequence[str]) -> None:
        self.method, self.rw, self.paths = method, rw, paths
        self.seen: dict[str, Statistic] = {}
        self._inputs: list[tuple[Tensor, Statistic]] = []

    def __enter__(self) -> Self:
        self._handles = [
            self.rw.module(path).register_forward_pre_hook(self._hook(path)) for path in self.paths
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self.forget_inputs()

    def forget_inputs(self) -> None:
        """Start a forward pass: inputs are compared within one pass, and kept alive for as long."""
        self._inputs.clear()

    def _hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            x, *which = args
            if which and isinstance(which[0], Step):  # a block that mixes positions
                self._looked(path).look(module, x, which[0])  # x itself: hooks inside know it again
                return
            key = f"{path}[{which[0]}]" if which else path
            for other, statistic in self._inputs:
                if other is x:
                    self.seen[key] = statistic
                    return
            if key not in self.seen:
                self.seen[key] = self.method.start(self.rw, path)
            self.seen[key].add(x.detach().flatten(0, -2))
            self._inputs.append((x, self.seen[key]))

        return see

    def _looked(self, path: str) -> Look:
        if path not in self.seen:
            self.seen[path] = self.method.start(self.rw, path)
        statistic = self.seen[path]
        if not isinstance(statistic, Look):
            raise TypeError(f"`{self.method.kind}` watches `{path}`, whose statistic cannot look at a block")
        return statistic


class Snapshot:
    """The modules and tensors of a model at one moment, by identity; the references keep ids unique."""

    def __init__(self, rw: Rewriter) -> None:
        self.modules = {path: rw.module(path) for path in _places(rw)}
        self.tensors = rw.model.tensors()
        self.log = len(rw.log)

    def changes(self, rw: Rewriter, errors: Mapping[str, float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What an edit has changed since, for a journal: new tensors, and how modules and ties now are."""
        swapped = [path for path in _places(rw) if rw.module(path) is not self.modules.get(path)]
        known = {id(tensor) for tensor in self.tensors.values()}
        tensors = {name: t for name, t in rw.model.tensors().items() if id(t) not in known}
        below = tuple(f"{path}." for path in swapped)
        data = {
            "specs": {path: rw.module(path).spec() for path in swapped},
            "ties": {a: o for a, o in rw.model.ties().items() if a.startswith(below) and o in tensors},
            "errors": dict(errors),
            "log": [[e.verb, e.path, e.detail] for e in rw.log[self.log :]],
        }
        return tensors, data


def _places(rw: Rewriter) -> list[str]:
    """Where a module may be put: every place with a role, and what lies beneath an adapter."""
    roles = list(rw.model.roles)
    return roles + [f"{path}.base" for path in roles if isinstance(rw.module(path), LoraLinear)]


def restore(rw: Rewriter, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> dict[str, float]:
    """Make an edit again from what `Snapshot.changes` recorded; returns the errors it had reported."""
    log = len(rw.log)
    for path, spec in data["specs"].items():
        old, new = rw.module(path), Unit.from_spec(spec)
        for name in new._parameters.keys() & old._parameters.keys():
            if f"{path}.{name}" not in tensors and new._parameters[name] is not None:
                new._parameters[name] = old._parameters[name]  # untouched, e.g. a bias
        for name, child in old.named_children():
            new._modules[name] = child
        rw.swap(path, new)
    for alias, owner in data["ties"].items():
        (path, _, slot), (source, _, name) = alias.rpartition("."), owner.rpartition(".")
        held = rw.module(source)
        slots = held._parameters if name in held._parameters else held._buffers
        mine = rw.module(path)
        (mine._parameters if slot in mine._parameters else mine._buffers)[slot] = slots[name]
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] in data["specs"]:
            rw.model.place(name, tensor)
        else:
            path, _, slot = name.rpartition(".")
            rw.write(path, slot, tensor)
    rw.log[log:] = [Edit(*entry) for entry in data["log"]]
    return dict(data["errors"])
