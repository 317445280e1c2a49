"""Write weights as products of two thin matrices, by singular value decomposition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.cost import count
from effc.compiler.method import DataRef, Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Calibrate, Statistic
from effc.passes._dense import finite, inputs_of, matrix, not_dense, some
from effc.passes._moment import Moment
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.paper import FOLKLORE
from effc.specs.units import Count, Share

RIDGE = 1e-6
"""Added to the diagonal of C, as a share of its mean, so that inputs that never vary can be divided by."""


class LowRank(Selects, Calibrate):
    """Replace W [o, i] by B A with A [r, i] and B [o, r], the closest of rank r.

    metric = weight:      W = U S V^T, B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T: least ||W - BA||.
    metric = activation:  C = E[x x^T] = R R^T of the inputs, W R = U S V^T, B = U_r sqrt(S_r),
                          A = sqrt(S_r) V_r^T R^-1: least mean ||(W - BA) x||^2, which is the sum of the
                          s_k^2, k > r.

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
    )
    overrides = ("rank",)

    data: DataRef | None = Field(default=None, description="calibration sequences, for metric = activation")  # type: ignore[assignment]
    rank: Share | Count = Field(
        default=0.25, gt=0, description="rank kept: a share of the shorter side, or a number"
    )
    metric: Literal["weight", "activation"] = Field(
        default="weight", description="what the product should stay close in"
    )

    @model_validator(mode="after")
    def _data_fits_metric(self) -> Self:
        if self.metric == "activation" and self.data is None:
            raise ValueError("metric = activation needs calibration sequences; add data = ...")
        if self.metric == "weight" and self.data is not None:
            raise ValueError("metric = weight looks at no data; leave `data` out, or use metric = activation")
        return self

    def rank_of(self, module: nn.Module) -> int:
        """The rank kept at a linear."""
        shorter = min(matrix(module).shape)
        return self.rank if isinstance(self.rank, int) else max(1, int(self.rank * shorter + 0.5))

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        targets = self.targets(model)
        found = list(not_dense(self.kind, "factor", model, targets))
        plain = {p: m for p, m in targets.items() if isinstance(model.module(p), Linear | nn.Linear)}
        if not found and len(plain) < len(targets):
            odd = [p for p in targets if p not in plain]
            types = sorted({type(model.module(p)).__name__ for p in odd})
            found.append(
                Diagnostic(
                    "E323",
                    f"`{self.kind}` factors single linears only",
                    notes=(f"{some(odd)}: {', '.join(types)}",),
                    help="leave these modules out with `except`",
                )
            )
        return [*found, *self._wrong_ranks(model, plain), *self._shared(model, plain)]

    def _wrong_ranks(self, model: Model, targets: Mapping[str, LowRank]) -> Iterator[Diagnostic]:
        """One diagnostic for each rank that saves nothing somewhere, with one that saves everywhere."""
        seen: dict[object, dict[tuple[int, int, int], list[str]]] = {}
        for path, method in targets.items():
            rows, inputs = matrix(model.module(path)).shape
            rank = method.rank_of(model.module(path))
            if rank * (rows + inputs) >= rows * inputs:
                seen.setdefault(method.rank, {}).setdefault((rank, rows, inputs), []).append(path)
        for shapes in seen.values():
            (rank, rows, inputs), paths = next(iter(shapes.items()))
            even = [((r * i - 1) // (r + i), min(r, i)) for _, r, i in shapes]
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

    def _shared(self, model: Model, targets: Mapping[str, LowRank]) -> Iterator[Diagnostic]:
        ties = model.ties()
        names = {name for pair in ties.items() for name in pair}
        shared = [path for path in targets if f"{path}.weight" in names]
        if shared:
            yield Diagnostic(
                "E341",
                f"`{self.kind}` cannot factor a weight that is shared",
                notes=(f"{some(shared)} shares its weight with another module",),
                help="factor before the stage that ties, or leave these modules out with `except`",
            )

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        with rw.together():
            for path, method in self.targets(rw.model).items():
                rw.swap(path, _blank(rw.module(path), method.rank_of(rw.module(path))))

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
            module = rw.module(path)
            finite(path, w := matrix(module))
            unit = _blank(module, targets[path].rank_of(module))
            root = self._root(path, seen) if self.metric == "activation" else None
            b, a, errors[path] = factors(w.float(), unit.rank, root)
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
            c + torch.eye(c.shape[0], dtype=c.dtype) * (RIDGE * c.diagonal().mean())
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


def factors(w: Tensor, rank: int, root: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """w [o, i] -> B [o, r], A [r, i] and the relative error: of outputs where `root` is given."""
    seen = w if root is None else w.double() @ root
    u, s, vh = torch.linalg.svd(seen, full_matrices=False)
    half = s[:rank].sqrt()
    b, a = u[:, :rank] * half, half[:, None] * vh[:rank]
    if root is not None:
        a = torch.linalg.solve_triangular(root, a, upper=False, left=False)
    whole = float(s.double().square().sum())
    lost = float(s[rank:].double().square().sum())
    return b, a, (lost / whole) ** 0.5 if whole > 0 else 0.0


def _blank(module: Linear, rank: int) -> LowRankLinear:
    """An empty unit for a linear; it keeps the bias."""
    unit = LowRankLinear(
        in_features=module.in_features,
        out_features=module.out_features,
        rank=rank,
        bias=module.bias is not None,
        dtype=str(module.weight.dtype).removeprefix("torch."),
    )
    unit.bias = module.bias
    return unit
