"""Show: a model as text, a line a node with shape, dtype, parameters and origin; like layers folded into one.

Letters: B sequences, T tokens, N tokens of all sequences that run a loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from effc.compiler.blocks import Unit
from effc.compiler.model import Model
from effc.compiler.roles import layer_of
from effc.compiler.sharing import aliases
from effc.specs.units import fmt_bytes, fmt_count


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what `effc show` prints and what its JSON holds."""

    path: str
    type: str
    shape: tuple[str, ...]
    dtype: str
    params: int
    bytes: int
    origin: str
    detail: str
    repeat: int = 1
    """How many like layers the line stands for."""

    def alike(self, other: Row) -> bool:
        """The same but for the layer's number."""
        plain = [r.path.split(".", 2)[-1] for r in (self, other)]
        mine = (self.type, self.shape, self.dtype, self.params, self.origin, self.detail)
        theirs = (other.type, other.shape, other.dtype, other.params, other.origin, other.detail)
        return plain[0] == plain[1] and mine == theirs


def rows(model: Model) -> list[Row]:
    """A row for every block and addition of the graph, in order."""
    width: dict[fx.Node, tuple[str, ...]] = {}
    owned = _owned(model)
    found: list[Row] = []
    for node in model.gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        origin = node.meta.get("origin", "")
        if node.op != "call_module":
            shape = next((width[a] for a in node.all_input_nodes if a in width), ())
            width[node] = shape
            name = getattr(node.target, "__name__", str(node.target))
            found.append(Row(node.name, name, shape, "", 0, 0, origin, ""))
            continue
        path = str(node.target)
        module = model.module(path)
        known = next((width[a] for a in node.all_input_nodes if a in width), ("B", "T", "?"))
        width[node] = shape = _shape(node, module, known)
        tensors = [t for n, t in owned.items() if n.startswith(path + ".")]
        params = sum(count for _, count in tensors)
        stored = sum(t.numel() * t.element_size() for t, _ in tensors)
        found.append(
            Row(path, type(module).__name__, shape, _dtypes(module), params, stored, origin, _detail(module))
        )
    return found


def folded(found: list[Row]) -> Iterator[tuple[list[Row], int]]:
    """Runs of like layers: (the rows of the first, how many)."""
    groups: list[list[Row]] = []
    last: int | None = None
    layer: int | None = None
    for row in found:
        here = layer_of(row.path)
        layer = here if here is not None else (layer if row.type == "add" else None)
        if layer is None or layer != last:
            groups.append([])
        groups[-1].append(row)
        last = layer
    index = 0
    while index < len(groups):
        like = 1
        while index + like < len(groups) and _same(groups[index], groups[index + like]):
            like += 1
        yield groups[index], like
        index += like


def show(model: Model) -> str:
    """The model as a table, repeated layers once with `x N`."""
    lines = [("node", "type", "shape", "dtype", "params", "bytes", "from", "")]
    total = size = 0
    for group, times in folded(rows(model)):
        for place, row in enumerate(group):
            total += row.params * times
            size += row.bytes * times
            shape = "[" + ", ".join(row.shape) + "]" if row.shape else ""
            path = row.path if times == 1 else _ranged(row, times)
            mark = f"x {times}" if times > 1 and place == 0 else ""
            count, held = (fmt_count(row.params), fmt_bytes(row.bytes)) if row.params else ("", "")
            detail = "  ".join(word for word in (mark, row.detail) if word)
            lines.append((path, row.type, shape, row.dtype, count, held, row.origin, detail))
    widths = [max(len(line[c]) for line in lines) for c in range(8)]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    ties = [f"{alias} = {owner}" for alias, owner in model.ties().items()]
    end = [f"{fmt_count(total)} parameters, {fmt_bytes(size)}"] + [f"tied: {tie}" for tie in ties[:8]]
    return "\n".join(text + end + ([f"tied: {len(ties) - 8} more"] if len(ties) > 8 else []))


def _owned(model: Model) -> dict[str, tuple[Tensor, int]]:
    """Tensor name -> (tensor, logical weights); a tied tensor under its first name only."""
    later = aliases(model.gm)
    found: dict[str, tuple[Tensor, int]] = {}
    for path, unit in model.units():
        named = {id(t): n for n, t in (*unit._parameters.items(), *unit._buffers.items()) if t is not None}
        for tensor, logical in unit.stored():
            name = f"{path}.{named[id(tensor)]}"
            if name not in later:
                found[name] = (tensor, logical)
    return found


def _shape(node: fx.Node, module: nn.Module, known: tuple[str, ...]) -> tuple[str, ...]:
    sample = node.meta.get("tensor_meta")
    if sample is not None:
        return tuple(str(n) for n in sample.shape)
    out = getattr(module, "out_features", None) or getattr(module, "width", None)
    leads: tuple[str, ...] = getattr(module, "leads", known[:-1])
    return (*leads, str(out)) if out else known


def _dtypes(module: nn.Module) -> str:
    kinds = {str(t.dtype).removeprefix("torch."): None for t in (*module.parameters(), *module.buffers())}
    return "+".join(kinds)


def _detail(module: nn.Module) -> str:
    """What is unusual inside a block: units that are no plain Linear or Norm, window, heads."""
    words: list[str] = [said] if (said := getattr(module, "says", "")) else []
    heads = getattr(module, "heads", None)
    if heads:
        words.append(f"{heads}/{module.kv_heads} heads of {module.head_dim}")
        if module.window:
            words.append(f"window {module.window}")
    plain = {"Linear", "StackedLinear", "Norm", "Table", "Experts"}
    inner: dict[str, list[str]] = {}
    for name, unit in module.named_modules():
        if name and isinstance(unit, Unit) and type(unit).__name__ not in plain:
            inner.setdefault(type(unit).__name__, []).append(name)
    return ", ".join(words + [f"{kind}: {' '.join(names)}" for kind, names in inner.items()])


def _same(one: list[Row], two: list[Row]) -> bool:
    if layer_of(one[0].path) is None or len(one) != len(two):
        return False
    return all(a.type == "add" == b.type or a.alike(b) for a, b in zip(one, two, strict=True))


def _ranged(row: Row, times: int) -> str:
    layer = layer_of(row.path)
    if layer is None:
        return row.type
    return f"layers.{layer}..{layer + times - 1}.{row.path.split('.', 2)[2]}"
