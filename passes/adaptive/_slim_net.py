"""Widths of a network of convolutions: an encoder that all answers share, a decoder of each, run at a width.

Width w of a layer is the first w of its channels; layers behind read what is there. With several answers what
only one of them needs is its decoder; with one answer all is encoder. Shapes: x [B, C, ...], o rows and i
columns of a weight, g groups.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from effc.compiler.blocks.linear import Linear
from effc.compiler.rewrite import Rewriter
from effc.compiler.trace import TracedModel
from effc.passes.adaptive._fire_conv import CONVOLUTIONS
from effc.passes.adaptive._fire_net import as_weights, read_on
from effc.passes.adaptive._slim_norm import SlimNorm, State

Widths = tuple[float, ...]
"""Of the encoder, then of each decoder."""
ENCODER = -1
LAYERS = (*CONVOLUTIONS, Linear, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RUN: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@dataclass(slots=True)
class Net:
    """What a network is made of."""

    answers: int = 0
    """How many the network gives."""
    region: dict[str, int] = field(default_factory=dict)
    """Path of each layer and norm -> the number of its decoder, or ENCODER."""
    whole: set[str] = field(default_factory=set)
    """Layers whose outputs are answers, which keep all of them."""
    border: list[str] = field(default_factory=list)
    """Names of the values that the encoder hands over."""

    @property
    def decoders(self) -> int:
        return self.answers if self.answers > 1 else 0

    def all(self, encoder: Sequence[float], decoder: Sequence[float]) -> list[Widths]:
        """All configurations, the narrowest first."""
        found = product(sorted(set(encoder)), *[sorted(set(decoder))] * self.decoders)
        return sorted(found, key=lambda c: (sum(c), c))

    def state(self, path: str, widths: Widths) -> State:
        """The widths that the values at a path depend on."""
        region = self.region[path]
        return widths[:1] if region == ENCODER else (widths[0], widths[1 + region])

    def width(self, path: str, widths: Widths) -> float:
        return 1.0 if path in self.whole else self.state(path, widths)[-1]


def network(model: TracedModel) -> Net:
    """The encoder, the decoders and the borders of a traced network."""
    nodes = list(model.gm.graph.nodes)
    answers = [n for n in pytree.tree_leaves(nodes[-1].args[0]) if isinstance(n, fx.Node)]
    net = Net(len(answers))
    reach: dict[fx.Node, set[int]] = {node: set() for node in nodes}
    for number, node in enumerate(answers):
        reach[node].add(number)
    for node in reversed(nodes):
        for user in node.users:
            reach[node] |= reach[user]
    region = {n: min(r) if net.decoders and len(r) == 1 else ENCODER for n, r in reach.items()}
    for node in nodes:
        if node.op != "call_module":
            continue
        path, module = str(node.target), model.module(str(node.target))
        if isinstance(module, (*LAYERS, *BATCH_NORMS, SlimNorm)):
            net.region[path] = region[node]
        if isinstance(module, LAYERS) and not read_on(model, node):
            net.whole.add(path)
    for node in nodes:
        ends = any(region[u] != ENCODER or str(u.target) in net.whole for u in node.users)
        if region[node] == ENCODER and ends and node.op != "placeholder":
            net.border.append(node.name)
    return net


class AtWidth(fx.Interpreter):
    """Runs a network at a width: every layer with the first rows and columns of its weights, as views."""

    def __init__(self, gm: fx.GraphModule, net: Net, widths: Widths) -> None:
        super().__init__(gm)
        self.net, self.widths = net, widths
        self.handed: dict[str, Tensor] = {}
        """What the encoder hands over, by node."""
        self.inputs: dict[str, int] = {}
        """Channels that came to each layer and norm."""
        self.channels: dict[str, int] = {}
        """Channels of each value, by node."""
        self.flops = 0
        """Multiplications and additions for one image."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.ndim > 1:
            self.channels[n.name] = value.shape[1]
        if n.name in self.net.border:
            self.handed[n.name] = value
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self.fetch_attr(str(target))
        if target not in self.net.region:
            return super().call_module(target, args, kwargs)
        x = args[0]
        self.inputs[str(target)] = x.shape[1]
        if isinstance(module, SlimNorm):
            return module.at(x, module.states.index(self.net.state(str(target), self.widths)))
        if isinstance(module, BATCH_NORMS):
            own = (module.running_mean, module.running_var, module.weight, module.bias)
            mean, variance, gain, offset = (None if t is None else t[: x.shape[1]] for t in own)
            return F.batch_norm(x, mean, variance, gain, offset, eps=module.eps)
        weight, shift = part(module, x.shape[1], self.net.width(str(target), self.widths))
        if isinstance(module, Linear | nn.Linear):
            y = F.linear(x, weight, shift)
        elif module.groups == 1:
            y = module._conv_forward(x, weight, shift)
        else:
            left = groups(module, x.shape[1])
            y = _RUN[type(module)](x, weight, shift, module.stride, module.padding, module.dilation, left)
        self.flops += 2 * weight.numel() * prod(y.shape[2:])
        return y


def groups(layer: Any, inputs: int) -> int:
    """How many groups of a convolution so many inputs are."""
    return int(inputs * layer.groups // layer.in_channels) if layer.groups > 1 else 1


def part(layer: Any, inputs: int, width: float) -> tuple[Tensor, Tensor | None]:
    """The first rows and columns of a layer, as views: weight [o, i / g, ...] and bias [o].

    A convolution in groups has as many as its inputs are, whatever the width.
    """
    if getattr(layer, "groups", 1) > 1:
        rows = groups(layer, inputs) * (layer.out_channels // layer.groups)
        weight = layer.weight[:rows]
    else:
        rows = int(layer.weight.shape[0] * width + 1e-6)
        weight = layer.weight[:rows, :inputs]
    return weight, None if layer.bias is None else layer.bias[:rows]


def run(
    model: TracedModel, net: Net, widths: Widths, images: Tensor
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Images [B, ...] -> the answers at a width, and what the encoder handed over."""
    at = AtWidth(model.gm, net, widths)
    return pytree.tree_leaves(at.run(as_weights(model, images))), at.handed


def sketched(model: TracedModel, net: Net, widths: Widths) -> AtWidth:
    """A run at a width without numbers: channels of each layer, and FLOPs.

    Raises:
        RuntimeError: shapes do not go together at this width.
    """
    gm = copy.deepcopy(model.gm).to("meta").eval()
    at = AtWidth(gm, net, widths)
    with torch.no_grad():
        at.run(*(x.to("meta") if isinstance(x, Tensor) else x for x in model.inputs))
    return at


def widen(rw: Rewriter, net: Net, configs: Sequence[Widths]) -> None:
    """Norms with statistics for each width, the whole first."""
    for path in net.region:
        norm = rw.module(path)
        if isinstance(norm, BATCH_NORMS):
            states = dict.fromkeys(net.state(path, c) for c in sorted(configs, reverse=True))
            role = rw.role(path)
            rw.swap(path, SlimNorm(norm, list(states)), f"statistics for {len(states)} widths")
            rw.model.roles[path] = role


def cut(rw: Rewriter, net: Net, widths: Widths) -> None:
    """Make the network at a width an ordinary one, whose layers hold that part of the weights alone."""
    assert isinstance(rw.model, TracedModel)
    inputs = sketched(rw.model, net, widths).inputs
    for path in net.region:
        old, role, c = rw.module(path), rw.role(path), inputs[path]
        if isinstance(old, SlimNorm):
            new = old.plain(old.states.index(net.state(path, widths)), c)
        elif isinstance(old, LAYERS):
            weight, shift = part(old, c, net.width(path, widths))
            if weight.shape == old.get_parameter("weight").shape:
                continue
            new = _layer(old, c, weight, shift)
        else:
            continue
        rw.swap(path, new, f"{100 * net.width(path, widths):g}% of its width")
        rw.model.roles[path] = role


def _layer(old: Any, inputs: int, weight: Tensor, shift: Tensor | None) -> nn.Module:
    outputs, dtype = weight.shape[0], weight.dtype
    if isinstance(old, Linear | nn.Linear):
        name = str(dtype).removeprefix("torch.")
        made: Any = Linear(in_features=inputs, out_features=outputs, bias=shift is not None, dtype=name)
    else:
        form = {n: getattr(old, n) for n in ("stride", "padding", "dilation", "padding_mode")}
        form |= {"groups": groups(old, inputs), "bias": shift is not None, "device": "meta", "dtype": dtype}
        made = type(old)(inputs, outputs, old.kernel_size, **form)
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if shift is not None:
        made.bias = nn.Parameter(shift.detach().clone(), requires_grad=False)
    made.eval()
    out: nn.Module = made
    return out
