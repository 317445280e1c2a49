"""Soundness: what must be true of a model after any edit, and the first thing that is not.

The graph is well formed and runs, tensors have the shapes of their units, roles and ties are true.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from effc.compiler.books import balanced
from effc.compiler.equality import Call, Stopped, run
from effc.compiler.model import Model, roles_of
from effc.compiler.rewrite import Rewriter
from effc.compiler.trace import TracedModel


@dataclass(frozen=True, slots=True)
class Flaw:
    """One thing that is wrong: the check that found it, the node, and what was measured."""

    check: str
    node: str
    said: str


def flaw(before: Model, rw: Rewriter, probes: Sequence[Call]) -> Flaw | None:
    """The first flaw of the model that a rewriter holds; `before` is the model it was given."""
    return next(_flaws(before, rw, probes), None)


def _flaws(before: Model, rw: Rewriter, probes: Sequence[Call]) -> Iterator[Flaw]:
    after = rw.model
    yield from _graph(after)
    yield from _shapes(after)
    yield from _roles(after)
    yield from _ties(before, rw)
    yield from _runs(before, after, probes)


def _graph(model: Model) -> Iterator[Flaw]:
    try:
        model.gm.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        yield Flaw("graph", "the graph", str(error).partition("\n")[0])
    for node in model.gm.graph.nodes:
        if node.op != "call_module":
            continue
        try:
            model.module(str(node.target))
        except AttributeError:
            yield Flaw("graph", str(node.target), "a node calls a module that is not there")


def _shapes(model: Model) -> Iterator[Flaw]:
    """Tensors of a unit against those that its own arguments ask for."""
    for path, unit in model.units():
        if not (unit._parameters or unit._buffers):
            continue
        fresh = unit.blank()
        for slots, due in ((unit._parameters, fresh._parameters), (unit._buffers, fresh._buffers)):
            for name, tensor in slots.items():
                wanted = due.get(name)
                if (tensor is None) != (wanted is None):
                    yield Flaw("shapes", f"{path}.{name}", f"{'lacks' if tensor is None else 'has'} a tensor")
                elif tensor is not None and wanted is not None and tensor.shape != wanted.shape:
                    said = f"is {list(tensor.shape)}, its {type(unit).__name__} takes {list(wanted.shape)}"
                    yield Flaw("shapes", f"{path}.{name}", said)


def _roles(model: Model) -> Iterator[Flaw]:
    for path in model.roles:
        try:
            model.module(path)
        except AttributeError:
            yield Flaw("roles", path, f"the role {model.roles[path]} names no module")
            return
    try:
        balanced(model)
    except TypeError as error:
        yield Flaw("roles", str(error).partition(" ")[0], str(error))
    if isinstance(model, TracedModel):
        return
    for path, role in roles_of(model.gm).items():
        if model.roles.get(path) != role:
            yield Flaw("roles", path, f"plays {model.roles.get(path)}, by its path {role}")


def _ties(before: Model, rw: Rewriter) -> Iterator[Flaw]:
    """Tensors that were one and are two now, though nothing said `untie`."""
    untied = [edit.path for edit in rw.log if edit.verb == "untie"]
    now = rw.model.ties()
    names = set(rw.model.tensors()) | set(now)
    if any(edit.verb == "arrange" for edit in rw.log):
        return  # copies of layers are not tied, and names move
    for alias, owner in before.ties().items():
        if not {alias, owner} <= names or now.get(alias, alias) == now.get(owner, owner):
            continue
        if not any(name.startswith(f"{path}.") for path in untied for name in (alias, owner)):
            yield Flaw("ties", alias, f"was one tensor with {owner} and is another now; nothing untied them")


def _runs(before: Model, after: Model, probes: Sequence[Call]) -> Iterator[Flaw]:
    for call in probes:
        want = run(before, call)
        try:
            got = run(after, call)
        except Stopped as stopped:
            yield Flaw("shapes", stopped.node, str(stopped.__cause__).strip().partition("\n")[0])
            return
        left, right = ([list(t.shape) for t in tensors] for tensors in (want, got))
        if left != right:
            yield Flaw("shapes", "output", f"gives {right}, before {left}")
