"""Write weights as products of two thin matrices, by singular value decomposition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.cost import count
from effc.compiler.method import DataRef, Slot, Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Edit, Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Calibrate, Statistic
from effc.passes._dense import finite, inputs_of, matrix, some
from effc.passes._moment import Moment
from effc.passes.reparam._linears import dtype_of, not_shared, not_single, single, with_bias
from effc.passes.reparam._rank import RankRule
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.paper import FOLKLORE
from effc.specs.units import Count, Share


class LowRank(Selects, Calibrate):
    """Replace W [o, i] by B A with A [r, i] and B [o, r], the closest of rank r.

    metric = weight:      W = U S V^T, B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T: least ||W - BA||.
    metric = activation:  C = E[x x^T] of the inputs and a ridge = R R^T, W R = U S V^T, B = U_r sqrt(S_r),
                          A = sqrt(S_r) V_r^T R^-1: least mean ||(W - BA) x||^2, which is the sum of the
                          s_k^2, k > r.

    rank = energy(95%) takes for each weight the least r whose s_k^2 are that share of all; a weight that
    would not get smaller by it stays as it is, and a plan has the most that may come out.

    Use when: weights have quickly falling spectra and a training stage follows.
    Costs:    one decomposition a weight, o i min(o, i); parameters fall only below rank o i / (o + i).
    """

    paper = FOLKLORE
    contract = Contract(
        HEALED, needs=(Fact("dense", "select"),), gives=(Fact("low_rank", "select"),), keeps=(Fact("tied"),)
    )
    examples = (
        'reparam.low_rank(rank = 25%, select = ["mlp"])',
        'reparam.low_rank(rank = 4, metric = activation, data = code, select = ["mlp.down", "attention.o"])',
        "reparam.low_rank(rank = energy(40%), min_dim = 20)",
    )
    overrides = ("rank", "min_dim")

    data: DataRef | None = Field(default=None, description="calibration sequences, for metric = activation")  # type: ignore[assignment]
    rank: Annotated[Share | Count | RankRule, Slot("reparam.rank")] = Field(
        default=0.25, description="rank kept: a share of the shorter side, a number, or energy(share)"
    )
    metric: Literal["weight", "activation"] = Field(
        default="weight", description="what the product should stay close in"
    )
    min_dim: Count = Field(default=0, description="weights with a shorter side below this stay as they are")
    ridge: float = Field(
        default=1e-6, gt=0, le=1, description="added to the diagonal of C, as a share of its mean"
    )
    allow_tied: bool = Field(
        default=False,
        description="factor shared weights too: linears that share one share its factors, a table keeps it",
    )

    @field_validator("rank")
    @classmethod
    def _above_zero(cls, rank: object) -> object:
        if isinstance(rank, int | float) and not rank:
            raise ValueError("a rank is above 0")
        return rank

    @model_validator(mode="after")
    def _data_fits_metric(self) -> Self:
        if self.metric == "activation" and self.data is None:
            raise ValueError("metric = activation needs calibration sequences; add data = ...")
        if self.metric == "weight" and self.data is not None:
            raise ValueError("metric = weight looks at no data; leave `data` out, or use metric = activation")
        return self

    @property
    def at_most(self) -> bool:
        return isinstance(self.rank, RankRule)

    def targets(self, model: Model) -> dict[str, Self]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Path -> the method as it applies there, without weights below `min_dim`."""
        found = super().targets(model)
        return {p: m for p, m in found.items() if not m.min_dim or _shorter(model.module(p)) >= m.min_dim}

    def rank_of(self, module: nn.Module) -> int:
        """The rank kept at a linear; by a rule, the first that saves nothing, as its limit."""
        if isinstance(self.rank, RankRule):
            return _even(*matrix(module).shape) + 1
        return self.rank if isinstance(self.rank, int) else max(1, int(self.rank * _shorter(module) + 0.5))

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        targets = self.targets(model)
        if not targets:
            help_ = (
                f"use a min_dim of at most {max(_shorter(model.module(p)) for p in super().targets(model))}"
            )
            title = f"no selected weight has a shorter side of {self.min_dim}"
            return [Diagnostic("E340", title, help=help_, about="min_dim")]
        found = list(not_single(self.kind, "factor", model, targets))
        plain = {p: targets[p] for p in single(model, targets)}
        found += self._wrong_ranks(model, plain)
        if not self.allow_tied:
            help_ = (
                "factor before the stage that ties, leave these out with `except`, or write allow_tied = true"
            )
            found += not_shared(self.kind, "factor", model, plain, help_)
        return found

    def _wrong_ranks(self, model: Model, targets: Mapping[str, LowRank]) -> Iterator[Diagnostic]:
        """One diagnostic for each rank that saves nothing somewhere, with one that saves everywhere."""
        seen: dict[object, dict[tuple[int, int, int], list[str]]] = {}
        for path, method in targets.items():
            if isinstance(method.rank, RankRule):
                continue
            rows, inputs = matrix(model.module(path)).shape
            rank = method.rank_of(model.module(path))
            if rank * (rows + inputs) >= rows * inputs:
                seen.setdefault(method.rank, {}).setdefault((rank, rows, inputs), []).append(path)
        for shapes in seen.values():
            (rank, rows, inputs), paths = next(iter(shapes.items()))
            even = [(_even(r, i), min(r, i)) for _, r, i in shapes]
            share = min(int(100 * most / short) for most, short in even)
            yield Diagnostic(
                "E340",
                f"rank {rank} saves nothing at {some(paths)} [{rows}, {inputs}]",
                notes=tuple(
                    f"the factors of {at[0]} [{r}, {i}] would hold {k * (r + i)} weights instead of {r * i}"
                    for (k, r, i), at in shapes.items()
                ),
                help=f"use a rank of at most {min(most for most, _ in even)}, or {share}%",
                about="rank",
            )

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        ties = rw.model.ties()
        with rw.together():
            for path, method in self.targets(rw.model).items():
                unit = _blank(rw.module(path), method.rank_of(rw.module(path)))
                owner = ties.get(f"{path}.weight", "").removesuffix(".weight")
                rw.swap(path, _sharing(rw, owner, unit))

    def watch(self, rw: Rewriter, paths: Sequence[str]) -> list[str]:
        return list(paths) if self.metric == "activation" else []

    def start(self, rw: Rewriter, path: str) -> Statistic:
        return Moment(inputs_of(rw.module(path)))

    def rewrite_layer(
        self, rw: Rewriter, paths: Sequence[str], seen: Mapping[str, Statistic]
    ) -> Mapping[str, float]:
        targets = self.targets(rw.model)
        errors: dict[str, float] = {}
        for path in paths:
            if path not in targets:  # too small
                continue
            module = rw.module(path)
            owner = rw.origins.get(f"{path}.weight", "").removesuffix(".weight")
            if owner != path and isinstance(there := _factored(rw, owner), LowRankLinear):
                rw.swap(path, _sharing(rw, owner, _blank(module, there.rank)), f"the factors of {owner}")
                continue
            finite(path, w := matrix(module))
            root = self._root(path, seen) if self.metric == "activation" else None
            u, s, vh = spectrum(w.double() if w.element_size() == 8 else w.float(), root)
            rule = targets[path].rank
            rank = rule.of(s) if isinstance(rule, RankRule) else targets[path].rank_of(module)
            if isinstance(rule, RankRule) and rank > _even(*w.shape):
                rw.log.append(Edit("keep", path, f"rank {rank} of {min(w.shape)} would save nothing"))
                continue
            unit = _blank(module, rank)
            b, a, errors[path] = cut(u, s, vh, rank, root)
            unit.b, unit.a = (nn.Parameter(t.to(w.dtype), requires_grad=False) for t in (b, a))
            rw.swap(path, unit, f"rank {unit.rank} of {min(w.shape)}")
        return errors

    def _root(self, path: str, seen: Mapping[str, Statistic]) -> Tensor:
        """R [i, i] lower triangular with C + ridge = R R^T. Raises EffcError E421 when no input was seen."""
        moment = seen.get(path)
        if not isinstance(moment, Moment) or not moment.rows:
            raise EffcError(
                Diagnostic(
                    "E421",
                    f"{path} never ran on the calibration data",
                    help="use other data or more samples, or leave the module out with `except`",
                    about="data",
                )
            )
        c = moment.mean().double()
        root: Tensor = torch.linalg.cholesky(
            c + torch.eye(c.shape[0], dtype=c.dtype) * (self.ridge * c.diagonal().mean())
        )
        return root

    def work(self, model: Model, seq: int = 0) -> Work:
        shapes = [matrix(model.module(path)).shape for path in self.targets(model)]
        solving = sum(14.0 * rows * inputs * min(rows, inputs) for rows, inputs in shapes)
        largest = max((4 * rows * inputs for rows, inputs in shapes), default=0)
        if self.metric == "weight":
            return Work(solve=solving, memory=6 * largest)
        tokens = self.samples * seq
        flops = 2.0 * tokens * count(model, seq // 2).flops_per_token
        squares = sum(2.0 * tokens * inputs**2 for _, inputs in shapes)
        return Work(flops, solving, exact=squares, memory=8 * largest)


def spectrum(w: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of w [o, i], or of w R where `root` is R."""
    return torch.linalg.svd(w if root is None else w.double() @ root, full_matrices=False)  # type: ignore[no-any-return]


def cut(u: Tensor, s: Tensor, vh: Tensor, rank: int, root: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """B [o, r], A [r, i] and the relative error that the values behind r are: of outputs with `root`."""
    half = s[:rank].sqrt()
    b, a = u[:, :rank] * half, half[:, None] * vh[:rank]
    if root is not None:
        a = torch.linalg.solve_triangular(root, a, upper=False, left=False)
    whole = float(s.double().square().sum())
    lost = float(s[rank:].double().square().sum())
    return b, a, (lost / whole) ** 0.5 if whole > 0 else 0.0


def factors(w: Tensor, rank: int, root: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """w [o, i] -> B [o, r], A [r, i] and the relative error: of outputs where `root` is given."""
    return cut(*spectrum(w, root), rank, root)


def _shorter(module: nn.Module) -> int:
    """The shorter side of a weight; of what has none, as long as any."""
    weight = module._parameters.get("weight")
    return min(weight.shape[-2:]) if weight is not None and weight.dim() > 1 else 2**31


def _even(rows: int, inputs: int) -> int:
    """The largest rank whose factors hold less than the weight; 0 for a weight of one row or column."""
    return (rows * inputs - 1) // (rows + inputs)


def _factored(rw: Rewriter, path: str) -> nn.Module | None:
    """What is at a path of the model by now; None where there is nothing."""
    return rw.module(path) if path in rw.model.roles else None


def _sharing(rw: Rewriter, owner: str, unit: LowRankLinear) -> LowRankLinear:
    """The unit, on the factors of the one that a weight was shared with, where that one has any."""
    if isinstance(there := _factored(rw, owner), LowRankLinear):
        unit.a, unit.b = there.a, there.b
    return unit


def _blank(module: nn.Module, rank: int) -> LowRankLinear:
    """An empty unit for a linear; it keeps the bias."""
    rows, inputs = matrix(module).shape
    unit = LowRankLinear(
        in_features=inputs,
        out_features=rows,
        rank=rank,
        bias=module._parameters.get("bias") is not None,
        dtype=dtype_of(module),
    )
    return with_bias(unit, module)
