"""Write weights as a thin product plus numbers at scattered places, to train them with less memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from annotated_types import Gt, Lt
from pydantic import Field, model_validator
from torch import Tensor, nn

from effc.compiler.blocks.sparse_low_rank_linear import SparseLowRankLinear, scattered
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Rewrite
from effc.passes._dense import finite, matrix, some
from effc.passes.reparam._linears import dice_of, dtype_of, not_fresh, not_shared, not_single, with_bias
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Unit


class SparseLowRank(Selects, Rewrite):
    """Replace W [o, i] by s B A + S, s = alpha / rank, S zero but at floor(density o i) fixed places.

    init = scratch: A uniform in +-sqrt(1 / i), B zero, the numbers of S uniform in +-1 / sqrt(i), their
    places drawn evenly by the seed. init = svd (an option of effc): s B A is the product closest to W, and S
    holds what it misses where that is most, or at random places. W is built for each pass; its gradient G
    gives s G A^T for B, s B^T G for A and G at the places for S, so only x is kept between the passes.

    Use when: a model is trained from the start with less memory: parameters and optimizer states shrink.
    Costs:    building W, 2 r o i FLOPs a pass; matrices are multiplied at full size. A place takes 4 bytes
              (int32) beside its number. reparam.dense writes W out when training is over.
    """

    paper = Paper(
        "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
        arxiv="2406.02214",
        year=2024,
        section="3",
    )
    contract = Contract(HEALED, needs=(Fact("dense", "select"),), gives=(Fact("sparse_low_rank", "select"),))
    streams = True
    examples = (
        "reparam.sparse_low_rank(rank = 4)",
        'reparam.sparse_low_rank(rank = 6, density = 10%, init = svd, alpha = 6, select = ["mlp"])',
        "reparam.sparse_low_rank(rank = 3, init = svd, support = random, index = int64)",
    )
    overrides = ("rank", "density", "alpha")

    rank: Count = Field(default=128, gt=0, description="rank of the product")
    density: Annotated[float, Unit("share"), Gt(0), Lt(1)] = Field(
        default=0.03, description="share of places that hold a number beside the product"
    )
    alpha: float = Field(default=32.0, gt=0, description="s = alpha / rank scales the product")
    init: Literal["scratch", "svd"] = Field(
        default="scratch", description="random first values, or the closest to the weights there are"
    )
    support: Literal["random", "largest"] | None = Field(
        default=None,
        description="places: evenly drawn, or where the product misses most; none: `largest` with svd",
    )
    index: Literal["int32", "int64"] = Field(default="int32", description="how places are stored")
    seed: int = Field(default=0, ge=0, description="what places and first values are drawn from")

    @model_validator(mode="after")
    def _misses_something(self) -> Self:
        if self.support == "largest" and self.init == "scratch":
            raise ValueError("support = largest looks at what a product misses; write init = svd with it")
        return self

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        targets = self.targets(model)
        help_ = "split before the stage that ties, or leave these modules out with `except`"
        found = [
            *not_single(self.kind, "split", model, targets),
            *not_shared(self.kind, "split", model, targets, help_),
        ]
        if found:
            return found
        if self.init == "scratch":
            found += not_fresh(self.kind, model, "init = svd to start from the weights there are")
        return found or [*self._unfit(model, targets)]

    def _unfit(self, model: Model, targets: Mapping[str, SparseLowRank]) -> Iterator[Diagnostic]:
        """Ranks and densities that a matrix cannot have, and those that save nothing."""
        shapes = {path: matrix(model.module(path)).shape for path in targets}
        wide = {path: m.rank for path, m in targets.items() if m.rank > min(shapes[path])}
        if wide:
            path, rank = next(iter(wide.items()))
            yield Diagnostic(
                "E340",
                f"rank {rank} is above the shorter side of {some(list(wide))} {list(shapes[path])}",
                help=f"use a rank of at most {min(min(shapes[p]) for p in wide)}",
                about="rank",
            )
            return
        empty = {p: m.density for p, m in targets.items() if int(m.density * shapes[p].numel()) < 1}
        if empty:
            path, density = next(iter(empty.items()))
            yield Diagnostic(
                "E340",
                f"a density of {density:g} leaves no place in {some(list(empty))} {list(shapes[path])}",
                help=f"use a density of at least {1 / min(shapes[p].numel() for p in empty):.1%}",
                about="density",
            )
            return
        if self.index == "int32" and (huge := [p for p in targets if shapes[p].numel() >= 2**31]):
            title = f"places of {some(huge)} do not fit in int32"
            yield Diagnostic("E340", title, help="write index = int64", about="index")
            return
        large = [path for path, method in targets.items() if method._saves_nothing(model.module(path))]
        if large:
            o, i = shapes[large[0]]
            yield Diagnostic(
                "W333",
                f"`{self.kind}` saves nothing at {some(large)} [{o}, {i}]",
                notes=("the factors, the numbers and their places take as many bytes as the weights",),
                help="use a lower rank or density",
                about="rank",
                severity="warning",
            )

    def _saves_nothing(self, module: nn.Module) -> bool:
        weight = module.get_parameter("weight")
        o, i = weight.shape
        places = int(self.density * o * i)
        held = (self.rank * (o + i) + places) * weight.element_size()
        return held + places * (4 if self.index == "int32" else 8) >= weight.nbytes

    def rewrite(self, rw: Rewriter) -> Mapping[str, float]:
        errors: dict[str, float] = {}
        with rw.together():
            for path, method in self.targets(rw.model).items():
                module = rw.present(path) if self.init == "svd" else rw.module(path)
                unit = method._blank(module)
                w = matrix(module)
                if not w.is_meta or self.init == "scratch":
                    method._fill(unit, path, w, errors)
                rw.swap(path, unit, f"rank {unit.rank} and {len(unit.values)} places")
        return errors

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        with rw.together():
            for path, method in self.targets(rw.model).items():
                rw.swap(path, method._blank(rw.module(path)))

    def _fill(self, unit: SparseLowRankLinear, path: str, w: Tensor, errors: dict[str, float]) -> None:
        """First values of a unit; with init = svd its distance from w [o, i] joins `errors`."""
        dice = dice_of(self.seed, path)
        if self.init == "svd":
            finite(path, w)
            w = w.double() if w.element_size() == 8 else w.float()
            a, b, places = self._closest(w, dice)
            values = torch.empty(0)
        else:
            o, i = unit.out_features, unit.in_features
            a, b = _uniform((unit.rank, i), math.sqrt(1 / i), dice), torch.zeros(o, unit.rank)
            places = scattered(len(unit.values), o * i, dice)
            values = _uniform((len(places),), 1 / math.sqrt(i), dice)
        kind = unit.a.dtype
        unit.a, unit.b = (nn.Parameter(t.to(kind).contiguous(), requires_grad=False) for t in (a, b))
        if self.init == "svd":
            rest = w - unit.factor * (unit.b.to(w.dtype) @ unit.a.to(w.dtype))
            values = rest.flatten()[places]
            norm = float(w.norm())
            kept = rest.flatten().index_fill(0, places, 0.0)
            errors[path] = float(kept.norm()) / norm if norm else 0.0
        unit.values = nn.Parameter(values.to(kind), requires_grad=False)
        unit.places = places.to(unit.places.dtype)

    def _closest(self, w: Tensor, dice: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A [r, i], B [o, r] with s B A the product of rank r closest to w [o, i], and places."""
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        root = (s[: self.rank] * (self.rank / self.alpha)).sqrt()
        a, b = root[:, None] * vh[: self.rank], u[:, : self.rank] * root
        count = int(self.density * w.numel())
        if self.support == "random":
            return a, b, scattered(count, w.numel(), dice)
        missed = (w - (self.alpha / self.rank) * (b @ a)).abs().flatten()
        return a, b, missed.topk(count).indices.sort().values

    def _blank(self, module: nn.Module) -> SparseLowRankLinear:
        """An empty unit for a linear; it keeps the bias."""
        o, i = matrix(module).shape
        unit = SparseLowRankLinear(
            in_features=i,
            out_features=o,
            rank=self.rank,
            density=self.density,
            alpha=self.alpha,
            index=self.index,
            bias=getattr(module, "bias", None) is not None,
            dtype=dtype_of(module),
        )
        return with_bias(unit, module)

    def work(self, model: Model, seq: int = 0) -> Work:
        shapes = [matrix(model.module(path)).shape for path in self.targets(model)]
        largest = max((o * i for o, i in shapes), default=0)
        drawn = Work(memory=12 * largest, traffic=16.0 * sum(o * i for o, i in shapes))
        if self.init == "scratch":
            return drawn
        return drawn + Work(solve=sum(14.0 * o * i * min(o, i) for o, i in shapes), memory=28 * largest)


def _uniform(shape: tuple[int, ...], most: float, dice: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=dice) - 1) * most
