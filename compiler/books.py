"""Books: what a rewriter keeps true while it edits: sources, former names, roles, and the way to each tensor.

Tensors are followed by identity: whatever is moved, renamed or tied stays the same object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from effc.compiler.blocks import Unit
from effc.compiler.model import Model, leaf
from effc.compiler.roles import Role, canonical
from effc.compiler.sharing import walk
from effc.compiler.state_map import Ledger, Past, StateMap, Value

Known = dict[int, tuple[Any, Past | None]]
"""Identity of a tensor -> where it can be read, and its past."""


class Books:
    """The model that is edited, and what is known of its tensors."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.written: set[str] = set()
        """Names of tensors that are new: written, or inside a module swapped in."""
        self._ledger = Ledger()
        tensors = model.tensors()
        self._origins: dict[str, Past] = {name: Past(name, self._ledger.fresh()) for name in tensors}
        self._given = {name: past.number for name, past in self._origins.items()}
        self._given |= {alias: self._given[owner] for alias, owner in model.ties().items()}
        self._shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self._shapes |= {alias: self._shapes[owner] for alias, owner in model.ties().items()}

    @property
    def origins(self) -> dict[str, str]:
        """Final tensor name -> name in the model that came in; names that are wholly new are absent."""
        pasts = ((name, self._origins.get(name)) for name in self.model.tensors())
        return {name: past.origin for name, past in pasts if past is not None and past.origin is not None}

    # -- the way from the tensors that came in to those now, and back

    def value(self, path: str, name: str) -> Value:
        """A tensor as it is now, to derive others from; take it before the module is swapped or written."""
        return Value(getattr(self._reading(path), name), self._number(f"{path}.{name}"))

    def follows(self, path: str, name: str, function: Callable[..., Tensor], *values: Value) -> None:
        """Say that a tensor that is there (of a module swapped in) is a function of earlier values."""
        self._ledger.after[self._number(f"{path}.{name}")] = function, tuple(v.number for v in values)

    def recover(self, value: Value, function: Callable[..., Tensor], *names: str) -> None:
        """Say how an earlier value follows from tensors that are there now, by their full names."""
        self._ledger.settled.add(value.number)
        self._ledger.before[value.number] = [(function, tuple(map(self._number, names)))]

    def state_map(self) -> StateMap:
        """How state dicts of the model that came in and of the edited one become each other."""
        result = {name: self._number(name) for name in self.model.tensors()}
        result |= {alias: result[owner] for alias, owner in self.model.ties().items()}
        return StateMap(self._given, result, self._shapes, self._ledger)

    # -- following

    def _reading(self, path: str) -> Any:
        return self.model.module(path)

    def _number(self, name: str) -> int:
        """The number of the tensor at a full name, or of the one it is tied to."""
        owner = self.model.ties().get(name, name)
        if owner not in self._origins:
            self._origins[owner] = Past(None, self._ledger.fresh(f"insert {owner}"))
        return self._origins[owner].number

    def _replaced(self, owner: str, edit: str) -> None:
        """A new tensor stands at a name."""
        number = self._number(owner)
        past = Past(self._origins[owner].origin, self._ledger.fresh(edit))
        self._ledger.becomes(number, past.number)
        self._origins[owner] = past

    def _known(self) -> Known:
        """Per tensor object: where it can be read, and its past."""
        weights = self.model.weights
        self._alive = self.model.tensors()  # no object dies during an edit, so ids stay unique
        self._fresh = {id(self._alive[n]) for n in self.written if n in self._alive}
        return {id(t): (weights.get(n), self._origins.get(n)) for n, t in self._alive.items()}

    def _follow(self, known: Known, edit: str = "") -> None:
        """Give sources and pasts their new names, by the identity of the tensors."""
        sources: dict[str, Any] = {}
        origins: dict[str, Past] = {}
        self.written = set()
        for name, tensor in self.model.tensors().items():
            source, past = known.get(id(tensor), (None, None))
            if source is not None:
                sources[name] = source
            origins[name] = past or Past(None, self._ledger.fresh(edit or f"an edit of {name}"))
            if id(tensor) in self._fresh or id(tensor) not in known:
                self.written.add(name)
        self.model.weights = sources
        self._origins = origins


def roles_below(gm: fx.GraphModule, path: str) -> dict[str, Role]:
    """Canonical roles of the weight-holding units at and below a path."""
    inside = walk(gm.get_submodule(path))
    below = [f"{path}.{p}" if p else path for p, m in inside if isinstance(m, Unit)]
    return {p: role for p in below if (role := canonical(p)) and leaf(gm, p)}


def hand_step(gm: fx.GraphModule, path: str, new: nn.Module) -> None:
    """Give the step to a block that takes it and takes the place of one that did not; and the reverse."""
    takes = isinstance(new, Unit) and new.takes_step
    steps = [n for n in gm.graph.nodes if n.op == "placeholder" and n.name == "step"]
    changed = False
    for node in gm.graph.nodes if steps else ():
        if node.op == "call_module" and node.target == path and (steps[0] in node.args) != takes:
            node.args = (node.args[0], *steps[: int(takes)])
            changed = True
    if changed:
        gm.recompile()


def ordered(roles: dict[str, Role]) -> dict[str, Role]:
    """Embedding first, then by layer (order inside a layer stays), then the rest."""
    last = 2**31

    def key(item: tuple[str, Role]) -> int:
        path, role = item
        if role.layer is not None:
            return role.layer
        return -1 if path.startswith("embedding") else last

    return dict(sorted(roles.items(), key=key))


def balanced(model: Model) -> Model:
    """The model, where its books are right: roles name modules, every weight has one, sources name tensors.

    Raises:
        TypeError: the first thing that is not.
    """
    for path in model.roles:
        model.module(path)
    for path, unit in model.units():
        if leaf(model.gm, path) and not any(p in model.roles for p in prefixes(path)):
            raise TypeError(f"{path} ({type(unit).__name__}) holds weights but has no role")
    names = model.tensors()
    if stray := sorted(set(model.weights) - set(names)):
        raise TypeError(f"{stray[0]} has a source but is no tensor of the model")
    return model


def spec(module: nn.Module | None) -> Any:
    """What two modules must have alike to take each other's place."""
    return module.spec() if isinstance(module, Unit) else module


def prefixes(path: str) -> list[str]:
    """a.b.c -> a.b.c, a, a.b"""
    return [path, *(path[:i] for i, c in enumerate(path) if c == ".")]
