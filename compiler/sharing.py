"""Sharing: tensors that several names or several models hold, and module trees copied without their data."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from effc.compiler.blocks import Unit


def walk(module: nn.Module, once: bool = True) -> list[tuple[str, nn.Module]]:
    """Every module below with its path, parents first; `once` leaves out what was met under another path.

    The same as `named_modules`, several times faster; large models are walked for every edit.
    """
    found: list[tuple[str, nn.Module]] = []
    _walk("", module, set() if once else None, found)
    return found


def _walk(path: str, item: nn.Module, seen: set[int] | None, found: list[tuple[str, nn.Module]]) -> None:
    """No closure: one that calls itself would keep all modules alive until cycles are collected."""
    if seen is not None:
        if id(item) in seen:
            return
        seen.add(id(item))
    found.append((path, item))
    for name, child in item._modules.items():
        if child is not None:
            _walk(f"{path}.{name}" if path else name, child, seen, found)


def owned(module: nn.Module, once: bool = True) -> list[tuple[str, Tensor]]:
    """Parameters, then buffers, by name; `once` leaves out what was met under another name."""
    parameters: list[tuple[str, Tensor]] = []
    buffers: list[tuple[str, Tensor]] = []
    seen: set[int] = set()
    for path, item in walk(module, once):
        for into, slots in ((parameters, item._parameters), (buffers, item._buffers)):
            for name, tensor in slots.items():
                if tensor is None or (once and id(tensor) in seen):
                    continue
                seen.add(id(tensor))
                into.append((f"{path}.{name}" if path else name, tensor))
    return [*parameters, *buffers]


def aliases(module: nn.Module) -> dict[str, str]:
    """Names that share a parameter or buffer object with an earlier name: alias -> first name."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, tensor in owned(module, once=False):
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            found[name] = owner
    return found


def put(gm: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Set one tensor (as one parameter, where a parameter was) at all names."""
    new: Tensor | None = None
    for name in names:
        path, _, leaf_name = name.rpartition(".")
        module = gm.get_submodule(path)
        slots: dict[str, Any] = module._parameters if leaf_name in module._parameters else module._buffers
        old = slots[leaf_name]
        if new is None:
            parameter = isinstance(old, nn.Parameter)
            new = nn.Parameter(tensor.detach(), old.requires_grad) if parameter else tensor
        slots[leaf_name] = new


def cloned_modules(gm: fx.GraphModule) -> dict[str, Any]:
    """Copies of all called modules, with tensors of their own that share storage."""
    memo: dict[int, Tensor] = {}
    called = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op in ("call_module", "get_attr"))
    found: dict[str, Any] = {}
    for path in called:
        item: Any = gm
        for word in path.split("."):
            item = getattr(item, word)
        found[path] = cloned(item, memo) if isinstance(item, nn.Module) else _shared_once(item, memo)
    return found


def cloned(module: nn.Module, memo: dict[int, Tensor]) -> nn.Module:
    """A copy of a module tree without copying data; `memo` keeps ties."""
    if not isinstance(module, Unit):
        for tensor in (*module.parameters(), *module.buffers()):
            _shared_once(tensor, memo)
        kept: dict[int, Any] = dict(memo)
        return copy.deepcopy(module, kept)  # foreign code may hold its own references to its children
    new = module.__class__.__new__(module.__class__)
    new.__dict__ = {name: _own(name, value) for name, value in module.__dict__.items()}
    slots: dict[str, Any]
    for kind in ("_parameters", "_buffers"):
        slots = {}
        for name, tensor in getattr(module, kind).items():
            slots[name] = None if tensor is None else _shared_once(tensor, memo)
        new.__dict__[kind] = slots
    new.__dict__["_modules"] = {n: m and cloned(m, memo) for n, m in module._modules.items()}
    return new


def _own(name: str, value: Any) -> Any:
    """Plain containers are copied, hooks stay behind: they belong to whoever registered them."""
    if name.endswith("_hooks") or "_hooks_" in name:
        return type(value)() if isinstance(value, dict) else value
    return type(value)(value) if isinstance(value, dict | list | set) else value


def _shared_once(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in memo:
        memo[id(tensor)] = _shared(tensor)
    return memo[id(tensor)]


def _shared(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor.detach()


def cloned_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph; node.meta goes along."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def tie(gm: nn.Module, alias: str, owner: str) -> None:
    """Make the tensor named `alias` the very same object as the one named `owner`."""
    source, _, name = owner.rpartition(".")
    path, _, slot = alias.rpartition(".")
    tensor = getattr(gm.get_submodule(source), name)
    module = gm.get_submodule(path)
    slots: dict[str, Any] = module._parameters if slot in module._parameters else module._buffers
    if slot not in slots:
        raise KeyError(f"{path} has no tensor {slot}")
    if slots[slot].shape != tensor.shape:
        raise ValueError(f"{alias} {list(slots[slot].shape)} cannot be {owner} {list(tensor.shape)}")
    slots[slot] = tensor
