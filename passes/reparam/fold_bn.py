"""Move batch norms into the convolutions and linears beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field
from torch import fx, nn

from effc.compiler.blocks.linear import Linear
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
from effc.passes.reparam._affine import add_bias, put_affine
from effc.passes.reparam._channels import Channels, into_inputs, into_outputs, statistics
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.select import resolve

BatchNorm = nn.modules.batchnorm._BatchNorm
Conv = nn.modules.conv._ConvNd


@dataclass(frozen=True, slots=True)
class Fold:
    """One batch norm and the layers that take it in."""

    norm: str
    layers: tuple[str, ...]
    into: Literal["prev", "next"]


class FoldBn(Selects, Rewrite):
    """Replace bn(W x + b) by (t W) x + t (b - mu) + beta, with t = gamma / sqrt(var + eps) of each channel.

    `into = prev`: the batch norm goes into the convolution or linear before it. `next`: into those behind it,
    W' = W diag(t), b' = b + W (beta - t mu); into a convolution only without padding, or where the constant
    is zero. `either`: before it where that can be, else behind it.

    Use when: a network with batch norms is deployed; their statistics no longer change.
    Costs:    nothing; a pass over memory is saved. The network cannot be trained with batch norms afterwards.
    """

    paper = Paper(
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        arxiv="1712.05877",
        year=2017,
        section="3.2",
    )
    contract = Contract(
        EXACT, keeps=tuple(map(Fact, ("sparse", "sparse_2_4", "sparse_4_8", "tied", "low_rank", "packed")))
    )
    waives: ClassVar[Mapping[str, str]] = on_a_decoder(
        "decoders have no batch norm; tests/passes/test_fold_bn.py holds it to convnets"
    )
    examples = ("reparam.fold_bn()", "reparam.fold_bn(into = either)")

    select: tuple[str, ...] = Field(
        default=(),
        description="batch norms to fold; default: all that stand beside a layer that can take them",
    )
    into: Literal["prev", "next", "either"] = Field(
        default="prev", description="which neighbor takes the batch norm in"
    )

    def folds(self, model: Model) -> list[Fold]:
        """What can be folded, in graph order."""
        nodes = {n: str(n.target) for n in model.gm.graph.nodes if n.op == "call_module"}
        chosen = self._chosen(model)
        shapes = graph_shapes(model) if isinstance(model, TracedModel) else {}
        found = []
        for node, path in nodes.items():
            if path in chosen and (fold := self._fold(model, node, shapes)) is not None:
                found.append(fold)
        return found

    def targets(self, model: Model) -> dict[str, Self]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dict.fromkeys((fold.norm for fold in self.folds(model)), self)

    def _chosen(self, model: Model) -> list[str]:
        names = [n for n in model.names() if isinstance(model.module(n.path), BatchNorm)]
        if not names:
            return []
        table = resolve(self.select or ("norm",), self.except_, self.rules, names)
        return [path for path, given in table.items() if given is not None]

    def _fold(self, model: Model, node: fx.Node, shapes: Mapping[str, Any]) -> Fold | None:
        norm = str(node.target)
        before = self.into != "next" and _before(model, node, shapes)
        if before:
            return Fold(norm, (before,), "prev")
        after = self.into != "prev" and _after(model, node, shapes)
        return Fold(norm, after, "next") if after else None

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        chosen = self._chosen(model)
        found = [*_no_statistics(self.kind, model, chosen), *_split(self.kind, model, chosen)]
        if found:
            return found
        folds = self.folds(model)
        able = {fold.norm for fold in folds}
        if self.select and (unable := [path for path in chosen if path not in able]):
            found.append(_unable(self.kind, self.into, model, unable))
        ties = shared(model)
        tied = [layer for fold in folds for layer in (*fold.layers, fold.norm) if layer in ties]
        if tied:
            found.append(
                Diagnostic(
                    "E341",
                    f"`{self.kind}` cannot scale a weight that is shared",
                    notes=(f"{some(tied)} shares its tensors with another module",),
                    help="leave the batch norms beside it out with `except`",
                )
            )
        if not folds and not found:
            found.append(_nothing(self.kind, model, chosen))
        return found

    def rewrite(self, rw: Rewriter) -> None:
        for fold in self.folds(rw.model):
            norm = rw.module(fold.norm)
            known = not any(t.is_meta for t in (*norm.parameters(), *norm.buffers()))
            channels = statistics(norm) if known else None
            for layer in fold.layers:
                _take(rw, layer, channels, fold.into)
            rw.remove(fold.norm)

    def work(self, model: Model, seq: int = 0) -> Work:
        weights = [
            model.module(layer).get_parameter("weight") for f in self.folds(model) for layer in f.layers
        ]
        return Work(
            solve=2.0 * sum(w.numel() for w in weights),
            memory=16 * max((w.numel() for w in weights), default=0),
        )


def _take(rw: Rewriter, path: str, channels: Channels | None, into: str) -> None:
    """Let one layer do what the batch norm did."""
    layer = rw.module(path)
    if channels is None or layer.weight.is_meta:
        if layer.bias is None:
            add_bias(rw, path, None, None, "takes a batch norm in")
        return
    weight, bias = (into_outputs if into == "prev" else into_inputs)(layer, channels)
    put_affine(
        rw, path, weight, bias, f"takes the batch norm {'behind' if into == 'prev' else 'before'} it in"
    )


def _before(model: Model, node: fx.Node, shapes: Mapping[str, Any]) -> str | None:
    """The layer whose outputs a batch norm alone reads."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module" or set(source.users) != {node}:
        return None
    path = str(source.target)
    if not runs_once(model, path) or not runs_once(model, str(node.target)):
        return None
    return path if _fits(model.module(path), shapes.get(source.name), outputs=True) else None


def _after(model: Model, node: fx.Node, shapes: Mapping[str, Any]) -> tuple[str, ...]:
    """The layers that read a batch norm, where each of them can take it in."""
    if not runs_once(model, str(node.target)):
        return ()
    paths = []
    for user in node.users:
        path = str(user.target)
        if user.op != "call_module" or not runs_once(model, path):
            return ()
        layer = model.module(path)
        if not _fits(layer, shapes.get(node.name), outputs=False) or not _whole(
            layer, model.module(str(node.target))
        ):
            return ()
        paths.append(path)
    return tuple(paths)


def _fits(layer: nn.Module, shape: Any, outputs: bool) -> bool:
    """Whether the channels of a layer are those that a batch norm counts: the second axis."""
    if isinstance(layer, Conv):
        return outputs or not layer.transposed
    if isinstance(layer, Linear) or type(layer) is nn.Linear:
        return shape is not None and len(shape) == 2
    return False


def _whole(layer: nn.Module, norm: Any) -> bool:
    """Whether every output of a layer sees the batch norm's constant the same way: no zeros at the border."""
    if not isinstance(layer, Conv):
        return True
    if layer.padding_mode == "zeros" and _padded(layer):
        if norm.running_mean is None or norm.running_mean.is_meta:
            return False
        return not bool(statistics(norm).shift.any())
    return True


def _padded(layer: Conv) -> bool:
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return layer.padding != "valid" and any(layer.padding)


def _no_statistics(kind: str, model: Model, chosen: Sequence[str]) -> Iterator[Diagnostic]:
    training = [path for path in chosen if model.module(path).training]
    absent = [path for path in chosen if model.module(path).running_mean is None]
    if training:
        yield Diagnostic(
            "E320",
            f"`{kind}` needs batch norms at rest",
            notes=(f"{some(training)} is in training, where it uses the statistics of its batch",),
            help="call .eval() on the module first",
        )
    if absent:
        yield Diagnostic(
            "E320",
            f"`{kind}` needs running statistics",
            notes=(f"{some(absent)} has none (track_running_stats = False), so it depends on its batch",),
            help="leave it out with `except`, or train it with running statistics",
        )


def _split(kind: str, model: Model, chosen: Sequence[str]) -> Iterator[Diagnostic]:
    """Layers that several batch norms read: no single weight does what each of them wants."""
    feeds: dict[str, list[str]] = {}
    for node in model.gm.graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.target in chosen else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        if isinstance(model.module(str(source.target)), Conv | Linear | nn.Linear):
            feeds.setdefault(str(source.target), []).append(str(node.target))
    for layer, norms in feeds.items():
        if len(norms) > 1:
            yield Diagnostic(
                "E341",
                f"`{layer}` feeds {' and '.join(dict.fromkeys(norms))}",
                notes=("one weight cannot hold what several batch norms make of it",),
                help="leave these batch norms out with `except`, or give each a layer of its own",
            )


def _unable(kind: str, into: str, model: Model, paths: Sequence[str]) -> Diagnostic:
    place = {"prev": "before", "next": "behind", "either": "beside"}[into]
    return Diagnostic(
        "E320",
        f"`{kind}` cannot fold `{some(paths)}`",
        notes=(
            f"no convolution or linear stands {place} it alone, of which it counts the channels"
            + ("" if into == "prev" else ", and that pads with no zeros"),
        ),
        help="write into = either, or leave it out" if into != "either" else "leave it out with `except`",
        about="select",
    )


def _nothing(kind: str, model: Model, chosen: Sequence[str]) -> Diagnostic:
    if chosen:
        note = f"none of {len(chosen)} batch norms stands alone beside a convolution or linear"
        return Diagnostic("E320", f"`{kind}` can fold no batch norm", notes=(note,), help="try into = either")
    return Diagnostic("E320", f"`{kind}` finds no batch norm", help="leave the stage out")
