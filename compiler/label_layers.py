"""Rules for labels, continued: products, convolutions, attention and pooling, norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effc.compiler.label_names import WHY
from effc.compiler.labels import Call, Flow, settle, union

Given = Sequence[Tensor]


def product(flow: Flow, call: Call, given: Given, name: str) -> None:
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
    settle(flow, call, given, [labels], "product")


def sample(flow: Flow, call: Call, given: Given, name: str) -> None:
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
    settle(flow, call, given, made, "reduce")


def convolution(flow: Flow, call: Call, given: Given, name: str) -> None:
    """A convolution: everything of a sample, and all weights."""
    x, *weights = call.tensors()
    own = flow.of(x)
    (result,) = call.results()
    labels = union(own, list(range(1, own.ndim)))
    for weight in weights:
        labels = labels | union(flow.of(weight), None)
    settle(flow, call, given, [labels.expand(result.shape)], "product")


def layer_norm(flow: Flow, call: Call, given: Given, name: str) -> None:
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
    settle(flow, call, given, made, "reduce")


def group_norm(flow: Flow, call: Call, given: Given, name: str) -> None:
    """Everything of a sample together."""
    x, *weights = call.tensors()
    own = flow.of(x)
    labels = union(own, list(range(1, own.ndim))).reshape(own.shape[0])
    for weight in weights:
        labels = labels | union(flow.of(weight), None)
    made = [labels.view(-1, *[1] * (r.ndim - 1)).expand(r.shape) for r in call.results()]
    settle(flow, call, given, made, "reduce")


def batch_norm(flow: Flow, call: Call, given: Given, name: str) -> None:
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
