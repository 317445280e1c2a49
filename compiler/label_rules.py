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

from effc.compiler.labels import RANDOM, ROWS, Call, Flow, rows_in, union

MOVES = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "as_strided_copy", "cat", "chunk", "clone",
    "constant_pad_nd", "contiguous", "detach", "diag_embed", "diagonal", "expand", "flip", "lift",
    "lift_fresh", "lift_fresh_copy", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle",
    "repeat", "reshape", "roll", "select", "slice",
    "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "tril", "triu", "unbind", "unfold",
    "unsqueeze", "view", "view_as", "expand_copy", "movedim", "rot90", "channel_shuffle",
}  # fmt: skip
"""What comes out was somewhere in what went in; the same call on labels moves these."""

INDEXED = {"index_select": 2, "gather": 2, "index": 1, "take_along_dim": 1, "embedding": 1}
"""Reads by index -> the place of the index; the source comes first."""

CREATES = {
    "arange", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "new_empty",
    "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "scalar_tensor", "zeros",
    "zeros_like",
}  # fmt: skip
"""Depends on shapes alone."""

AXES = {
    "_log_softmax": 1, "_safe_softmax": 1, "_softmax": 1, "all": 1, "amax": 1, "amin": 1, "aminmax": 1,
    "any": 1, "argmax": 1, "argmin": 1, "argsort": 1, "count_nonzero": 1, "cummax": 1, "cummin": 1,
    "cumprod": 1,
    "cumsum": 1, "kthvalue": 2, "linalg_vector_norm": 2, "logcumsumexp": 1, "logsumexp": 1, "max": 1,
    "mean": 1, "median": 1, "min": 1, "mode": 1, "nansum": 1, "norm": 2, "prod": 1, "sort": 1,
    "std": 1, "std_mean": 1, "sum": 1, "topk": 2, "var": 1, "var_mean": 1,
}  # fmt: skip
"""Takes all along axes together -> the place of the axes among the arguments; without axes, everything."""

LAST = {"argsort", "median", "mode", "sort", "topk", "kthvalue"}
"""Of these the last axis is meant where none is written."""

SAMPLES = {
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention", "adaptive_max_pool2d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "col2im", "im2col", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "upsample_nearest2d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d",
}  # fmt: skip
"""Each sample (the first axis) by itself; an argument of one sample serves all."""

DECIDES = {"_local_scalar_dense", "is_nonzero", "equal", "bincount", "histc", "masked_select", "nonzero",
           "repeat_interleave", "unique_consecutive", "_unique2", "unique_dim"}  # fmt: skip
"""Numbers become shapes or decisions of the program, of which everything that follows may depend."""

NOTHING = {
    "_assert_async",
    "_assert_scalar",
    "sym_size",
    "sym_numel",
    "_assert_tensor_metadata",
    "device",
    "size",
}
"""Gives no number that depends on any."""

RANDOMS = {"bernoulli", "dropout", "multinomial", "native_dropout", "normal", "rand", "rand_like", "randint",
           "randint_like", "randn", "randn_like", "randperm", "uniform", "exponential"}  # fmt: skip

WHY = {
    "reduce": "takes numbers of several rows together",
    "move": "puts numbers of one row into another",
    "product": "multiplies numbers of several rows",
    "index": "reads at places that another row decides",
    "decide": "lets numbers of the batch decide shapes or what runs",
    "norm": "uses the statistics of the batch",
    "unknown": "is an operation without a rule",
    "point": "combines numbers of several rows",
}

Given = list[Tensor]


def before(flow: Flow, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """Labels of what an operation is given, as they are before it runs; written tensors change with it."""
    call = Call("", func, tuple(args), kwargs, None)
    return (
        [flow.of(t).clone() for t in call.tensors()]
        if _writes(func)
        else [flow.of(t) for t in call.tensors()]
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


def _settle(flow: Flow, call: Call, given: Given, made: Sequence[Tensor], why: str) -> None:
    """Keep labels of results; those of a written tensor are written in place, so that its views see them."""
    for result, labels in zip(call.results(), made, strict=True):
        labels = flow.met(call.name, WHY[why], labels.expand(result.shape))
        if given:
            labels = flow.crossed(call.name, WHY["move"], given[0], labels)
        if _writes(call.func):
            flow.of(result).copy_(labels | flow.decided)
        else:
            flow.keep(result, labels)


def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


# ---- rules


def _create(flow: Flow, call: Call, given: Given, name: str) -> None:
    for result in call.results():
        flow.keep(result, torch.zeros((), dtype=torch.int64))


def _point(flow: Flow, call: Call, given: Given, name: str) -> None:
    """The union of all operands, broadcast."""
    (first, *_) = call.results()
    labels = torch.zeros(first.shape, dtype=torch.int64)
    for one in given:
        labels = labels | one
    _settle(flow, call, given, [labels.expand(r.shape) for r in call.results()], "point")


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
        _settle(flow, call, given, [moved | _one(extra)], "index")
        return
    if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
        _decide(flow, call, given, name)
        return
    (result,) = call.results()
    if name == "embedding":
        labels = union(source, None) | extra[0].unsqueeze(-1)
    elif name in ("gather", "take_along_dim"):
        axis = call.args[1] if name == "gather" else call.args[2]
        labels = (
            union(source, [axis]).expand(result.shape)
            if _alike(source, result, axis)
            else union(source, None)
        )
        labels = labels | extra[0].expand(result.shape)
    else:
        labels = union(source, None) | _one(extra)
    _settle(flow, call, given, [labels.expand(result.shape)], "index")


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
    _settle(flow, call, given, made, "reduce")


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


def _product(flow: Flow, call: Call, given: Given, name: str) -> None:
    """Rows of the left, columns of the right; what is added is added."""
    left, right = (
        flow.of(t)
        for t in (call.args[1:3] if name in ("addmm", "baddbmm", "addmv", "addbmm") else call.args[:2])
    )
    if name in ("mv", "addmv"):
        labels = union(left, [-1]).squeeze(-1) | union(right, None)
    elif name in ("dot", "vdot"):
        labels = union(left, None) | union(right, None)
    elif name == "linear":
        labels = union(left, [-1]) | union(right, [-1]).squeeze(-1)
    else:
        labels = union(left, [-1]) | union(right, [-2])
    rest = [flow.of(call.args[0])] if name.startswith("add") or name == "baddbmm" else []
    if name == "linear" and len(call.args) > 2 and call.args[2] is not None:
        rest = [flow.of(call.args[2])]
    (result,) = call.results()
    labels = labels.expand(result.shape)
    for one in rest:
        labels = labels | one
    _settle(flow, call, given, [labels], "product")


def _sample(flow: Flow, call: Call, given: Given, name: str) -> None:
    """Everything of a sample into everything of the same sample."""
    rows = max(r.shape[0] for r in call.results() if r.ndim)
    labels = torch.zeros(rows, dtype=torch.int64)
    for tensor in call.tensors():
        own = flow.of(tensor)
        if own.ndim and own.shape[0] == rows:
            labels = labels | union(own, list(range(1, own.ndim))).reshape(rows)
        else:
            labels = labels | union(own, None)
    made = []
    for result in call.results():
        fits = result.ndim and result.shape[0] == rows
        shape = [rows, *[1] * (result.ndim - 1)] if fits else []
        made.append((labels.view(shape) if fits else union(labels, None)).expand(result.shape))
    _settle(flow, call, given, made, "reduce")


def _convolution(flow: Flow, call: Call, given: Given, name: str) -> None:
    """A convolution: everything of a sample, and all weights."""
    x, *weights = call.tensors()
    own = flow.of(x)
    (result,) = call.results()
    labels = union(own, list(range(1, own.ndim)))
    for weight in weights:
        labels = labels | union(flow.of(weight), None)
    _settle(flow, call, given, [labels.expand(result.shape)], "product")


def _layer_norm(flow: Flow, call: Call, given: Given, name: str) -> None:
    """The last axes of each place together, then gain and bias."""
    x, shape = call.args[0], call.args[1]
    own = flow.of(x)
    axes = list(range(own.ndim - len(shape), own.ndim))
    labels = union(own, axes)
    made = []
    for result in call.results():
        one = labels.expand(result.shape)
        if result.shape == x.shape:
            for more in call.tensors()[1:]:
                one = one | flow.of(more)
        made.append(one)
    _settle(flow, call, given, made, "reduce")


def _group_norm(flow: Flow, call: Call, given: Given, name: str) -> None:
    """Everything of a sample together."""
    x, *weights = call.tensors()
    own = flow.of(x)
    labels = union(own, list(range(1, own.ndim))).reshape(own.shape[0])
    for weight in weights:
        labels = labels | union(flow.of(weight), None)
    made = [labels.view(-1, *[1] * (r.ndim - 1)).expand(r.shape) for r in call.results()]
    _settle(flow, call, given, made, "reduce")


def _batch_norm(flow: Flow, call: Call, given: Given, name: str) -> None:
    """At rest each number by itself and its channel's statistics; in training all of a channel together."""
    x = call.args[0]
    own = flow.of(x)
    training = next((a for a in call.args if isinstance(a, bool)), False) and "no_training" not in name
    stats = [flow.of(t) for t in call.tensors()[1:]]
    axes = [a for a in range(own.ndim) if a != 1]
    channel = [1, -1, *[1] * (own.ndim - 2)]
    labels = union(own, axes) if training else own
    for one in stats:
        labels = labels | (
            one.view(channel) if one.ndim == 1 and one.shape[0] == own.shape[1] else union(one, None)
        )
    made = []
    for result in call.results():
        if result.shape == x.shape:
            made.append(labels.expand(x.shape))
        elif result.ndim == 1 and result.shape[0] == own.shape[1]:
            made.append(union(labels, axes).flatten())
        else:
            made.append(union(labels, None).expand(result.shape))
    for tensor, argument in zip(call.args, call.func._schema.arguments, strict=False):
        if argument.is_write and isinstance(tensor, Tensor):
            flow.of(tensor).copy_(union(labels, axes).flatten())
    for result, one in zip(call.results(), made, strict=True):
        flow.keep(result, flow.met(call.name, WHY["norm"], one))


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
            _settle(flow, call, given, [labels | _one([flow.of(i) for i in indices])], "index")
            return
    _settle(flow, call, given, [(target | _one(rest)).expand(result.shape)], "index")


def _indices(call: Call, name: str) -> list[Tensor]:
    place = {"index_put": 1, "_unsafe_index_put": 1}.get(name, 2)
    return [t for t in _flat(call.args[place : place + 1]) if isinstance(t, Tensor)]


def _placed(flow: Flow, call: Call, name: str, target: Tensor) -> Tensor | None:
    """The labels of a write whose places are known; None where values add up there."""
    base = target.clone()
    if name in ("index_put", "_unsafe_index_put"):
        added = len(call.args) > 3 and bool(call.args[3])
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
    _settle(flow, call, given, [given[1].expand(result.shape)], "move")


def _fill(flow: Flow, call: Call, given: Given, name: str) -> None:
    """A constant in place of what was there."""
    (result,) = call.results()
    labels = given[1] if len(given) > 1 else torch.zeros((), dtype=torch.int64)
    _settle(flow, call, given, [labels.expand(result.shape)], "move")


def _decide(flow: Flow, call: Call, given: Given, name: str) -> None:
    """What rows decide here, everything behind may depend on."""
    bits = _one(given) if given else torch.zeros((), dtype=torch.int64)
    if int(bits) & ROWS:
        bits = bits | flow.place(call.name, WHY["decide"], rows_in(bits)) | ROWS
        flow.decided |= int(bits)
    for result in call.results():
        flow.keep(result, bits)


def _all(flow: Flow, call: Call, given: Given, why: str, more: int = 0) -> None:
    """Everything that went in, into everything that comes out; drawn numbers of one shape keep places."""
    bits = _one(given)
    alike = more and len(given) == 1 and all(r.shape == given[0].shape for r in call.results())
    made = [given[0] | more if alike else (bits | more).expand(r.shape) for r in call.results()]
    _settle(flow, call, given, made, why)


def _one(labels: Sequence[Tensor]) -> Tensor:
    """The union of everything."""
    bits = torch.zeros((), dtype=torch.int64)
    for one in labels:
        bits = bits | union(one, None) if one.numel() else bits
    return bits


def _flat(values: Any) -> list[Any]:
    return pytree.tree_leaves(values)


PRODUCTS = {
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "mv",
    "addmv",
    "dot",
    "vdot",
    "linear",
    "matmul",
    "_int_mm",
    "addbmm",
}
CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "conv_tbc"}
LAYER_NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm"}
BATCH_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm",
    "cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "_batch_norm_impl_index",
}  # fmt: skip
WRITES = {"index_put", "_unsafe_index_put", "scatter", "scatter_add", "scatter_reduce", "index_add",
          "index_copy", "index_fill", "slice_scatter", "select_scatter", "masked_scatter", "put"}  # fmt: skip
POINTWISE = {"_to_copy", "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "masked_fill", "where",
             "gelu", "silu", "_conj", "fake_quantize_per_channel_affine",
             "fake_quantize_per_tensor_affine_cachemask",
             "fake_quantize_per_tensor_affine", "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
             "lerp", "real", "imag", "view_as_real",
             "__lshift", "__rshift", "__xor", "to", "type_as"}  # fmt: skip
"""Elementwise, where torch does not say so itself."""

_RULES: list[tuple[Any, Callable[[Flow, Call, Given, str], None]]] = [
    (CREATES, _create),
    (MOVES, _move),
    (INDEXED, _index),
    (AXES, _axes),
    (PRODUCTS, _product),
    (CONVOLUTIONS, _convolution),
    (LAYER_NORMS, _layer_norm),
    ({"native_group_norm", "group_norm"}, _group_norm),
    (BATCH_NORMS, _batch_norm),
    (SAMPLES, _sample),
    (WRITES, _write_by_index),
    ({"copy"}, _copy),
    ({"fill", "zero"}, _fill),
    (DECIDES, _decide),
]
