"""Norms and what they feed: which linears a norm's channels can be rescaled for, and why others cannot."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.model import Model
from effc.compiler.readers import Readers, readers
from effc.passes._dense import shared, some
from effc.specs.diagnostic import Diagnostic


@dataclass(frozen=True, slots=True)
class Fed:
    """A norm, the linears behind it that are rounded, and those that are not."""

    norm: str
    chosen: tuple[str, ...]
    others: tuple[str, ...]


def feeding(
    model: Model, targets: Collection[str], layers: Collection[int | None] | None = None
) -> list[Fed]:
    """Every norm that feeds a target, in model order; of these layers alone where they are given."""
    found: list[Fed] = []
    for path in model.paths("norm"):
        if layers is None or model.roles[path].layer in layers:
            units = readers(model, path).units
            chosen = tuple(u for u in units if u in targets)
            if chosen:
                found.append(Fed(path, chosen, tuple(u for u in units if u not in targets)))
    return found


def attending(model: Model, targets: Collection[str]) -> list[str]:
    """Attention blocks whose queries, keys and values all come from targets."""
    blocks = dict.fromkeys(path.rpartition(".")[0] for path in targets)
    return [b for b in blocks if isinstance(model.module(b), Attention) and _whole(b, targets)]


def _whole(block: str, targets: Collection[str]) -> bool:
    return all(f"{block}.{name}" in targets for name in ("q", "k", "v"))


def unfit_linears(kind: str, model: Model, targets: Collection[str]) -> Iterator[Diagnostic]:
    """Targets that are no linears with inputs of their own, or share their weights."""
    modules: dict[str, nn.Module] = {path: model.module(path) for path in targets}
    other = {p: m for p, m in modules.items() if not isinstance(m, Linear | Packed)}
    if other:
        types = sorted({type(m).__name__ for m in other.values()})
        yield Diagnostic(
            "E320",
            f"`{kind}` rounds the inputs of linears",
            notes=(f"{some(list(other))}: {', '.join(types)}",),
            help="leave them out with `except`, or pack them alone with quantize.rtn or quantize.gptq",
            about="select",
        )
    first = [p for p in modules if p.startswith("embedding.") and p not in other]
    if first:
        yield Diagnostic(
            "E320",
            f"`{kind}` rounds inputs inside layers and of the head",
            notes=(f"{some(first)} reads what comes in",),
            help="leave it out with `except`",
            about="select",
        )
    held = shared(model)
    tied = [p for p in modules if p in held]
    if tied:
        yield Diagnostic(
            "E341",
            f"`{kind}` cannot round a weight that is shared: each place has inputs of its own",
            notes=(f"{some(tied)} shares its weight with another module",),
            help="leave it out with `except`, or pack it with quantize.gptq, which keeps what is shared",
            about="select",
        )


def unfit_attention(kind: str, model: Model, targets: Collection[str]) -> Iterator[Diagnostic]:
    """Attention whose probabilities nobody sees, so that they cannot be rounded."""
    blocks: dict[str, Any] = {
        b: model.module(b)
        for b in dict.fromkeys(path.rpartition(".")[0] for path in targets)
        if b.endswith("attention") and _whole(b, targets)
    }
    odd = [b for b, block in blocks.items() if type(block) is not Attention]
    if odd:
        yield Diagnostic(
            "E320",
            f"`{kind}` rounds the probabilities of softmax attention, and `{odd[0]}` has none",
            notes=(f"{some(odd)}: {type(blocks[odd[0]]).__name__}",),
            help="write softmax = none, or leave these blocks out with `except`",
            about="softmax",
        )


def unfit_norms(kind: str, model: Model, targets: Mapping[str, Any], scheme: str) -> Iterator[Diagnostic]:
    """Norms whose channels cannot take scales of their own away from their readers."""
    held = shared(model)
    for fed in feeding(model, targets):
        norm: Any = model.module(fed.norm)
        read = readers(model, fed.norm)
        if why := _why_not(model, fed, norm, read, held):
            yield Diagnostic(
                "E320",
                f"`{kind}` cannot move the scales of `{fed.norm}` into what reads it",
                notes=(why,),
                help="write ln = layer, or leave the layers behind it out with `except`",
                about="ln",
            )
            return
        if scheme == "asymmetric" and norm.bias is None:
            yield Diagnostic(
                "E325",
                f"`{fed.norm}` has no bias, which zero points of its channels would move into",
                notes=(f"it is a norm of form {norm.form} without a shift",),
                help="write scheme = symmetric, or auto, which is symmetric here",
                about="scheme",
            )
            return
        widths = sorted({int(targets[path].act_bits) for path in fed.chosen})
        if len(widths) > 1:
            yield Diagnostic(
                "E325",
                f"what reads `{fed.norm}` shares one grid, and rules give it {len(widths)} widths",
                notes=(f"act_bits = {' and '.join(map(str, widths))}",),
                help=f"give {', '.join(fed.chosen)} the same act_bits",
                about="rules",
            )
            return


def _why_not(model: Model, fed: Fed, norm: Any, read: Readers, held: Collection[str]) -> str:
    """Why the scales of a norm have nowhere to go; empty where they have."""
    if not isinstance(norm, Norm):
        return f"it is {type(norm).__name__}, not a norm of the last axis"
    if read.others:
        return f"it is read by {', '.join(read.others)} as well"
    odd = [u for u in fed.others if not isinstance(model.module(u), Linear)]
    if odd:
        return (
            f"{some(odd)} reads it too and is {type(model.module(odd[0])).__name__}, which cannot be scaled"
        )
    tied = [u for u in (fed.norm, *fed.others) if u in held]
    if tied:
        return f"{some(tied)} shares its tensors with another module"
    layers = {model.roles[u].layer for u in (*fed.chosen, *fed.others)}
    if len(layers) > 1:
        return f"it feeds {len(layers)} layers"
    return ""
