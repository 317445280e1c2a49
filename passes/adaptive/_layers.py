"""Layers that may be skipped: which models have them, and blocks that skip in place of those that do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.mlp import MLP
from effc.compiler.blocks.skipping import SkipAttention, SkipHead, SkipMLP
from effc.compiler.blocks.unit import Unit
from effc.compiler.layers import segments
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes._dense import some
from effc.specs.diagnostic import Diagnostic, EffcError

KEPT = ("packed", "sparse", "sparse_2_4", "sparse_4_8", "tied", "low_rank", "adapter", "dense", "unit_gain")
"""Facts of weights that blocks which skip leave as they are: they hold the very same modules."""


def unfit(kind: str, model: Model) -> Iterator[Diagnostic]:
    """Why layers of a model cannot be skipped: no decoder, other blocks, or they skip already."""
    if "head" not in dict(model.gm.named_children()):
        note = "an encoder reads all of its input at once, and has no head to answer with"
        yield Diagnostic("E320", f"`{kind}` needs a decoder", notes=(note,), help="use a decoder")
        return
    try:
        segments(model.gm.graph)
    except EffcError as error:
        yield from error.diagnostics
        return
    blocks = dict(model.units())
    if done := [path for path, unit in blocks.items() if isinstance(unit, SkipAttention | SkipMLP)]:
        note = f"{some(done)} {'runs' if len(done) == 1 else 'run'} for some tokens only"
        yield Diagnostic("E325", "layers of this model skip tokens already", (), (note,), "skip once")
        return
    wrong = {
        path: type(unit).__name__
        for path, unit in blocks.items()
        if path.startswith("layers.") and path.count(".") == 2 and _mixes(path, unit)
    }
    if wrong:
        note = f"{some(list(wrong))}: {', '.join(sorted(set(wrong.values())))}"
        help_ = "put this stage before the one that changed them"
        yield Diagnostic(
            "E320", f"`{kind}` skips softmax attention and dense feed-forward blocks", (), (note,), help_
        )


def _mixes(path: str, unit: Unit) -> bool:
    """Whether a block of a layer is neither norm nor one that can be skipped."""
    if path.endswith(".attention"):
        return type(unit) is not Attention or not unit.causal
    return path.endswith((".mlp", ".moe")) and type(unit) is not MLP


def skipping(rw: Rewriter, layer: int, **settings: Any) -> None:
    """Put blocks that skip in place of those of a layer; weights stay the ones they are.

    `settings`: least, fill, reach, horizon, as `SkipAttention` takes them.
    """
    for name, kind in (("attention", SkipAttention), ("mlp", SkipMLP)):
        path = f"layers.{layer}.{name}"
        given = {key: value for key, value in settings.items() if name == "attention" or key != "fill"}
        rw.swap(path, with_children(kind, rw.module(path), **given), _words(**settings))


def skipping_head(rw: Rewriter) -> None:
    """The head runs for tokens that are still there."""
    head = rw.module("head")
    if isinstance(head, Linear):
        rw.swap("head", with_children(SkipHead, head), "of tokens that have not left")


def with_children(kind: type[Unit], old: Unit, **more: Any) -> Unit:
    """A block of another kind with the arguments, children and tensors of an old one."""
    given = {name: value for name, value in old.spec().items() if name != "type"}
    if kind is SkipHead:
        given |= {"dtype": str(getattr(old, "dtype", "float32"))}
    new = kind(**given, **more)
    for name in old._parameters:
        new._parameters[name] = old._parameters[name]
    for name, child in old._modules.items():
        new._modules[name] = child
    return new


def _words(least: int, reach: int | None = None, **_: Any) -> str:
    if reach is None:
        return f"for tokens of depth {least} and more"
    return f"for tokens of depth {least} and more, the first {reach} positions"
