"""Read the weights of many matrices from one array that they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from pydantic import Field
from torch import Tensor, nn

from effc.compiler.blocks.hashed_linear import HashedLinear
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Rewrite
from effc.passes._dense import finite, matrix
from effc.passes.reparam._linears import dice_of, dtype_of, not_fresh, not_shared, not_single, with_bias
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Unit


class Hashed(Selects, Rewrite):
    """Replace n weights by W_f = lambda sign(f) p[h(f)], p an array of m = keep n numbers.

    random_fold lays all weights, one matrix behind the other, around the array in runs of m, each from a
    place of its own: loads of slots differ by one at most, and keep = 100% is a permutation. roast lays
    chunks of weights anywhere. lambda is the deviation of a matrix over `spread`, that of the array. The
    gradient of a slot, sum lambda g, is divided by its sum of lambda^2 (grad_scale = v1; the source's own
    scaler is not confirmed). init = project (an option of effc): the array with the least squared error.

    Use when: a model is trained from the start and must be stored or sent small; it computes at full size.
    Costs:    W is read anew for each pass. reparam.dense writes it out; packing what is shared is refused.
    """

    paper = Paper(
        "In defense of parameter sharing for model-compression", arxiv="2310.11611", year=2023, section="4"
    )
    contract = Contract(HEALED, needs=(Fact("dense", "select"),), gives=(Fact("hashed", "select"),))
    examples = (
        "reparam.hashed(keep = 10%)",
        'reparam.hashed(keep = 50%, scope = layer, init = project, select = ["mlp"])',
        "reparam.hashed(keep = 20%, mapping = roast, chunk = 32, grad_scale = none)",
    )

    keep: Annotated[float, Unit("share"), Gt(0), Le(1)] = Field(
        default=0.1, description="numbers of the array, as a share of the weights"
    )
    scope: Literal["global", "layer"] = Field(
        default="global", description="one array for all selected weights, or one for each matrix"
    )
    mapping: Literal["random_fold", "roast"] = Field(
        default="random_fold", description="how weights lie on the array"
    )
    chunk: Count = Field(default=64, gt=0, description="weights that lie together, of roast")
    grad_scale: Literal["none", "v1"] = Field(
        default="v1", description="whether gradients of slots are divided by what they serve"
    )
    spread: Annotated[float, Gt(0)] | None = Field(
        default=None, description="first deviation of the array; none: that of the weights"
    )
    init: Literal["scratch", "project"] = Field(
        default="scratch", description="a random array, or the closest to the weights there are"
    )
    seed: int = Field(default=0, ge=0, le=1_000_000, description="what hashes and numbers are drawn from")

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        targets = self.targets(model)
        help_ = "hash before the stage that ties, or leave these modules out with `except`"
        found = [
            *not_single(self.kind, "share", model, targets),
            *not_shared(self.kind, "share", model, targets, help_),
        ]
        if found:
            return found
        if self.init == "scratch":
            found += not_fresh(self.kind, model, "init = project to start from the weights there are")
        return found or [*self._unfit(model, targets)]

    def _unfit(self, model: Model, targets: Mapping[str, Hashed]) -> Iterator[Diagnostic]:
        for group in self._groups(model, list(targets)):
            shapes = [matrix(model.module(path)).shape for path in group]
            total = sum(o * i for o, i in shapes)
            slots, longest = int(self.keep * total), max(i for _, i in shapes)
            least = max(longest, self.chunk if self.mapping == "roast" else 1)
            if slots < least:
                what = "a row" if least == longest else "a chunk"
                yield Diagnostic(
                    "E340",
                    f"an array of {slots} numbers is shorter than {what} of {least}",
                    notes=(f"{total} weights share it, the first those of {group[0]}",),
                    help=f"use a keep of at least {least / total + 5e-5:.2%}",
                    about="keep",
                )
                return

    def _groups(self, model: Model, paths: Sequence[str]) -> list[list[str]]:
        """Matrices that share an array."""
        return [list(paths)] if self.scope == "global" else [[path] for path in paths]

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        with rw.together():
            for group in self._groups(rw.model, list(self.targets(rw.model))):
                for path, unit in self._units(rw, group).items():
                    rw.swap(path, unit)

    def rewrite(self, rw: Rewriter) -> Mapping[str, float]:
        errors: dict[str, float] = {}
        with rw.together():
            for group in self._groups(rw.model, list(self.targets(rw.model))):
                errors |= self._hash(rw, group)
        return errors

    def _units(self, rw: Rewriter, group: Sequence[str]) -> dict[str, HashedLinear]:
        """Empty units of one array; they keep the biases."""
        modules = {path: rw.module(path) for path in group}
        total = sum(matrix(m).numel() for m in modules.values())
        slots, first = int(self.keep * total), 0
        units: dict[str, HashedLinear] = {}
        for number, (path, module) in enumerate(modules.items()):
            o, i = matrix(module).shape
            unit = HashedLinear(
                in_features=i, out_features=o, slots=slots, matrices=len(modules), number=number,
                fold=first // slots, offset=first % slots, mapping=self.mapping, chunk=self.chunk,
                grad_scale=self.grad_scale, seed=self.seed, bias=module._parameters.get("bias") is not None,
                dtype=dtype_of(modules[group[0]]),
            )  # fmt: skip
            lead = units.get(group[0], unit)
            unit.pool, unit.scales, unit.ends = lead.pool, lead.scales, lead.ends
            units[path] = with_bias(unit, module)
            first += o * i
        return units

    def _hash(self, rw: Rewriter, group: Sequence[str]) -> dict[str, float]:
        """Replace the matrices of one array; with init = project, the relative error of each."""
        units = self._units(rw, group)
        if matrix(rw.present(group[0])).is_meta:
            for path, unit in units.items():
                rw.swap(path, unit)
            return {}
        stds, ends, first = [], [], 0
        for path in group:
            finite(path, w := matrix(rw.present(path)))
            stds.append(float(w.double().std()))
            first += w.numel()
            ends.append(first)
        spread = self.spread or (sum(s * s for s in stds) / len(stds)) ** 0.5 or 1.0
        lead = units[group[0]]
        scales = torch.tensor([(s or spread) / spread for s in stds])
        pool = self._pool(rw, units, scales, spread)
        kept = nn.Parameter(pool.to(lead.pool.dtype), requires_grad=False)
        numbers = torch.tensor(ends)
        errors = {}
        for path, unit in units.items():
            unit.pool, unit.scales, unit.ends = kept, scales, numbers
            if self.init == "project":
                w = matrix(rw.present(path)).double()
                gap = unit.dense().double() - w
                errors[path] = float(gap.norm() / w.norm()) if bool(w.any()) else 0.0
            rw.swap(path, unit, f"{unit.slots} numbers for {ends[-1]}")
        return errors

    def _pool(self, rw: Rewriter, units: Mapping[str, HashedLinear], scales: Tensor, spread: float) -> Tensor:
        """First numbers of the array [m]: random, or sum lambda sign w / sum lambda^2 of each slot."""
        lead = next(iter(units.values()))
        drawn = torch.randn(lead.slots, generator=dice_of(self.seed, next(iter(units)))) * spread
        if self.init == "scratch":
            return drawn
        total, load = (torch.zeros(lead.slots, dtype=torch.float64) for _ in "ab")
        for number, (path, unit) in enumerate(units.items()):
            h, sign = unit.map(total.device)
            scale = float(scales[number])
            total.index_add_(0, h, matrix(rw.present(path)).double().flatten() * sign * scale)
            load.index_add_(0, h, torch.full((len(h),), scale**2, dtype=torch.float64))
        return torch.where(load > 0, total / load.clamp_min(1e-300), drawn.double())

    def work(self, model: Model, seq: int = 0) -> Work:
        sizes = [matrix(model.module(path)).numel() for path in self.targets(model)]
        turns = 3.0 if self.init == "project" else 1.0
        return Work(traffic=turns * 40.0 * sum(sizes), memory=40 * max(sizes, default=0))
