"""Why a network of convolutions has no widths: what it is made of, how its channels divide, its norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import fx

from effc.compiler.graph_shapes import graph_shapes
from effc.compiler.readers import runs_once
from effc.compiler.trace import TracedModel
from effc.passes._dense import shared, some
from effc.passes.adaptive._fire_conv import CONVOLUTIONS
from effc.passes.adaptive._fire_net import ACTIVATIONS, ADDS, PASS, word
from effc.passes.adaptive._slim_net import (
    BATCH_NORMS,
    ENCODER,
    LAYERS,
    Net,
    Widths,
    network,
    sketched,
)
from effc.passes.adaptive._slim_norm import SlimNorm
from effc.specs.diagnostic import Diagnostic

_PLAIN = (*PASS, *ACTIVATIONS, *ADDS, "mul", "interpolate", "upsample", "getattr", "size")
"""What treats all channels alike and leaves them at their places."""
_REDUCE = ("mean", "sum", "amax")


def unfit(
    kind: str, model: TracedModel, encoder: Sequence[float], decoder: Sequence[float]
) -> Iterator[Diagnostic]:
    """Every reason, the first kind alone: odd parts, shared weights, norms, widths, parts that differ."""
    net = network(model)
    inputs = [n for n in model.gm.graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        title = f"`{kind}` narrows networks of one input, and this one takes {len(inputs)}"
        yield Diagnostic("E320", title, help="trace the part that reads images")
        return
    if not any(isinstance(model.module(p), LAYERS) and p not in net.whole for p in net.region):
        note = "it narrows convolutions and linears that other layers read"
        yield Diagnostic("E320", f"`{kind}` finds no layer to narrow", (), (note,), "use a deeper network")
        return
    shapes = graph_shapes(model)
    if odd := [n for n in model.gm.graph.nodes if not _alike(model, net, n, shapes)]:
        note = f"{some([_name(n) for n in odd])} reads channels by their place, or is no layer with a width"
        help_ = "write it in convolutions, linears, batch norms, sums, pools and activations"
        title = f"`{kind}` cannot narrow what lies around `{_name(odd[0])}`"
        yield Diagnostic("E323", title, (), (note,), help_)
        return
    ties = shared(model)
    if tied := [p for p in net.region if p in ties or not runs_once(model, p)]:
        verb = "serve" if len(tied) > 1 else "serves"
        note = f"{some(tied)} {verb} more than one place"
        yield Diagnostic("E341", f"`{kind}` cannot narrow layers that share weights", (), (note,))
        return
    norms: dict[str, Any] = {
        p: model.module(p) for p in net.region if isinstance(model.module(p), BATCH_NORMS)
    }
    if bare := [p for p, norm in norms.items() if norm.running_mean is None]:
        note = f"{some(bare)} has none (track_running_stats = False)"
        yield Diagnostic("E320", f"`{kind}` needs running statistics to start from", (), (note,))
        return
    found = list(_uneven(model, net, encoder, decoder))
    yield from found or _apart(kind, model, net, net.all(encoder, decoder))


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _alike(model: TracedModel, net: Net, node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a node does the same to every channel, or is a layer that reads those that are there."""
    if node.op in ("placeholder", "output"):
        return True
    does = word(model, node)
    source = node.args[0] if node.args else None
    axes = len(shapes.get(source.name, ())) if isinstance(source, fx.Node) else 0
    if node.op == "call_module" and str(node.target) in net.region:
        module: Any = model.module(str(node.target))
        grouped = isinstance(module, CONVOLUTIONS) and module.groups > 1
        if isinstance(module, (SlimNorm, *BATCH_NORMS)):
            return True
        if isinstance(module, CONVOLUTIONS):
            return not (grouped and module.padding_mode != "zeros")
        return axes == 2
    if does == "flatten":
        start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else None)
        if node.op == "call_module":
            start = getattr(model.module(str(node.target)), "start_dim", None)
        return isinstance(start, int) and start == 1
    if does in ("view", "reshape"):
        return len(node.args) == 3 and isinstance(node.args[2], int) and node.args[2] == -1
    if does == "getitem":
        return isinstance(source, fx.Node) and source.name not in shapes
    if does in _REDUCE:
        over = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = [over] if isinstance(over, int) else list(over) if isinstance(over, tuple | list) else [0]
        return all(isinstance(d, int) and d % max(1, axes) >= 2 for d in dims)
    return does in _PLAIN


def _uneven(
    model: TracedModel, net: Net, encoder: Sequence[float], decoder: Sequence[float]
) -> Iterator[Diagnostic]:
    """The first layer of which a width is no whole number of channels or groups."""
    for path, region in net.region.items():
        layer: Any = model.module(path)
        if path in net.whole or not isinstance(layer, LAYERS):
            continue
        split = getattr(layer, "groups", 1)
        size, what = (split, "groups") if split > 1 else (layer.weight.shape[0], "channels")
        for w in encoder if region == ENCODER else decoder:
            if abs(w * size - round(w * size)) > 1e-6 or round(w * size) < 1:
                fits = sorted((n / size for n in range(1, size + 1)), key=lambda f: abs(f - w))[:3]
                yield Diagnostic(
                    "E331",
                    f"{100 * w:g}% of the {size} {what} of {path} is no whole number of them",
                    help=f"use widths such as {', '.join(f'{100 * f:g}%' for f in sorted(fits))}",
                )
                return


def _apart(kind: str, model: TracedModel, net: Net, configs: Sequence[Widths]) -> Iterator[Diagnostic]:
    """The first configuration whose parts do not go together."""
    whole = sketched(model, net, (1.0,) * (1 + net.decoders)).channels
    for widths in configs:
        if said := _unequal(model, net, widths, whole):
            words = ", ".join(f"{100 * w:g}%" for w in widths)
            title = f"`{kind}` finds parts that do not go together at widths {words}"
            help_ = "give values that are added or multiplied one width: all encoder, or all one decoder"
            yield Diagnostic("E331", title, (), (said,), help_)
            return


def _unequal(model: TracedModel, net: Net, widths: Widths, whole: dict[str, int]) -> str:
    """What goes wrong at a width, in words; values that had as many channels as each other have so still."""
    try:
        found = sketched(model, net, widths).channels
    except (RuntimeError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    for node in model.gm.graph.nodes:
        read = [n.name for n in node.all_input_nodes if n.name in found and n.name in whole]
        for one, other in pairwise(read):
            if whole[one] == whole[other] and found[one] != found[other]:
                return f"`{_name(node)}` gets {found[one]} and {found[other]} channels"
    return ""
