"""How alike layers attend, and which of them share a map so that most of it stays.

Shapes: N sequences, H heads, R query rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.echo_attention import LeadAttention
from effc.compiler.step import Step

_SAME = ("width", "heads", "kv_heads", "head_dim", "bias", "bias_o", "window", "causal", "cap", "scale")
_OWN = ("rope", "qk_norm", "dtype")


def mask_of(block: Attention) -> tuple[object, ...]:
    """What two layers must have alike for one map to serve both."""
    return (*(getattr(block, name) for name in _SAME), str(block.rope), block.dtype)


def differ(one: Attention, two: Attention) -> str | None:
    """The first argument in which two blocks differ so that they cannot share a map."""
    names = (*_SAME, "rope", "dtype")
    return next((n for n in names if getattr(one, n) != getattr(two, n)), None)


def leading(old: Attention, group: int, maps: str = "store") -> LeadAttention:
    """The block with the same children, which hands on its map."""
    given = {name: getattr(old, name) for name in (*_SAME, *_OWN)}
    new = LeadAttention(**given, group=group, maps=maps)  # type: ignore[arg-type]
    for name, child in old._modules.items():
        new._modules[name] = child
    return new


def rows_of_map(block: Attention, x: Tensor, step: Step, rows: int) -> Tensor:
    """The probabilities [B, H, R, T] of some query rows, evenly spread, of one run of a block."""
    lead = leading(block, 0)
    lead.mixed(x, step)
    found = step.sides.pop(lead.tells)
    places = torch.linspace(0, found.shape[2] - 1, min(rows, found.shape[2])).round().long()
    return found[:, :, places].float()


def likeness(maps: Mapping[int, Tensor]) -> dict[tuple[int, int], float]:
    """Layer -> rows of its maps [N, H, R, T]; by pair of layers the mean over N and H of their cosine."""
    flat = {layer: found.flatten(2) for layer, found in maps.items()}
    unit = {layer: f / f.norm(dim=-1, keepdim=True).clamp(min=1e-12) for layer, f in flat.items()}
    layers = sorted(unit)
    return {
        (a, b): float((unit[a] * unit[b]).sum(-1).mean())
        for i, a in enumerate(layers)
        for b in layers[i + 1 :]
    }


Alike = Callable[[int, int], float]


def grouped(
    chains: Sequence[Sequence[int]], span: int, followers: int, alike: Alike
) -> list[list[int]] | None:
    """Groups of at most `span` neighbors of a chain, with so many followers in all, whose leaders and
    followers are most alike in sum; None when there are no such groups.
    """
    best: dict[int, tuple[float, list[list[int]]]] = {0: (0.0, [])}
    for chain in chains:
        table = [best]
        for end in range(1, len(chain) + 1):
            here: dict[int, tuple[float, list[list[int]]]] = {}
            for size in range(1, min(span, end) + 1):
                group = list(chain[end - size : end])
                gain = sum(alike(group[0], other) for other in group[1:])
                for count, (value, groups) in table[end - size].items():
                    made = count + size - 1
                    if made <= followers and value + gain > here.get(made, (-torch.inf, []))[0]:
                        here[made] = value + gain, [*groups, group] if size > 1 else groups
            table.append(here)
        best = table[-1]
    return best[followers][1] if followers in best else None


def most(chains: Sequence[Sequence[int]], span: int) -> int:
    """The largest number of followers."""
    return sum(len(chain) - -(-len(chain) // span) for chain in chains)
