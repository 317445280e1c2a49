"""Rewriter: the only door through which a stage may change a model. It keeps the books."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn

from effc.compiler.blocks import Linear, Unit
from effc.compiler.books import Books, Known, balanced, hand_step, ordered, prefixes, roles_below, spec
from effc.compiler.layers import arranged, runs
from effc.compiler.match import Hit, find
from effc.compiler.model import Model
from effc.compiler.pattern import Pattern
from effc.compiler.roles import Role
from effc.compiler.sharing import cloned, owned, put
from effc.compiler.state_map import Value
from effc.specs.diagnostic import Diagnostic, EffcError


@dataclass(frozen=True, slots=True)
class Edit:
    """One entry of the edit log, as `effc explain` prints it."""

    verb: str
    path: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verb:<9} {self.path:<28} {self.detail}"


class Rewriter(Books):
    """Edits a private clone of a model. The clone shares storage with its source, so tensors are never
    written in place: `write` puts a new one. Every edit is logged; roles, ties and sources follow.
    """

    def __init__(self, model: Model, origin: str = "rewrite") -> None:
        """`origin` is the kind of the stage; nodes it changes carry it."""
        super().__init__(model.clone())
        self.origin = origin
        self.log: list[Edit] = []
        self._held: Known | None = None

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
        self._replaced(owner, f"write {full} {detail}".strip())
        self._touch(path)
        self.log.append(Edit("write", full, detail or f"{list(tensor.shape)} {tensor.dtype}"))

    def derive(
        self, path: str, name: str, function: Callable[..., Tensor], *values: Value, detail: str = ""
    ) -> None:
        """Write function(*values), so that `state_map` can do the same with other numbers."""
        self.write(path, name, function(*(value.tensor for value in values)), detail)
        self.follows(path, name, function, *values)

    def swap(self, path: str, new: nn.Module, detail: str = "") -> None:
        """Put another module in place of one; role, inputs and outputs stay.

        Tensors of the old module that the new one holds keep their source. Where the new module is a packed
        form of the old, like children move over: learned positions beside an embedding.
        """
        old = self.model.module(path)
        if isinstance(new, type(old)) and type(new) is not type(old):
            for name, child in old._modules.items():
                if spec(new._modules.get(name, child)) == spec(child):
                    new._modules[name] = child
        before = self._held or self._known()
        parent, _, name = path.rpartition(".")
        self.model.module(parent)._modules[name] = new
        hand_step(self.model.gm, path, new)
        new.train(self.model.training)
        roles = {p: r for p, r in self.model.roles.items() if not p.startswith(path + ".")}
        self.model.roles = ordered(roles | roles_below(self.model.gm, path))
        if self._held is None:
            self._follow(before, f"swap {path}")
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
        pairs = owned(source, once=False)
        numbers = dict.fromkeys((self._number(f"{path}.{n}"), self._number(f"{to}.{n}")) for n, _ in pairs)
        for name, tensor in pairs:
            inner, _, slot = name.rpartition(".")
            module = target.get_submodule(inner)
            slots: dict[str, Any] = module._parameters if slot in module._parameters else module._buffers
            if slot not in slots or slots[slot] is None or slots[slot].shape != tensor.shape:
                raise ValueError(f"{path}.{name} cannot be {to}.{name}: absent or of another shape")
            slots[slot] = tensor
        self._follow(before)
        for old, new in numbers:
            self._ledger.becomes(old, new)
        self._touch(path)
        self.log.append(Edit("tie", path, f"= {to}"))

    def untie(self, path: str) -> None:
        """Give the module at `path` tensors of its own; their values stay, and what it shares within."""
        before = self._known()
        module = self.model.module(path)
        shared = {name for pair in self.model.ties().items() for name in pair}
        places: dict[int, list[str]] = {}
        for name, tensor in owned(module, once=False):
            if f"{path}.{name}" in shared:
                places.setdefault(id(tensor), []).append(name)
        for key, names in places.items():
            inner, _, slot = names[0].rpartition(".")
            holder = module.get_submodule(inner)
            put(module, names, getattr(holder, slot).detach())
            before[id(getattr(holder, slot))] = before[key]
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
        self.model = old.like(gm, ordered(kept | roles))
        self._follow(before)
        self.log.append(Edit("arrange", "layers", f"{old.layers} -> {len(order)}: {runs(order)}"))

    def insert(self, path: str, module: nn.Module, after: str, role: Role | None = None) -> None:
        """Put a new block behind the node at `after`; everything that read it reads the block.

        `role` is given in traced models, where paths do not tell it.
        """
        node = self._node(after)
        graph = self.model.gm.graph
        self.model.gm.add_submodule(path, module.train(self.model.training))
        with graph.inserting_after(node):
            takes_step = isinstance(module, Unit) and module.takes_step
            steps = [n for n in graph.nodes if takes_step and n.op == "placeholder" and n.name == "step"]
            new = graph.call_module(path, (node, *steps))
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        new.meta["origin"] = self.origin
        roles = {path: role} if role is not None else roles_below(self.model.gm, path)
        self.model.roles = ordered(self.model.roles | roles)
        self.model.gm.recompile()
        self.log.append(Edit("insert", path, f"after {after}"))

    def remove(self, path: str) -> None:
        """Take a block or function out of the graph: what read it reads its first input."""
        node = self._node(path)
        source = next(a for a in node.args if isinstance(a, fx.Node))
        node.replace_all_uses_with(source)
        self.model.gm.graph.erase_node(node)
        self._tidy()
        self.log.append(Edit("remove", path, "its input passes through"))

    @contextmanager
    def surgery(self, path: str, detail: str) -> Iterator[fx.Graph]:
        """The graph itself, for edits that no verb makes: new functions, other arguments.

        Afterwards it is checked, what nothing reads any more is dropped, and `path` and `detail` are logged.
        """
        graph, before = self.model.gm.graph, set(self.model.gm.graph.nodes)
        yield graph
        for node in graph.nodes:
            if node not in before:
                node.meta["origin"] = self.origin
        graph.lint()
        graph.eliminate_dead_code()
        self._tidy()
        self.log.append(Edit("surgery", path, detail))

    def node(self, name: str) -> fx.Node:
        """The node of the graph that calls the block at a path, or has a name, as captures give it.

        Raises:
            EffcError: E403 when there is none.
        """
        return self._node(name)

    def done(self) -> Model:
        """The edited model, checked: the graph is sound, every weight has a role, roles name modules.

        Raises:
            TypeError: the books are wrong, which is a bug in the method.
        """
        self.model.gm.graph.lint()
        return balanced(self.model)

    # -- books

    def _reading(self, path: str) -> Any:
        return self.present(path)

    def _node(self, path: str) -> fx.Node:
        for node in self.model.gm.graph.nodes:
            if path == (node.target if node.op == "call_module" else node.name):
                return cast(fx.Node, node)
        raise EffcError(Diagnostic("E403", f"no block is at `{path}`"))

    def _tidy(self) -> None:
        """Drop modules that no node calls any more, and their roles."""
        gm = self.model.gm
        known = self._known()
        called = {str(n.target) for n in gm.graph.nodes if n.op in ("call_module", "get_attr")}
        above = {part for path in called for part in prefixes(path)}
        for path in [p for p, _ in gm.named_modules(remove_duplicate=False) if p]:
            if path not in above and called.isdisjoint(prefixes(path)):
                gm.delete_submodule(path)
        there = {p for p, _ in gm.named_modules(remove_duplicate=False)}
        self.model.roles = {p: r for p, r in self.model.roles.items() if p in there}
        gm.recompile()
        self._follow(known)

    def _touch(self, path: str) -> None:
        for node in self.model.gm.graph.nodes:
            if node.op == "call_module" and (path + ".").startswith(f"{node.target}."):
                node.meta["origin"] = self.origin
