"""Set the weights of least magnitude to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._dense import finite, matrix, owner_of
from effc.passes.prune._pattern import CHUNK, counts_over_all, lowest, share_of
from effc.passes.prune._sparse import SPARSE, Sparse, zero
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Magnitude(Sparse, Rewrite):
    """Set the k = floor(s N) weights with the least |w| to zero: of each matrix, or of all selected ones at
    once.

    With `scope = global` one threshold serves all matrices, and each keeps at least 1% of its weights. A tied
    weight is pruned once.

    Use when: there is no calibration data, or training follows.
    Costs:    zeros are stored until a sparse format follows; language models break near 50% without training.
    """

    paper = Paper(
        "Learning both Weights and Connections for Efficient Neural Networks",
        arxiv="1506.02626",
        year=2015,
        section="3",
    )
    contract = SPARSE
    streams = True
    examples = (
        "prune.magnitude(sparsity = 50%)",
        "prune.magnitude(sparsity = depth(30%, 70%))",
        "prune.magnitude(sparsity = 70%, scope = global)",
        "prune.magnitude(pattern = 2:4)",
    )

    scope: Literal["layer", "global"] = Field(
        default="layer", description="where weights compete: in a matrix, or in all"
    )

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        found = list(super().refuses(model, others))
        targets = self.targets(model)
        if self.scope == "global" and any(t.pattern != "unstructured" for t in targets.values()):
            found.append(
                Diagnostic(
                    "E325",
                    f"`scope = global` of `{self.kind}` has no meaning for a pattern n:m",
                    notes=("in a pattern n:m weights compete within their group only",),
                    help="leave `scope` out, or use pattern = unstructured",
                    about="scope",
                )
            )
        if self.scope == "global" and len({t.sparsity for t in targets.values()}) > 1:
            found.append(
                Diagnostic(
                    "E325",
                    f"`scope = global` of `{self.kind}` takes one sparsity, and here it differs",
                    help="use scope = layer, or one `sparsity` without rules or depth(...) that set another",
                    about="scope",
                )
            )
        return found

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        """Zeros are stored like other numbers, so nothing about the structure changes."""

    def rewrite(self, rw: Rewriter) -> Mapping[str, float]:
        targets = {
            owner_of(rw.model, path): (path, m) for path, m in reversed(self.targets(rw.model).items())
        }
        chosen = dict(reversed(list(targets.values())))
        for path in chosen:
            finite(path, matrix(rw.present(path)))
        if self.scope == "global":
            return self._all_at_once(rw, chosen)
        return {path: zero(rw, path, method.mask(_size(rw, path))) for path, method in chosen.items()}

    def mask(self, scores: Tensor) -> Tensor:
        """scores [R, i] -> True where a weight goes."""
        if self.pattern != "unstructured":
            return self.mask_in_groups(scores)
        flat = scores.reshape(1, -1)
        return lowest(flat, share_of(flat.numel(), self.share)).view_as(scores)

    def _all_at_once(self, rw: Rewriter, paths: Mapping[str, Magnitude]) -> Mapping[str, float]:
        sizes = [matrix(rw.module(path)).numel() for path in paths]
        share = next(iter(paths.values())).share if paths else 0.0
        scores = [partial(_size, rw, path) for path in paths]
        counts = counts_over_all(sizes, scores, share_of(sum(sizes), share))
        return {
            path: zero(rw, path, lowest(size().reshape(1, -1), n).view(matrix(rw.module(path)).shape))
            for path, size, n in zip(paths, scores, counts, strict=True)
        }

    def work(self, model: Model, seq: int = 0) -> Work:
        weights = [matrix(model.module(path)) for path in self.targets(model)]
        numbers = [w.numel() for w in weights]
        largest = max(numbers, default=0)
        held = 5 * largest + 24 * min(CHUNK, largest)  # scores and mask, and an order of some of them
        return Work(solve=20.0 * sum(numbers), disk=2 * sum(w.nbytes for w in weights), memory=held)


def _size(rw: Rewriter, path: str) -> Tensor:
    w = matrix(rw.present(path))
    return w.abs() if w.dtype == torch.float32 else w.float().abs_()
