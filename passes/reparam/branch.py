"""Give layers parallel branches for a training, and make one layer of branches afterwards."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import fx, nn

from effc.compiler.contract import EXACT, Contract, Fact
from effc.compiler.graph_shapes import graph_shapes
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.readers import runs_once
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Rewrite
from effc.compiler.trace import TracedModel
from effc.passes._dense import shared, some
from effc.passes._waived import on_a_decoder
from effc.passes.reparam._branch_graph import merge, multiply, stand
from effc.passes.reparam._branches import Conv, Sum, centered, dirac, plain_layer, sums
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.select import resolve

_NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}


class Branch(Selects, Rewrite):
    """Make one layer of parallel ones: sum_i bn_i(W_i x + b_i) = W x + b, W = sum_i t_i W_i, or the reverse.

    `merge`: in a sum of convolutions or linears that read one value, of batch norms behind them, and of the
    value itself, kernels are padded to the largest, the value counts as the kernel with a one in the middle,
    and one layer is left. `expand`: every convolution that keeps the size gets `branches` beside its own,
    and what they add at the start is taken off its own weight, so that the function stays.

    Use when: a network is to be trained with branches and run without them.
    Costs:    expanded: weights, work and activations of every branch while training. Merged: nothing.
    """

    paper = Paper(
        "RepVGG: Making VGG-style ConvNets Great Again", arxiv="2101.03697", year=2021, section="3.3"
    )
    contract = Contract(EXACT, keeps=tuple(map(Fact, ("tied", "packed", "low_rank"))))
    waives: ClassVar[Mapping[str, str]] = on_a_decoder(
        "decoders have no parallel layers; tests/passes/test_branch.py holds it to convnets"
    )
    examples = (
        "reparam.branch()",
        "reparam.branch(mode = expand, branches = [conv, conv1, identity], norm = bn)",
    )

    select: tuple[str, ...] = Field(
        default=(), description="layers to expand, or of which sums are merged; default: all that can be"
    )
    mode: Literal["merge", "expand"] = Field(default="merge", description="one of many, or many of one")
    branches: tuple[Literal["conv", "conv1", "identity"], ...] = Field(
        default=("conv1", "identity"),
        description="what stands beside a layer: another of its kernel, one of kernel 1, the input itself",
    )
    norm: Literal["bn", "none"] = Field(
        default="bn", description="whether a batch norm ends every new branch"
    )
    serial: bool = Field(
        default=False, description="merge also linears that follow each other, where weights do not grow"
    )

    def targets(self, model: Model) -> dict[str, Self]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.mode == "expand":
            chosen = [p for p in self._chosen(model) if _widens(model, p) is None]
        else:
            chosen = [p for found in self._sums(model)[0] for p in found.layers]
            chosen += [p for pair in self._chains(model) for p in pair]
        return dict.fromkeys(chosen, self)

    def _chosen(self, model: Model) -> list[str]:
        names = [n for n in model.names() if plain_layer(model.module(n.path))]
        if not self.select:
            names = [n for n in names if self.mode == "merge" or isinstance(model.module(n.path), Conv)]
        if not names:
            return []
        table = resolve(self.select or ("*",), self.except_, self.rules, names)
        return [path for path, given in table.items() if given is not None]

    def _sums(self, model: Model) -> tuple[list[Sum], list[str]]:
        chosen = set(self._chosen(model))
        shapes = graph_shapes(model) if isinstance(model, TracedModel) else {}
        found, reasons = sums(model, shapes)
        ties = shared(model)
        able = [s for s in found if chosen.issuperset(s.layers) and ties.isdisjoint(s.layers)]
        reasons += [f"`{s.root.name}`: {some(s.layers)} shares its weight" for s in found if s not in able]
        return able, reasons

    def _chains(self, model: Model) -> list[tuple[str, str]]:
        """Pairs of linears, the second reading the first alone, whose product is no larger than both."""
        if not self.serial:
            return []
        chosen, ties = set(self._chosen(model)), shared(model)
        pairs = []
        for node in model.gm.graph.nodes:
            source = node.args[0] if node.op == "call_module" and node.args else None
            if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
                continue
            first, second = str(source.target), str(node.target)
            if not {first, second} <= chosen or ties & {first, second}:
                continue
            one: Any = model.module(first)
            two: Any = model.module(second)
            if isinstance(one, Conv) or isinstance(two, Conv) or not _both_once(model, first, second):
                continue
            if one.in_features * two.out_features <= one.weight.numel() + two.weight.numel():
                pairs.append((first, second))
        return pairs

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if self.mode == "expand":
            return list(self._cannot_expand(model))
        found, reasons = self._sums(model)
        if found or self._chains(model):
            return []
        return [
            Diagnostic(
                "E320",
                f"`{self.kind}` finds no branches that make one layer",
                notes=tuple(reasons[:3]) or ("no sum adds convolutions or linears that read the same value",),
                help="leave the stage out, or take what is not linear out of the branches",
            )
        ]

    def _cannot_expand(self, model: Model) -> Iterator[Diagnostic]:
        chosen = self._chosen(model)
        why = {path: reason for path in chosen if (reason := _widens(model, path))}
        named = [path for path in why if self.select]
        if named or len(why) == len(chosen):
            notes = tuple(f"`{path}` {reason}" for path, reason in list(why.items())[:3])
            yield Diagnostic(
                "E320",
                f"`{self.kind}` cannot expand `{some(named)}`"
                if named
                else f"`{self.kind}` finds no layer to expand",
                notes=notes or ("the model has no convolution",),
                help="expand convolutions of an odd kernel that keep the size",
                about="select",
            )
        ties = shared(model)
        if tied := [path for path in chosen if path not in why and path in ties]:
            yield Diagnostic(
                "E341",
                f"`{self.kind}` cannot expand a weight that is shared",
                notes=(f"{some(tied)} shares its weight with another module",),
                help="leave it out with `except`",
            )

    def rewrite(self, rw: Rewriter) -> None:
        if self.mode == "expand":
            for path in self.targets(rw.model):
                self._expand(rw, path)
            return
        while found := self._sums(rw.model)[0]:
            merge(rw, found[0])
        while pairs := self._chains(rw.model):
            multiply(rw, *pairs[0])

    def _expand(self, rw: Rewriter, path: str) -> None:
        """Branches beside one convolution, and its own weight less what they add."""
        own = rw.module(path)
        known = not own.weight.is_meta
        parts: list[tuple[Any, Any]] = []
        rest = own.weight.detach().double() if known else None
        for number, kind in enumerate(self.branches):
            layer = _fresh(own, kind, f"{path} {number}")
            norm = self._resting(own)
            if kind == "identity" and own.in_channels != own.out_channels:
                continue
            parts.append((layer, norm))
            if rest is not None:
                kernel = dirac(own) if layer is None else layer.weight.detach().double()
                rest = rest - centered(kernel * _gain(norm), own.weight.shape)
        mine = self._resting(own)
        if rest is not None:
            rw.write(path, "weight", (rest / _gain(mine)).to(own.weight.dtype), "less its new branches")
            if mine is not None and own.bias is not None:
                bias = own.bias.detach().double() / _gain(mine)
                rw.write(path, "bias", bias.to(own.bias.dtype), "before its batch norm")
        stand(rw, path, mine, parts)

    def _resting(self, own: Any) -> Any:
        """A batch norm that multiplies by 1 / sqrt(1 + eps) and adds nothing; None without norms."""
        if self.norm == "none":
            return None
        norm = _NORMS[type(own)](own.out_channels, device=own.weight.device, dtype=own.weight.dtype)
        return norm.eval().requires_grad_(False)

    def work(self, model: Model, seq: int = 0) -> Work:
        weights = [model.module(path).get_parameter("weight").numel() for path in self.targets(model)]
        return Work(solve=4.0 * sum(weights), memory=24 * max(weights, default=0))


def _gain(norm: Any) -> float:
    return 1.0 if norm is None else float((1 + norm.eps) ** -0.5)


def _fresh(own: Any, kind: str, key: str) -> Any:
    """A new convolution beside `own`, its weights drawn by `key`; None for the value itself."""
    if kind == "identity":
        return None
    size = own.kernel_size if kind == "conv" else (1,) * len(own.kernel_size)
    more = {"dilation": own.dilation, "padding": own.padding} if kind == "conv" else {}
    form: Mapping[str, Any] = {"stride": own.stride, "groups": own.groups, "bias": False, **more}
    where = {"device": own.weight.device, "dtype": own.weight.dtype}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(key.encode()))
        layer = type(own)(own.in_channels, own.out_channels, size, **form, **where)
    return layer.eval().requires_grad_(False)


def _widens(model: Model, path: str) -> str | None:
    """Why a layer cannot have branches beside it; None where it can."""
    layer = model.module(path)
    if not isinstance(layer, Conv) or type(layer) not in _NORMS:
        return f"is {type(layer).__name__}"
    if not runs_once(model, path):
        return "runs more than once"
    if layer.padding_mode != "zeros" or any(k % 2 == 0 for k in layer.kernel_size):
        return f"has kernel {layer.kernel_size} and pads with {layer.padding_mode}"
    kept = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    if layer.padding not in (kept, "same") or any(s > 1 for s in layer.stride):
        return f"has padding {layer.padding} and stride {layer.stride}, which changes the size"
    return None


def _both_once(model: Model, first: str, second: str) -> bool:
    return runs_once(model, first) and runs_once(model, second)
