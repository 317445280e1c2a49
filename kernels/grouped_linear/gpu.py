"""grouped_linear on a GPU, as the checks of kernels/gpu/check.py see it: its cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.kernels.gpu.check import Case
from effc.kernels.grouped_linear.emit_triton import emit
from effc.kernels.grouped_linear.layout_gpu import Stack, stack, together
from effc.kernels.grouped_linear.reference import linear, mixture, paired, route
from effc.kernels.grouped_linear.spec_gpu import PAIR, GroupedLinearSpec, GroupTile

__all__ = ["cases", "emit", "launches", "parse"]


def parse(data: Mapping[str, Any]) -> GroupedLinearSpec:
    return GroupedLinearSpec.model_validate(data)


def cases(spec: GroupedLinearSpec) -> Iterator[Case]:
    """Choices as they come, all rows to some, slots without an expert; one row; each kernel, then all."""
    for tile in spec.tiles:
        yield from _cases(spec, tile, m=9, spare=20, seed=tile.bm)
    yield _whole(spec, spec.tiles[0], m=1, spare=0, seed=3)
    yield _whole(spec, spec.tiles[-1], m=spec.tiles[-1].bm + 3, spare=-1, seed=4)


def launches(spec: GroupedLinearSpec) -> Iterator[Case]:
    """Every tile at sizes that are multiples of 16."""
    for tile in spec.tiles:
        yield _whole(spec, tile, m=16, spare=0, seed=0, width=512)


def _matrix(
    spec: GroupedLinearSpec, n: int, k: int, dice: torch.Generator
) -> tuple[Tensor, list[Tensor | None]]:
    """A matrix [E, n, k] of every expert, and what `stack` takes for it."""
    if spec.packed is None:
        w = (torch.randn(spec.experts, n, k, generator=dice) / k**0.5).bfloat16()
        return w, [w, None, None]
    groups, b = spec.packed.groups(k), spec.bits
    codes = torch.randint(0, 1 << b, (spec.experts, n, k), generator=dice, dtype=torch.uint8)
    kind = torch.float16 if spec.scale == "float16" else torch.bfloat16
    scales = ((torch.rand(spec.experts, n, groups, generator=dice) + 0.5) / (k**0.5 * (1 << b) / 3)).to(kind)
    zeros = torch.randint(0, 1 << b, (spec.experts, n, groups), generator=dice, dtype=torch.uint8)
    base = zeros.double().unsqueeze(-1) if not spec.symmetric else float(spec.packed.mid)
    w = (codes.double().view(spec.experts, n, groups, -1) - base) * scales.double().unsqueeze(-1)
    return w.view(spec.experts, n, k), [codes, scales, None if spec.symmetric else zeros]


def _given(made: Stack, name: str) -> dict[str, Tensor]:
    return {f"{name}{part}": value for part, value in made._asdict().items() if value is not None}


class _Example:
    """A mixture, and who chose whom: `spare` percent of slots nobody; below 0 all rows the same experts."""

    def __init__(self, spec: GroupedLinearSpec, m: int, spare: int, seed: int, width: int = 0) -> None:
        dice = torch.Generator().manual_seed(seed)
        step = max(spec.columns, spec.group, PAIR)
        self.d, self.f = (width or step + (PAIR if step % PAIR == 0 and step == PAIR else 0)), 2 * step
        (gate, of_gate), (up, of_up) = (_matrix(spec, self.f, self.d, dice) for _ in range(2))
        self.down, of_down = _matrix(spec, self.d, self.f, dice)
        self.both = torch.cat((gate, up), 1)
        joined = [
            None if a is None or b is None else together(a, b) for a, b in zip(of_gate, of_up, strict=True)
        ]
        self.up_stack = stack(spec, joined[0], joined[1], joined[2])  # type: ignore[arg-type]
        self.down_stack = stack(spec, of_down[0], of_down[1], of_down[2])  # type: ignore[arg-type]
        self.x = torch.randn(m, self.d, generator=dice).bfloat16()
        self.scores = torch.randn(m, spec.experts, generator=dice)
        if m > 1:
            self.scores[1] = 0.25  # all alike: the lower numbers win
        self.weights, self.chosen = route(self.scores, spec.active, spec.renormalize)
        if spare < 0:
            self.chosen[:] = torch.arange(spec.active) + spec.experts - spec.active
        else:
            none = torch.rand(self.chosen.shape, generator=dice) < spare / 100
            self.chosen = torch.where(none, spec.experts, self.chosen)
        self.order = self.chosen.flatten().argsort(stable=True)
        counts = torch.bincount(self.chosen.flatten(), minlength=spec.experts + 1)[: spec.experts]
        self.first = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))


def _cases(spec: GroupedLinearSpec, tile: GroupTile, m: int, spare: int, seed: int) -> Iterator[Case]:
    """Each kernel on what the one before is to give, in float32 too."""
    one = _Example(spec, m, 0, seed)
    numbers = (tile.bm, tile.warps, tile.stages, tile.split)
    slots = one.chosen.flatten()

    def choice() -> dict[str, Tensor]:
        weights, chosen = route(one.scores, spec.active, spec.renormalize)
        return {"weights": weights, "chosen": chosen.float()}

    yield Case(f"choose of {m}", {"scores": one.scores}, choice, 1e-6, entry="choose")
    some = _Example(spec, m, spare, seed).chosen

    def placed() -> dict[str, Tensor]:
        inside = _Example(spec, m, spare, seed)
        return {"order": inside.order, "first": inside.first}

    yield Case(f"sort of {m}", {"chosen": some}, placed, 1e-6, entry="sort")
    at = {"order": one.order.int(), "first": one.first.int()}
    inner = paired(linear(one.x.repeat_interleave(spec.active, 0), one.both, slots), (spec.activation,))
    inner = inner[one.order]

    def upper() -> dict[str, Tensor]:
        run = min(spec.sums, PAIR)
        more = {"sums": inner.view(len(slots), -1, run).sum(-1).t()} if run else {}
        return {"h": inner} | more

    given = _given(one.up_stack, "") | at | {"x": one.x, "tile": numbers}
    h = inner.bfloat16()
    below = _given(one.down_stack, "") | at | {"h": h, "tile": numbers}
    if spec.sums:
        given["xsum"] = one.x.float().view(m, -1, spec.sums).sum(-1).t().contiguous()
        below["xsum"] = h.float().view(len(slots), -1, spec.sums).sum(-1).t().contiguous()
    yield Case(f"up of {m}, {tile.bm} rows", given, upper, 2e-5, entry="up")

    def lower() -> dict[str, Tensor]:
        y = linear(h, one.down, slots[one.order]) * one.weights.flatten()[one.order, None]
        whole = torch.empty_like(y).index_copy_(0, one.order, y)
        return {"parts": torch.stack([whole, *[torch.zeros_like(y)] * (tile.split - 1)])}

    if tile.split == 1:
        below["weights"] = one.weights.float()
        yield Case(f"down of {m}, {tile.bm} rows", below, lower, 2e-5, entry="down")
    yield _whole(spec, tile, m, spare, seed)


def _whole(spec: GroupedLinearSpec, tile: GroupTile, m: int, spare: int, seed: int, width: int = 0) -> Case:
    one = _Example(spec, m, spare, seed, width)
    given = {"x": one.x, "weights": one.weights.float(), "chosen": one.chosen.int()}
    given |= _given(one.up_stack, "up_") | _given(one.down_stack, "down_")
    label = f"{tile.bm} rows w{tile.warps} s{tile.stages} split{tile.split}, M={m}"

    def due() -> dict[str, Tensor]:
        return {"out": mixture(one.x, one.both, one.down, one.weights, one.chosen, spec.activation)}

    more = {"tile": (tile.bm, tile.warps, tile.stages, tile.split)}
    # Values between are bfloat16: half of its last digit for each.
    return Case(label, {**given, **more}, due, 2**-8, weights=2 * PAIR * spec.columns)
