"""Feed-forward blocks that a mixture replaces: where they are, which cannot be, and the exchange."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.mlp import MLP
from effc.compiler.blocks.moe import MoE
from effc.compiler.blocks.unit import Unit
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import layer_of
from effc.passes._dense import finite, some
from effc.specs.diagnostic import Diagnostic


def feed_forwards(model: Model) -> list[str]:
    """Paths of the dense feed-forward blocks, by layer."""
    found = [path for path, unit in model.units() if type(unit) is MLP and path.endswith(".mlp")]
    return sorted(found, key=lambda path: layer_of(path) or 0)


def unfit(kind: str, model: Model, paths: Sequence[str], verb: str) -> list[Diagnostic]:
    """Why `kind` cannot replace the blocks at paths: there are none, or they have biases, share weights, or
    are no longer dense.
    """
    if not paths:
        mixed = [path for path, unit in model.units() if isinstance(unit, MoE)]
        more = "is a mixture" if len(mixed) == 1 else "are mixtures"
        note = f"{some(mixed)} {more} already" if mixed else "it has no block called mlp"
        return [Diagnostic("E320", f"`{kind}` finds no dense feed-forward block to {verb}", notes=(note,))]
    leaves = {f"{path}.{name}": unit for path in paths for name, unit in model.module(path).named_children()}
    if odd := [path for path, unit in leaves.items() if not isinstance(unit, Linear)]:
        types = sorted({type(leaves[path]).__name__ for path in odd})
        help_ = "put this stage before the one that made them, or fold them first"
        notes = (f"{some(odd)}: {', '.join(types)}",)
        return [Diagnostic("E323", f"`{kind}` needs dense weights", notes=notes, help=help_)]
    if biased := [path for path, unit in leaves.items() if unit.bias is not None]:
        note = f"{some(biased)} has a bias, and a stack of experts holds none"
        return [Diagnostic("E320", f"`{kind}` cannot {verb} blocks with biases", notes=(note,))]
    tied = {name for pair in model.ties().items() for name in pair}
    if shared := [path for path in leaves if f"{path}.weight" in tied]:
        note = f"{some(shared)} {'share' if len(shared) > 1 else 'shares'} weights with other layers"
        help_ = "put this stage before the one that ties"
        return [Diagnostic("E341", f"`{kind}` cannot {verb} blocks that share weights", (), (note,), help_)]
    return []


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def seeded(name: str) -> torch.Generator:
    """Random numbers of one block or tensor, by the seed of the stage: no other's depend on them."""
    digest = hashlib.sha256(f"{torch.initial_seed()}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def filled(moe: MoE, name: str, blocks: Sequence[MLP], router_std: float, dice: torch.Generator) -> MoE:
    """The mixture with `blocks` as its experts and a router of deviation `router_std`; on meta still empty.

    Raises:
        EffcError: E420 for a weight that is not finite, by the `name` of the block.
    """
    if blocks[0].up.weight.is_meta:
        return moe
    router = torch.randn(moe.n_experts, moe.width, generator=dice) * router_std
    moe.router.weight = parameter(router.to(blocks[0].up.weight.dtype))
    for part in ("gate", "up", "down") if moe.gated else ("up", "down"):
        for block in dict.fromkeys(blocks):
            finite(f"{name}.{part}", getattr(block, part).weight.detach())
        stacked = torch.stack([getattr(block, part).weight.detach() for block in blocks])
        getattr(moe.experts, part).weight = parameter(stacked)
    return moe


def replaced(rw: Rewriter, path: str, unit: Unit, detail: str) -> str:
    """Put a mixture in place of a feed-forward block; call it inside `rw.together()`. Returns its path."""
    return exchanged(rw, path, path.removesuffix("mlp") + "moe", unit, detail)


def exchanged(rw: Rewriter, path: str, new: str, unit: Unit, detail: str) -> str:
    """Put a block at another path in place of one.

    The block is exchanged empty and filled after, so that a streamed stage holds one at a time.
    """
    rw.insert(new, unit.blank(), after=path)
    rw.remove(path)
    rw.swap(new, unit, detail)
    return new
