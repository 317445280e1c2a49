"""Rewriter: the only door through which a stage may change a model. It keeps the books."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn

from effc.compiler.blocks import Linear, Unit
from effc.compiler.layers import arranged, runs
from effc.compiler.match import Hit, Pattern, find
from effc.compiler.model import Model, leaf
from effc.compiler.roles import Role, canonical
from effc.compiler.sharing import cloned, put, walk
from effc.specs.diagnostic import Diagnostic, EffcError


@dataclass(frozen=True, slots=True)
class Edit:
    """One entry of the edit log, as `effc explain` prints it."""

    verb: str
    path: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verb:<9} {self.path:<28} {self.detail}"


class Rewriter:
    """Edits a private clone of a model. The clone shares storage with its source, so tensors are never
    written in place: `write` puts a new one. Every edit is logged; roles, ties and sources follow.
    """

    def __init__(self, model: Model, origin: str = "rewrite") -> None:
        """`origin` is the kind of the stage; nodes it changes carry it."""
        self.model = model.clone()
        self.origin = origin
        self.log: list[Edit] = []
        self.written: set[str] = set()
        """Names of tensors that are new: written, or inside a module swapped in."""
        self._origins = {name: name for name in self.model.tensors()}
        self._held: dict[int, tuple[Any, str | None]] | None = None

    # -- looking

    def paths(self, prefix: str = "") -> list[str]:
        """Module paths whose role is within `prefix`, by layer, then name."""
        return self.model.paths(prefix)

    def role(self, path: str) -> Role:
        return self.model.roles[path]

    def module(self, path: str) -> Any:
        return self.model.module(path)

    present = module  # with its weights in memory, for reading; they may go when the module is dropped

    def linear(self, path: str) -> Linear:
        """The dense linear at `path`, for reading; state `dense` in the contract.

        Raises:
            EffcError: E401 when another kind of module is there.
        """
        module = self.model.module(path)
        if not isinstance(module, Linear | nn.Linear):
            raise EffcError(Diagnostic("E401", f"`{path}` is {type(module).__name__}, not a dense linear"))
        return cast(Linear, module)

    def match(self, pattern: Pattern) -> Iterator[Hit]:
        """Places where a pattern holds now, in graph order; see `effc.pattern`."""
        return iter(find(self.model, pattern))

    @property
    def origins(self) -> dict[str, str]:
        """Final tensor name -> name in the model that came in; names that are wholly new are absent."""
        return {name: self._origins[name] for name in self.model.tensors() if name in self._origins}

    # -- editing

    def write(self, path: str, name: str, tensor: Tensor, detail: str = "") -> None:
        """Replace one tensor; names tied to it get it too. The shape stays (else swap the module)."""
        full = f"{path}.{name}"
        old = cast(Tensor, getattr(self.model.module(path), name))
        if old.shape != tensor.shape:
            raise ValueError(f"{full} is {list(old.shape)}, the new tensor {list(tensor.shape)}")
        self.model.place(full, tensor)
        owner = self.model.ties().get(full, full)
        self.model.weights.pop(owner, None)
        self.written.add(owner)
        self._touch(path)
        self.log.append(Edit("write", full, detail or f"{list(tensor.shape)} {tensor.dtype}"))

    def swap(self, path: str, new: nn.Module, detail: str = "") -> None:
        """Put another module in place of one; role, inputs and outputs stay.

        Tensors of the old module that the new one holds keep their source. Where the new module is a packed
        form of the old, like children move over: learned positions beside an embedding.
        """
        old = self.model.module(path)
        if isinstance(new, type(old)) and type(new) is not type(old):
            for name, child in old._modules.items():
                if _spec(new._modules.get(name, child)) == _spec(child):
                    new._modules[name] = child
        before = self._held or self._known()
        parent, _, name = path.rpartition(".")
        self.model.module(parent)._modules[name] = new
        new.train(self.model.training)
        roles = {p: r for p, r in self.model.roles.items() if not p.startswith(path + ".")}
        self.model.roles = _ordered(roles | _roles_below(self.model.gm, path))
        if self._held is None:
            self._follow(before)
        self._touch(path)
        self.log.append(Edit("swap", path, detail or f"{type(old).__name__} -> {type(new).__name__}"))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Swaps inside are booked once, at the end: hundreds of them in a large model take no time."""
        self._held = known = self._known()
        yield
        self._held = None
        self._follow(known)

    def tie(self, path: str, to: str) -> None:
        """Make every tensor at `path` the very same as its namesake at `to`."""
        source, target = self.model.module(to), self.model.module(path)
        before = self._known()
        pairs = [(n, t) for n, t in (*source.named_parameters(), *source.named_buffers())]
        for name, tensor in pairs:
            inner, _, slot = name.rpartition(".")
            module = target.get_submodule(inner)
            slots: dict[str, Any] = module._parameters if slot in module._parameters else module._buffers
            if slot not in slots or slots[slot] is None or slots[slot].shape != tensor.shape:
                raise ValueError(f"{path}.{name} cannot be {to}.{name}: absent or of another shape")
            slots[slot] = tensor
        self._follow(before)
        self._touch(path)
        self.log.append(Edit("tie", path, f"= {to}"))

    def untie(self, path: str) -> None:
        """Give the module at `path` tensors of its own; their values stay."""
        before = self._known()
        module = self.model.module(path)
        shared = {name for pair in self.model.ties().items() for name in pair}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if f"{path}.{name}" in shared:
                put(module, [name], tensor.detach())
                inner, _, slot = name.rpartition(".")
                before[id(getattr(module.get_submodule(inner), slot))] = before[id(tensor)]
        self._follow(before)
        self._touch(path)
        self.log.append(Edit("untie", path, "its own tensors"))

    def remove_layers(self, layers: Sequence[int]) -> None:
        """Take layers out; those behind move up.

        Raises:
            EffcError: E402 when a layer does not exist or none would be left.
        """
        gone = set(layers)
        if missing := sorted(gone - set(range(self.model.layers))):
            raise EffcError(Diagnostic("E402", f"there is no layer {missing[0]} to remove"))
        self.arrange_layers([i for i in range(self.model.layers) if i not in gone])

    def arrange_layers(self, order: Sequence[int]) -> None:
        """New layer i becomes old layer order[i]; a layer named again is copied (values alike, not tied).

        Raises:
            EffcError: E402 when a layer does not exist, none is left, or the graph has no plain layers.
        """
        before = self._known()
        copies: dict[int, Tensor] = {}

        def copy(module: nn.Module) -> nn.Module:
            memo: dict[int, Tensor] = {}
            new = cloned(module, memo)
            copies.update({id(t): t for t in memo.values()})  # keeps them alive, so ids stay unique
            before.update({id(t): before[old] for old, t in memo.items() if old in before})
            return new

        old = self.model
        gm, places = arranged(old.gm, order, copy, self.origin)
        roles = {
            new: Role(old.roles[path].name, layer)
            for new, (path, layer) in places.items()
            if path in old.roles
        }
        kept = {path: role for path, role in old.roles.items() if role.layer is None}
        self.model = old.like(gm, _ordered(kept | roles))
        self._follow(before)
        self.log.append(Edit("arrange", "layers", f"{old.layers} -> {len(order)}: {runs(order)}"))

    def insert(self, path: str, module: nn.Module, after: str) -> None:
        """Put a new block behind the block at `after`; everything that read `after` reads it."""
        node = self._node(after)
        graph = self.model.gm.graph
        self.model.gm.add_submodule(path, module)
        with graph.inserting_after(node):
            takes_step = isinstance(module, Unit) and module.takes_step
            step = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "step")
            new = graph.call_module(path, (node, step) if takes_step else (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        new.meta["origin"] = self.origin
        self.model.roles = _ordered(self.model.roles | _roles_below(self.model.gm, path))
        self.model.gm.recompile()
        self.log.append(Edit("insert", path, f"after {after}"))

    def remove(self, path: str) -> None:
        """Take a block out of the graph: what read it reads its input."""
        node = self._node(path)
        node.replace_all_uses_with(cast(fx.Node, node.args[0]))
        self.model.gm.graph.erase_node(node)
        self.model.gm.delete_submodule(path)
        self.model.roles = {
            p: r for p, r in self.model.roles.items() if p != path and not p.startswith(path + ".")
        }
        self.model.gm.recompile()
        self.log.append(Edit("remove", path, "its input passes through"))

    def done(self) -> Model:
        """The edited model, checked: the graph is sound, every weight has a role, roles name modules.

        Raises:
            TypeError: the books are wrong, which is a bug in the method.
        """
        model = self.model
        model.gm.graph.lint()
        for path in model.roles:
            model.module(path)
        for path, unit in model.units():
            above = [path, *(path[:i] for i, c in enumerate(path) if c == ".")]
            if leaf(model.gm, path) and not any(p in model.roles for p in above):
                raise TypeError(f"{path} ({type(unit).__name__}) holds weights but has no role")
        names = model.tensors()
        if stray := sorted(set(model.weights) - set(names)):
            raise TypeError(f"{stray[0]} has a source but is no tensor of the model")
        return model

    # -- books

    def _node(self, path: str) -> fx.Node:
        for node in self.model.gm.graph.nodes:
            if node.op == "call_module" and node.target == path:
                return cast(fx.Node, node)
        raise EffcError(Diagnostic("E403", f"no block is at `{path}`"))

    def _touch(self, path: str) -> None:
        for node in self.model.gm.graph.nodes:
            if node.op == "call_module" and (path + ".").startswith(f"{node.target}."):
                node.meta["origin"] = self.origin

    def _known(self) -> dict[int, tuple[Any, str | None]]:
        """Per tensor object: where it can be read, and its name in the model that came in."""
        weights = self.model.weights
        self._alive = self.model.tensors()  # no object dies during an edit, so ids stay unique
        self._fresh = {id(self._alive[n]) for n in self.written if n in self._alive}
        return {id(t): (weights.get(n), self._origins.get(n)) for n, t in self._alive.items()}

    def _follow(self, known: dict[int, tuple[Any, str | None]]) -> None:
        """Give sources and origins their new names, by the identity of the tensors."""
        sources: dict[str, Any] = {}
        origins: dict[str, str] = {}
        self.written = set()
        for name, tensor in self.model.tensors().items():
            source, origin = known.get(id(tensor), (None, None))
            if source is not None:
                sources[name] = source
            if origin is not None:
                origins[name] = origin
            if id(tensor) in self._fresh or id(tensor) not in known:
                self.written.add(name)
        self.model.weights = sources
        self._origins = origins


def _spec(module: nn.Module | None) -> Any:
    return module.spec() if isinstance(module, Unit) else module


def _roles_below(gm: fx.GraphModule, path: str) -> dict[str, Role]:
    """Canonical roles of the weight-holding units at and below a path."""
    inside = walk(gm.get_submodule(path))
    below = [f"{path}.{p}" if p else path for p, m in inside if isinstance(m, Unit)]
    return {p: role for p in below if (role := canonical(p)) and leaf(gm, p)}


def _ordered(roles: dict[str, Role]) -> dict[str, Role]:
    """Embedding first, then by layer (order inside a layer stays), then the rest."""
    last = 2**31

    def key(item: tuple[str, Role]) -> int:
        path, role = item
        if role.layer is not None:
            return role.layer
        return -1 if path.startswith("embedding") else last

    return dict(sorted(roles.items(), key=key))
