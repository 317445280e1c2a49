"""Exits of a model: what they answer, what it costs to get there, who leaves, and who should.

Shapes: B sequences, T tokens, N tokens that count, d width, V classes, G exits, the last head not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.exit import Exit
from effc.compiler.blocks.unit import Unit
from effc.compiler.losses import IGNORED
from effc.compiler.method import Data
from effc.compiler.model import Model
from effc.compiler.ops_adaptive import LEFT
from effc.compiler.plan import ATTENDED
from effc.compiler.roles import layer_of
from effc.compiler.spent import counting
from effc.compiler.step import Step

SEEN = 16
"""Held-out sequences that are looked at for the report."""


def exits_in(model: Model) -> dict[str, Exit]:
    """Path -> exit, from the first layer on."""
    found = {path: unit for path, unit in model.units() if isinstance(unit, Exit)}
    return dict(sorted(found.items(), key=lambda item: item[1].number))


def taps(model: Model, ids: Tensor, step: Step, keep: Tensor) -> tuple[list[Tensor], Tensor]:
    """What every exit [N, V] and the last head [N, V] answer for the tokens `keep` [B, T]; nobody leaves."""
    exits = exits_in(model)
    seen: dict[str, Tensor] = {}

    def see(path: str) -> Any:
        return exits[path].register_forward_pre_hook(lambda _, args: seen.__setitem__(path, args[0][keep]))

    handles = [see(path) for path in exits]
    was = {path: unit.training for path, unit in exits.items()}
    try:
        for unit in exits.values():
            unit.train()
        last: Tensor = model(ids, step=step)
    finally:
        for handle in handles:
            handle.remove()
        for path, unit in exits.items():
            unit.train(was[path])
    behind = _behind(model)
    logits = []
    for path, unit in exits.items():
        z = unit.logits(seen[path])
        for block in behind:
            z = block(z)
        logits.append(z)
    return logits, last[keep]


def _behind(model: Model) -> list[nn.Module]:
    """Blocks behind the answers, such as a soft cap, which every answer goes through."""
    called = [str(n.target) for n in model.gm.graph.nodes if n.op == "call_module"]
    return [model.module(path) for path in called[called.index("answers") + 1 :]]


def chances(gates: Sequence[Tensor]) -> Tensor:
    """Gates of each exit [N] -> P [G + 1, N], the last of them of the last head; they sum to one."""
    g = torch.stack(list(gates))
    before = torch.cat((torch.zeros_like(g[:1]), g.cumsum(0)[:-1]))
    p = torch.minimum(g, 1 - before).clamp(min=0)
    return torch.cat((p, (1 - p.sum(0, keepdim=True)).clamp(min=0)))


def costs(model: Model, mean: int = ATTENDED) -> Tensor:
    """FLOPs of a token up to each exit and to the end [G + 1], as shares of the last.

    Keys and values of the layers behind are made for a token that has left as well.
    """
    return torch.tensor(_flops(model, mean)) / _flops(model, mean)[-1]


def _flops(model: Model, mean: int) -> list[float]:
    units = list(model.units())
    ends = [layer_of(path) or 0 for path in exits_in(model)]
    behind = [layer_of(path) for path, _ in units]
    last = 1 + max((n for n in behind if n is not None), default=0)
    found = []
    for end in [*ends, last]:
        total = 0
        for path, unit in units:
            layer = layer_of(path)
            place = layer if layer is not None else (last if path.startswith("head") else -1)
            if place <= end:
                total += unit.flops(mean)
            elif isinstance(unit, Attention):
                total += _filled(unit, mean)
        found.append(float(total))
    return found


def _filled(block: Attention, mean: int) -> int:
    """FLOPs of keys and values alone."""
    made = (block.k, block.v)
    return sum(u.flops(mean) for b in made for u in b.modules() if isinstance(u, Unit))


def targets(surprise: Tensor, cost: Tensor, weight: float) -> Tensor:
    """surprise [G + 1, N], cost [G + 1] -> what each gate should say [G, N]: 1 from the best exit on."""
    best = (surprise + weight * cost.to(surprise.device)[:, None]).argmin(0)
    exits = torch.arange(surprise.shape[0] - 1, device=surprise.device)
    return (exits[:, None] >= best).to(surprise.dtype)


def left(model: Model, data: Data) -> Mapping[str, Any]:
    """On held-out text: the share that leaves at each exit, mean depth, FLOPs a token, counted and by P."""
    size = min(SEEN, data.size("heldout"))
    batch = data.batch("heldout", range(size))
    with counting(model, ATTENDED) as spent:
        model(batch.ids, step=batch.step)
    gone = batch.step.sides[LEFT]
    count = len(exits_in(model))
    keep = torch.ones_like(batch.labels, dtype=torch.bool)
    again = data.batch("heldout", range(size))
    logits, _ = taps(model, again.ids, again.step, keep)
    units = exits_in(model).values()
    share = chances([u.gates(z) for u, z in zip(units, logits, strict=True)]).double().mean(1)
    flops = torch.tensor(_flops(model, ATTENDED), dtype=torch.float64)
    return {
        "left": [float((gone == n).double().mean()) for n in range(count)],
        "depth": spent.depth,
        "flops_spent": spent.flops_per_token,
        "flops_expected": float((share * flops).sum()),
        "labelled": int((batch.labels != IGNORED).sum()),
    }
