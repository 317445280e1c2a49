"""Set the weights that matter least to their row to zero, by magnitude times the norm of their input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from effc.compiler.blocks.embedding import Embedding
from effc.compiler.blocks.linear import StackedLinear
from effc.compiler.cost import count
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Calibrate, Statistic
from effc.passes._dense import finite, inputs_of, matrix, owner_of, some
from effc.passes.prune._pattern import lowest, share_of
from effc.passes.prune._sparse import SPARSE, Sparse, zero
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.paper import Paper


class Squares:
    """Sum of the squares of each input, over all rows seen."""

    def __init__(self, inputs: int) -> None:
        self.total = torch.zeros(inputs)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """x [N, i]"""
        self.total += x.float().square().sum(0)
        self.rows += x.shape[0]

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total, "rows": torch.tensor(self.rows)}

    def norms(self) -> Tensor:
        """sqrt of the mean square [i]: ||X_j|| up to a factor that all inputs share."""
        return (self.total / max(1, self.rows)).sqrt()


class Wanda(Sparse, Calibrate):
    """Zero, in every output row, the floor(s i) weights with the least S_oj = |W_oj| ||X_j||; no weight
    moves.

    ||X_j|| is the norm of input j over the calibration tokens. With a pattern n:m the same scores compete
    within groups of m neighboring inputs. Layers run in order, each on what the pruned layers before it
    produce.

    Use when: you want one-shot sparsity from some hundred sequences, without solving for new weights.
    Costs:    three passes over the data; zeros are stored until a sparse format follows; quality falls past
              50%.
    """

    paper = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models",
        arxiv="2306.11695",
        year=2023,
        section="3",
    )
    contract = SPARSE
    examples = (
        "prune.wanda(data = code, sparsity = 50%)",
        "prune.wanda(data = code, sparsity = depth(30%, 70%), samples = 8)",
        "prune.wanda(data = code, pattern = 2:4, samples = 8)",
        "prune.wanda(data = code, pattern = 4:8, samples = 8)",
    )

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        tables = [p for p in self.targets(model) if isinstance(model.module(p), Embedding)]
        if not tables:
            return super().refuses(model, others)
        return [
            *super().refuses(model, others),
            Diagnostic(
                "E323",
                f"`{self.kind}` scores weights by their inputs, and a table that is looked up has none",
                notes=(f"{some(tables)} is such a table",),
                help="leave it out, or use prune.magnitude for it",
            ),
        ]

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        """Zeros are stored like other numbers, so nothing about the structure changes."""

    def watch(self, rw: Rewriter, paths: Sequence[str]) -> list[str]:
        return list(paths)

    def start(self, rw: Rewriter, path: str) -> Statistic:
        return Squares(inputs_of(rw.module(path)))

    def rewrite_layer(
        self, rw: Rewriter, paths: Sequence[str], seen: Mapping[str, Statistic]
    ) -> Mapping[str, float]:
        targets = self.targets(rw.model)
        errors = {}
        for path in paths:
            if owner_of(rw.model, path) not in rw.written:  # a tied weight is pruned where it comes first
                errors[path] = zero(rw, path, targets[path].mask(self._scores(rw, path, seen)))
        return errors

    def mask(self, scores: Tensor) -> Tensor:
        """scores [R, i] -> True where a weight goes."""
        if self.pattern != "unstructured":
            return self.mask_in_groups(scores)
        return lowest(scores, share_of(scores.shape[1], self.share))

    def _scores(self, rw: Rewriter, path: str, seen: Mapping[str, Statistic]) -> Tensor:
        """|W| ||X|| as [R, i]; an expert that no token chose is scored by |W| alone.

        Raises:
            EffcError: E420 for weights that are not finite, E421 when no input was seen.
        """
        module = rw.module(path)
        w = matrix(module)
        finite(path, w)
        size = w.float().abs()
        if isinstance(module, StackedLinear):
            parts = size.chunk(module.experts)
            return torch.cat([part * _norms(seen.get(f"{path}[{e}]")) for e, part in enumerate(parts)])
        if path not in seen:
            raise EffcError(
                Diagnostic(
                    "E421",
                    f"{path} never ran on the calibration data",
                    help="use other data or more samples, or leave the module out with `except`",
                    about="data",
                )
            )
        return size * _norms(seen[path])

    def work(self, model: Model, seq: int = 0) -> Work:
        weights = [matrix(model.module(path)) for path in self.targets(model)]
        flops = 2.0 * self.samples * seq * count(model, seq // 2).flops_per_token
        numbers = [w.numel() for w in weights]
        return Work(
            flops, 20.0 * sum(numbers), 2 * sum(w.nbytes for w in weights), 12 * max(numbers, default=0)
        )


def _norms(statistic: Statistic | None) -> Tensor:
    return statistic.norms() if isinstance(statistic, Squares) else torch.ones(())
