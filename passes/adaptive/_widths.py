"""Widths of one model: the first channels and heads of every layer, masked in place or cut out.

Shapes: B sequences, T tokens, d width, f channels, H query and Hk key heads of width h. The lower layers are
the encoder, the upper ones the decoder; the stream between blocks keeps its width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.mlp import MLP
from effc.compiler.layers import segments
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import layer_of
from effc.passes._dense import shared, some
from effc.specs.diagnostic import Diagnostic, EffcError

Config = tuple[float, float]
"""Width of the encoder and of the decoder, as shares."""


def divided(model: Model, share: float) -> int:
    """How many layers are the encoder; at least one on either side of the line."""
    return min(max(1, int(share * model.layers + 0.5)), max(1, model.layers - 1))


def kept(unit: Attention | MLP, width: float) -> int:
    """Inputs of `o` or `down` that stay at a width; whole groups of heads."""
    if isinstance(unit, MLP):
        return int(unit.hidden * width + 1e-6)
    groups = int(unit.kv_heads * width + 1e-6)
    return groups * (unit.heads // unit.kv_heads) * unit.head_dim


def slim(model: Model) -> dict[str, Attention | MLP]:
    """The blocks that have a width, by path."""
    return {p: u for p, u in model.units() if p.startswith("layers.") and isinstance(u, Attention | MLP)}


def unfit(kind: str, model: Model, widths: Sequence[float]) -> Iterator[Diagnostic]:
    """Why a model has no such widths: other blocks, shared or packed weights, heads that do not divide."""
    try:
        segments(model.gm.graph)
    except EffcError as error:
        yield from error.diagnostics
        return
    if model.layers < 2:
        note = "the lower layers are the encoder, the upper ones the decoder"
        yield Diagnostic("E330", f"`{kind}` needs two layers at least", (), (note,), "use a deeper model")
        return
    blocks = {
        p: u
        for p, u in model.units()
        if p.startswith("layers.") and p.count(".") == 2 and p.endswith((".attention", ".mlp", ".moe"))
    }
    odd: dict[str, nn.Module] = {p: u for p, u in blocks.items() if type(u) not in (Attention, MLP)}
    odd |= {
        f"{p}.{name}": child
        for p, u in blocks.items()
        if p not in odd
        for name, child in u.named_children()
        if "norm" not in name and type(child) is not Linear
    }
    if odd:
        note = f"{some(list(odd))}: {', '.join(sorted({type(u).__name__ for u in odd.values()}))}"
        help_ = "put this stage before the one that changed them"
        yield Diagnostic(
            "E323", f"`{kind}` needs dense attention and feed-forward blocks", (), (note,), help_
        )
        return
    ties = shared(model)
    if tied := [
        f"{p}.{name}" for p, u in blocks.items() for name, _ in u.named_children() if f"{p}.{name}" in ties
    ]:
        help_ = "put this stage before the one that ties"
        note = f"{some(tied)} {'share' if len(tied) > 1 else 'shares'} weights with other layers"
        yield Diagnostic("E341", f"`{kind}` cannot narrow layers that share weights", (), (note,), help_)
        return
    yield from _unwhole(kind, slim(model), widths)


def _unwhole(kind: str, blocks: dict[str, Attention | MLP], widths: Sequence[float]) -> Iterator[Diagnostic]:
    for path, unit in blocks.items():
        size, word = (unit.hidden, "channels") if isinstance(unit, MLP) else (unit.kv_heads, "key heads")
        wrong = [w for w in widths if abs(w * size - round(w * size)) > 1e-6 or round(w * size) < 1]
        if wrong:
            fits = [n / size for n in range(1, size + 1)]
            near = sorted(sorted(fits, key=lambda w: abs(w - wrong[0]))[:3])
            yield Diagnostic(
                "E331",
                f"{100 * wrong[0]:g}% of the {size} {word} of {path} is no whole number of them",
                help=f"use widths such as {', '.join(f'{100 * w:g}%' for w in near)}",
            )
            return


@contextmanager
def at_width(model: Model, config: Config, encoder: int) -> Iterator[None]:
    """The model at a width: what lies behind the first channels and heads is zero."""
    handles = []
    for path, unit in slim(model).items():
        width = config[0] if (layer_of(path) or 0) < encoder else config[1]
        if width < 1:
            door: Any = unit.down if isinstance(unit, MLP) else unit.o
            handles.append(door.register_forward_pre_hook(_masking(kept(unit, width))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masking(count: int) -> Any:
    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        live = torch.arange(args[0].shape[-1], device=args[0].device) < count
        return (args[0] * live.to(args[0].dtype),)

    return enter


def cut(rw: Rewriter, config: Config, encoder: int) -> None:
    """Make the model at a width an ordinary dense one."""
    with rw.together():
        for path in slim(rw.model):
            width = config[0] if (layer_of(path) or 0) < encoder else config[1]
            if width < 1:
                rw.swap(path, _narrow(rw.present(path), width), f"{100 * width:g}% of its width")


def _narrow(old: Attention | MLP, width: float) -> Attention | MLP:
    given: dict[str, Any] = {name: value for name, value in old.spec().items() if name != "type"}
    count = kept(old, width)
    if isinstance(old, MLP):
        rows = {"gate": count, "up": count, "down": None}
        given["hidden"] = count
        new: Attention | MLP = MLP(**given)
    else:
        keys = count // (old.heads // old.kv_heads)
        rows = {"q": count, "k": keys, "v": keys, "o": None}
        given["heads"], given["kv_heads"] = count // old.head_dim, keys // old.head_dim
        new = Attention(**given)
    for name, child in old.named_children():
        if name not in rows:  # norms of a head serve all heads
            new._modules[name] = child
            continue
        end, fresh = rows[name], new.get_submodule(name)
        weight, bias = child.get_parameter("weight").detach(), getattr(child, "bias", None)
        part = weight[:, :count] if end is None else weight[:end]
        fresh._parameters["weight"] = nn.Parameter(part.clone(), requires_grad=False)
        if bias is not None:
            fresh._parameters["bias"] = nn.Parameter(bias.detach()[:end].clone(), requires_grad=False)
    return new
