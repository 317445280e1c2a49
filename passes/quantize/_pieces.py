"""The matrices that GPTQ rounds in one layer: those on one input and one grid are solved together.

Shapes: W [R, i]; q [R, i], scale and zero [R, G].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effc.compiler.blocks.embedding import Embedding
from effc.compiler.blocks.linear import StackedLinear
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Statistic
from effc.passes._dense import finite, matrix
from effc.passes._moment import Moment
from effc.passes.quantize._grid import decode, fit
from effc.passes.quantize._solve import factor, output_error, solve
from effc.passes.quantize._uniform import nearest
from effc.specs.diagnostic import Diagnostic, EffcError

if TYPE_CHECKING:
    from effc.passes.quantize.gptq import GPTQ


@dataclass(slots=True)
class Piece:
    """One matrix to round, a linear or one expert of a stack, and what came of it."""

    path: str
    method: GPTQ
    w: Tensor
    """As the model holds it; float copies of a whole layer would take more than the layer."""
    moment: Moment | None
    """None where no input was seen."""
    rounded: tuple[Tensor, Tensor, Tensor] = ()  # type: ignore[assignment]
    """q, scale, zero"""
    error: float = 0.0

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.w.shape[1] if self.method.group == "channel" else int(self.method.group)

    @property
    def grid(self) -> tuple[Any, ...]:
        """Everything that must be equal for two matrices to be solved in one go."""
        m = self.method
        return (m.bits, self.group, m.scheme, m.scale, m.damp, m.order, m.block)


def pieces_of(rw: Rewriter, path: str, method: GPTQ, seen: Mapping[str, Statistic]) -> Iterable[Piece]:
    """The matrices at a path, each with the statistic of its inputs.

    A table that is looked up has no inputs, and an expert may have had none: both go to the nearest point.

    Raises:
        EffcError: E420 for weights that are not finite, E421 for a linear that never ran.
    """
    module = rw.module(path)
    w = matrix(module)
    finite(path, w)
    if path not in seen and not isinstance(module, StackedLinear | Embedding):
        raise EffcError(
            Diagnostic(
                "E421",
                f"{path} never ran on the calibration data",
                help="use other data or more samples, or leave the module out with `except`",
                about="data",
            )
        )
    if not isinstance(module, StackedLinear):
        yield Piece(path, method, w, _moment(seen.get(path)))
        return
    for expert, rows in enumerate(w.chunk(module.experts)):
        yield Piece(path, method, rows, _moment(seen.get(f"{path}[{expert}]")))


def grouped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that read one input and go onto one kind of grid."""
    groups: dict[tuple[Any, ...], list[Piece]] = {}
    for number, piece in enumerate(pieces):
        alone = piece.moment is None
        groups.setdefault((number if alone else id(piece.moment), alone, *piece.grid), []).append(piece)
    return list(groups.values())


def round_together(kind: str, pieces: Sequence[Piece]) -> None:
    """Round the rows of all pieces at once, and give each its share of the result and its error.

    Raises:
        EffcError: E422 when H cannot be factored even with a tenth of its mean on the diagonal.
    """
    first = pieces[0]
    method = first.method
    symmetric = method.scheme == "symmetric"
    if first.moment is None:
        q, scale, zero, first.error = nearest(
            first.w, method.bits, first.w.shape[1] // first.group, symmetric, method.store, fit
        )
        first.rounded = (q, scale, zero)
        return
    h = first.moment.mean().mul_(2)
    dead = h.diagonal() == 0
    h.diagonal().add_(dead)  # an input that never fires has no say: its row and column are zero
    order = h.diagonal().argsort(descending=True, stable=True) if method.order else None
    found = factor(h if order is None else h[order][:, order], method.damp)
    if found is None:
        raise EffcError(
            Diagnostic(
                "E422",
                f"`{kind}` cannot invert the inputs' statistics of {first.path}",
                notes=(
                    f"tried {method.damp:g} to 0.1 of the mean of the diagonal; {first.moment.rows} inputs",
                ),
                help="use more samples, or leave the module out with `except`",
                about="damp",
            )
        )
    u, _ = found
    live = torch.cat([piece.w.float() for piece in pieces]).masked_fill_(dead, 0.0)
    q, scale, zero = solve(live, u, method.bits, first.group, symmetric, method.store, method.block, order)
    del live, found, u
    rows = [piece.w.shape[0] for piece in pieces]
    parts = zip(*(t.split(rows) for t in (q, scale, zero)), strict=True)
    for piece, (codes, s, z) in zip(pieces, parts, strict=True):
        rounded = decode(codes.view(*s.shape, -1), s, z).view_as(piece.w)
        piece.error = output_error(piece.w.float().masked_fill(dead, 0.0), rounded, h)
        piece.rounded = (codes.to(torch.int8), s, z)


def _moment(statistic: Statistic | None) -> Moment | None:
    return statistic if isinstance(statistic, Moment) and statistic.rows else None
