"""Parallel branches of a traced graph: sums of linear maps that read one value, and the one map they make.

Shapes: a convolution's W [o, i / g, k...] in g groups, a linear's W [o, i]; its center is the middle of k.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.model import Model
from effc.compiler.readers import runs_once
from effc.passes.reparam._channels import Channels, statistics

BatchNorm = nn.modules.batchnorm._BatchNorm
Conv = nn.modules.conv._ConvNd
SETTINGS = ("stride", "dilation", "groups", "padding_mode")


@dataclass(frozen=True, slots=True)
class Branch:
    """One addend: norm(layer(source)); without a layer the value itself, without a norm the layer alone."""

    source: fx.Node
    layer: str | None
    norm: str | None
    leaf: fx.Node


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum, the addends that become one, and the others."""

    root: fx.Node
    branches: tuple[Branch, ...]
    rest: tuple[fx.Node, ...]

    @property
    def layers(self) -> list[str]:
        return [b.layer for b in self.branches if b.layer is not None]


def plain_layer(module: nn.Module) -> bool:
    """A convolution or linear of exactly the known kind."""
    forward = isinstance(module, Conv) and not module.transposed
    return forward or isinstance(module, Linear) or type(module) is nn.Linear


def sums(model: Model, shapes: Mapping[str, Any]) -> tuple[list[Sum], list[str]]:
    """Sums with branches that can become one, and why others cannot, in words."""
    found: list[Sum] = []
    reasons: list[str] = []
    for root in model.gm.graph.nodes:
        if not _adds(root) or any(_adds(user) and len(root.users) == 1 for user in root.users):
            continue
        leaves = _leaves(root)
        branches = [_branch(model, leaf, shapes) for leaf in leaves]
        by: dict[fx.Node, list[Branch]] = {}
        for branch in branches:
            by.setdefault(branch.source, []).append(branch)
        for group in by.values():
            if len(group) < 2 or not any(b.layer for b in group):
                continue
            if why := unlike(model, group):
                reasons.append(f"`{root.name}`: {why}")
                continue
            inside = {b.leaf for b in group}
            found.append(Sum(root, tuple(group), tuple(leaf for leaf in leaves if leaf not in inside)))
            break
        else:
            reasons += [f"`{root.name}`: {why}" for why in _bent(model, branches)]
    return found, reasons


def _adds(node: fx.Node) -> bool:
    names = (operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor)
    called = node.op == "call_function" and node.target in names
    added = called or (node.op == "call_method" and node.target == "add")
    return (
        added and len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)
    )


def _leaves(root: fx.Node) -> list[fx.Node]:
    """The addends of a sum of sums."""
    found: list[fx.Node] = []
    for argument in root.args:
        assert isinstance(argument, fx.Node)
        if _adds(argument) and len(argument.users) == 1:
            found += _leaves(argument)
        else:
            found.append(argument)
    return found


def _branch(model: Model, leaf: fx.Node, shapes: Mapping[str, Any]) -> Branch:
    """The longest linear branch that ends in `leaf`."""
    node, norm = leaf, None
    if _calls(model, node, BatchNorm) and len(node.users) == 1:
        before = node.args[0]
        assert isinstance(before, fx.Node)
        norm, node = str(node.target), before
        if len(node.users) > 1 or not _takes_norm(model, node, shapes):
            return Branch(node, None, norm, leaf)
    if node.op != "call_module" or not plain_layer(model.module(str(node.target))):
        return Branch(node, None, norm, leaf)
    if runs_once(model, str(node.target)) and len(node.users) == 1 and isinstance(node.args[0], fx.Node):
        return Branch(node.args[0], str(node.target), norm, leaf)
    return Branch(node, None, norm, leaf)


def _calls(model: Model, node: fx.Node, kind: Any) -> bool:
    if node.op != "call_module" or not isinstance(model.module(str(node.target)), kind):
        return False
    return runs_once(model, str(node.target))


def _takes_norm(model: Model, node: fx.Node, shapes: Mapping[str, Any]) -> bool:
    """Whether the channels of a layer are those that a batch norm behind it counts."""
    if node.op != "call_module":
        return False
    return isinstance(model.module(str(node.target)), Conv) or len(shapes.get(node.name, ())) == 2


def unlike(model: Model, group: Sequence[Branch]) -> str | None:
    """Why branches of one source cannot become one map; None where they can."""
    layers = {b.layer: model.module(b.layer) for b in group if b.layer is not None}
    (first, one), *others = layers.items()
    for branch in group:
        norm = model.module(branch.norm) if branch.norm else None
        if isinstance(norm, BatchNorm) and (norm.training or norm.running_mean is None):
            return f"{branch.norm} uses the statistics of its batch"
    for path, layer in others:
        if isinstance(layer, Conv) != isinstance(one, Conv):
            return f"{first} and {path} are not of one kind"
        if isinstance(one, Conv):
            for word in SETTINGS:
                if not _same(word, one, layer):
                    return f"{first} has {word} {getattr(one, word)}, {path} {getattr(layer, word)}"
            if _overhang(one) != _overhang(layer):
                return f"{first} and {path} do not pad to the same size"
    bare_ones = [b for b in group if b.layer is None]
    if not bare_ones:
        return None
    if isinstance(one, Conv):
        if one.in_channels != one.out_channels:
            return (
                f"{first} has {one.in_channels} channels in and {one.out_channels} out: none is carried over"
            )
        if any(s > 1 for s in one.stride) or any(_overhang(one)):
            return f"{first} changes the size, so its input cannot be carried over"
    elif one.in_features != one.out_features:
        return (
            f"{first} has {one.in_features} features in and {one.out_features} out, so none is carried over"
        )
    return None


def _same(word: str, one: Any, layer: Any) -> bool:
    """Whether two convolutions agree; the dilation and the border of a 1 x 1 kernel mean nothing."""
    if word in ("dilation", "padding_mode") and 1 in (max(one.kernel_size), max(layer.kernel_size)):
        return True
    return bool(getattr(one, word) == getattr(layer, word))


def _overhang(conv: Any) -> tuple[int, ...]:
    """How far the kernel's center starts outside (above 0) or inside (below 0) of the image, twice."""
    if conv.padding == "same":
        return (0,) * len(conv.kernel_size)
    pads = (0,) * len(conv.kernel_size) if conv.padding == "valid" else conv.padding
    return tuple(2 * p - d * (k - 1) for p, d, k in zip(pads, conv.dilation, conv.kernel_size, strict=True))


def _bent(model: Model, branches: Sequence[Branch]) -> list[str]:
    """Branches that would belong together but for something inside that is not linear."""
    sources = {b.source for b in branches if b.layer is not None}
    found = []
    for branch in branches:
        node, between = branch.source, None
        while isinstance(node, fx.Node) and len(node.all_input_nodes) == 1:
            if node in sources - {branch.source} and between:
                found.append(f"`{between}` stands inside a branch and is not linear")
                break
            if node.op != "call_module" or not plain_layer(model.module(str(node.target))):
                between = str(node.target) if node.op == "call_module" else node.name
            node = node.all_input_nodes[0]
        else:
            if between and node in sources - {branch.source}:
                found.append(f"`{between}` stands inside a branch and is not linear")
    return found


def merged(model: Model, found: Sum) -> tuple[Tensor, Tensor]:
    """The weight, as large as the largest kernel, and the bias of the one map, float64."""
    like: Any = max((model.module(p) for p in found.layers), key=_numel)
    kernels = [kernel_of(model, branch, like) for branch in found.branches]
    weight = torch.stack([centered(w, like.weight.shape) for w, _ in kernels]).sum(0)
    return weight, torch.stack([b for _, b in kernels]).sum(0)


def _numel(layer: Any) -> int:
    return int(layer.weight.numel())


def kernel_of(model: Model, branch: Branch, like: Any) -> tuple[Tensor, Tensor]:
    """The weight and the bias [o] of one branch with its norm, float64."""
    if branch.layer is None:
        weight, bias = dirac(like), torch.zeros(like.weight.shape[0], dtype=torch.float64)
    else:
        layer = model.module(branch.layer)
        weight = layer.get_parameter("weight").detach().double()
        held: Any = layer.bias
        bias = weight.new_zeros(weight.shape[0]) if held is None else held.detach().double()
    if branch.norm is None:
        return weight, bias
    channels: Channels = statistics(model.module(branch.norm))
    return weight * channels.scale.view(-1, *[1] * (weight.ndim - 1)), bias * channels.scale + channels.shift


def dirac(like: Any) -> Tensor:
    """The kernel of size one [o, o / g, 1...] that hands every channel on, float64."""
    outputs, inputs, *sides = like.weight.shape
    kernel = torch.zeros(outputs, inputs, *[1] * len(sides), dtype=torch.float64)
    rows = torch.arange(outputs)
    kernel[rows, rows % inputs] = 1
    return kernel


def centered(kernel: Tensor, shape: torch.Size) -> Tensor:
    """A kernel amid zeros."""
    pads: list[int] = []
    for have, want in zip(reversed(kernel.shape[2:]), reversed(shape[2:]), strict=True):
        pads += [(want - have) // 2, (want - have) // 2]
    return nn.functional.pad(kernel, pads) if pads else kernel
