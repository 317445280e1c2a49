"""Rules for labels: of what each operation of torch depends, element by element.

Elementwise: on the operands at the same place. Moves (view, slice, cat, a gather by known indices): on what
was moved. Reductions, sorting, softmax: on all along the axes. Products: on a row of one side and a column of
the other. Convolutions, pooling, attention: on the whole sample. What no rule knows: on everything it read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from effc.compiler.label_layers import (
    batch_norm,
    convolution,
    group_norm,
    layer_norm,
    product,
    sample,
)
from effc.compiler.label_names import (
    AXES,
    BATCH_NORMS,
    CONVOLUTIONS,
    CREATES,
    DECIDES,
    INDEXED,
    LAST,
    LAYER_NORMS,
    MOVES,
    NOTHING,
    POINTWISE,
    PRODUCTS,
    RANDOMS,
    SAMPLES,
    WHY,
    WRITES,
)
from effc.compiler.labels import RANDOM, ROWS, Call, Flow, everything, rows_in, settle, union, writes

Given = Sequence[Tensor]


def before(flow: Flow, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """Labels of what an operation is given, as they are before it runs; written tensors change with it."""
    call = Call("", func, tuple(args), kwargs, None)
    return (
        [flow.of(t).clone() for t in call.tensors()] if writes(func) else [flow.of(t) for t in call.tensors()]
    )


def apply(flow: Flow, call: Call, given: Given) -> None:
    """Label what an operation gave."""
    name = _plain(call)
    if name in NOTHING or not (call.results() or name in DECIDES):
        return
    if _random(call, name):
        _all(flow, call, given, "point", RANDOM)
        return
    if call.func._overloadname == "other" or "pointwise" in str(call.func.tags):
        _point(flow, call, given, name)
        return
    rule = next((rule for words, rule in _RULES if name in words), None)
    if rule is not None:
        rule(flow, call, given, name)
    elif name in POINTWISE:
        _point(flow, call, given, name)
    else:
        _all(flow, call, given, "unknown")


def _plain(call: Call) -> str:
    """The name of an operation, of one that writes in place the same."""
    name = call.name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _random(call: Call, name: str) -> bool:
    """Whether numbers are drawn; attention without dropout draws none."""
    if name.startswith("_scaled_dot"):
        return any(isinstance(a, float) and a > 0 for a in call.args[3:5])
    return torch.Tag.nondeterministic_seeded in call.func.tags or name in RANDOMS


# ---- rules


def _create(flow: Flow, call: Call, given: Given, name: str) -> None:
    for result in call.results():
        flow.keep(result, torch.zeros((), dtype=torch.int64))


def _point(flow: Flow, call: Call, given: Given, name: str) -> None:
    """The union of all operands, broadcast; a result of another shape may hold any of it."""
    (first, *_) = call.results()
    labels = torch.zeros(first.shape, dtype=torch.int64)
    for one in given:
        labels = labels | one
    alike = [r.shape == first.shape for r in call.results()]
    made = [
        labels if same else everything(given).expand(r.shape)
        for r, same in zip(call.results(), alike, strict=True)
    ]
    settle(flow, call, given, made, "point")


def _move(flow: Flow, call: Call, given: Given, name: str) -> None:
    """The same call on labels. A view of a tensor gets a view of its labels."""
    args, kwargs = pytree.tree_map_only(Tensor, flow.of, (list(call.args), dict(call.kwargs)))
    if name == "constant_pad_nd":
        args = args[:2]  # what is put around depends on nothing
    try:
        moved: Any = call.func(*args, **{k: v for k, v in kwargs.items() if k != "memory_format"})
    except RuntimeError:  # laid out differently from its tensor, so that a view cannot be made
        _all(flow, call, given, "unknown")
        return
    view = bool(getattr(call.func, "is_view", False))
    for result, labels in zip(
        call.results(), [moved] if isinstance(moved, Tensor) else list(moved), strict=True
    ):
        flow.put(result, labels if view else flow.crossed(call.name, WHY["move"], given[0], labels))


def _index(flow: Flow, call: Call, given: Given, name: str) -> None:
    """A read by index: moved by indices that depend on no row, else all along the axis and the index."""
    place = INDEXED[name]
    indices = [t for t in _flat(call.args[place:]) if isinstance(t, Tensor)]
    source = flow.of(call.args[0])
    extra = [flow.of(i) for i in indices]
    if all(not bool((e & ROWS).any()) for e in extra):
        moved = source[call.args[1]] if name == "embedding" else call.func(source, *call.args[1:])
        settle(flow, call, given, [moved | everything(extra)], "index")
        return
    if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
        _decide(flow, call, given, name)
        return
    (result,) = call.results()
    args: Any = call.args
    if name == "embedding":
        labels = union(source, None) | extra[0].unsqueeze(-1)
    elif name in ("gather", "take_along_dim"):
        axis = args[1] if name == "gather" else args[2]
        labels = (
            union(source, [axis]).expand(result.shape)
            if _alike(source, result, axis)
            else union(source, None)
        )
        labels = labels | extra[0].expand(result.shape)
    else:
        labels = union(source, None) | everything(extra)
    settle(flow, call, given, [labels.expand(result.shape)], "index")


def _alike(source: Tensor, result: Tensor, axis: int) -> bool:
    axis = axis % max(1, source.ndim)
    return all(a == b for n, (a, b) in enumerate(zip(source.shape, result.shape, strict=True)) if n != axis)


def _axes(flow: Flow, call: Call, given: Given, name: str) -> None:
    """The union along axes, which every result has, shortened or not."""
    x = call.args[0]
    axes = _written_axes(call, name, x)
    labels = union(flow.of(x), axes)
    made = []
    for result in call.results():
        fits = labels.ndim == result.ndim
        if axes is None or fits:
            made.append(labels.expand(result.shape))
        else:
            made.append(
                labels.reshape([n for i, n in enumerate(labels.shape) if i not in axes]).expand(result.shape)
            )
    settle(flow, call, given, made, "reduce")


def _written_axes(call: Call, name: str, x: Tensor) -> list[int] | None:
    """The axes of a reduction, counted from 0; None for all."""
    names = [a.name for a in call.func._schema.arguments]
    word = next((n for n in ("dim", "axis") if n in names), None)
    if word is None:
        return None
    place = names.index(word)
    value = call.args[place] if place < len(call.args) else call.kwargs.get(word, _default(call, place))
    if value is None or value == []:
        return None if name not in LAST else [x.ndim - 1]
    found = [value] if isinstance(value, int) else list(value)
    return [a % max(1, x.ndim) for a in found]


def _default(call: Call, place: int) -> Any:
    argument = call.func._schema.arguments[place]
    return argument.default_value if argument.has_default_value() else None


def _write_by_index(flow: Flow, call: Call, given: Given, name: str) -> None:
    """A write by index: what was there, and everything that is written or says where."""
    (result,) = call.results()
    rest = [flow.of(t) for t in call.tensors()[1:]]
    target = given[0]
    indices = _indices(call, name)
    if name in ("slice_scatter", "select_scatter") or all(
        not bool((flow.of(i) & ROWS).any()) for i in indices
    ):
        labels = _placed(flow, call, name, target)
        if labels is not None:
            settle(flow, call, given, [labels | everything([flow.of(i) for i in indices])], "index")
            return
    settle(flow, call, given, [(target | everything(rest)).expand(result.shape)], "index")


def _indices(call: Call, name: str) -> list[Tensor]:
    place = {"index_put": 1, "_unsafe_index_put": 1}.get(name, 2)
    return [t for t in _flat(call.args[place : place + 1]) if isinstance(t, Tensor)]


def _placed(flow: Flow, call: Call, name: str, target: Tensor) -> Tensor | None:
    """The labels of a write whose places are known; None where values add up there."""
    base = target.clone()
    if name in ("index_put", "_unsafe_index_put"):
        added = any(call.args[3:4])
        values = flow.of(call.args[2])
        return None if added else base.index_put(call.args[1], values)
    if name == "scatter" and len(call.args) == 4:
        source = call.args[3]
        values = (
            flow.of(source)
            if isinstance(source, Tensor)
            else torch.zeros_like(base).gather(call.args[1], call.args[2])
        )
        return base.scatter(call.args[1], call.args[2], values)
    if name in ("slice_scatter", "select_scatter", "index_copy", "index_fill"):
        args = [
            flow.of(a) if isinstance(a, Tensor) and a is call.args[1 if "scatter" in name else 3] else a
            for a in call.args[1:]
        ]
        if name == "index_fill":
            return base.index_fill(call.args[1], call.args[2], 0)
        made: Tensor = getattr(torch, name)(base, *args)
        return made
    return None


def _copy(flow: Flow, call: Call, given: Given, name: str) -> None:
    """The source, broadcast, in place of what was there."""
    (result,) = call.results()
    settle(flow, call, given, [given[1].expand(result.shape)], "move")


def _fill(flow: Flow, call: Call, given: Given, name: str) -> None:
    """A constant in place of what was there."""
    (result,) = call.results()
    labels = given[1] if len(given) > 1 else torch.zeros((), dtype=torch.int64)
    settle(flow, call, given, [labels.expand(result.shape)], "move")


def _decide(flow: Flow, call: Call, given: Given, name: str) -> None:
    """What rows decide here, everything behind may depend on."""
    bits = everything(given) if given else torch.zeros((), dtype=torch.int64)
    if int(bits) & ROWS:
        bits = bits | flow.place(call.name, WHY["decide"], rows_in(bits)) | ROWS
        flow.decided |= int(bits)
    for result in call.results():
        flow.keep(result, bits)


def _all(flow: Flow, call: Call, given: Given, why: str, more: int = 0) -> None:
    """Everything that went in, into everything that comes out; drawn numbers of one shape keep places."""
    bits = everything(given)
    alike = more and len(given) == 1 and all(r.shape == given[0].shape for r in call.results())
    made = [given[0] | more if alike else (bits | more).expand(r.shape) for r in call.results()]
    settle(flow, call, given, made, why)


def _flat(values: Any) -> list[Any]:
    return pytree.tree_leaves(values)


_RULES: list[tuple[Any, Callable[[Flow, Call, Given, str], None]]] = [
    (CREATES, _create),
    (MOVES, _move),
    (INDEXED, _index),
    (AXES, _axes),
    (PRODUCTS, product),
    (CONVOLUTIONS, convolution),
    (LAYER_NORMS, layer_norm),
    ({"native_group_norm", "group_norm"}, group_norm),
    (BATCH_NORMS, batch_norm),
    (SAMPLES, sample),
    (WRITES, _write_by_index),
    ({"copy"}, _copy),
    ({"fill", "zero"}, _fill),
    (DECIDES, _decide),
]
