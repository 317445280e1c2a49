"""The matrices that GPTQ rounds in one layer: those on one input and one grid are solved together.

Shapes: W [R, i]; q [R, i], scale and zero [R, G].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from effc.passes.quantize._grid import decode, fit, fit_least_squares
from effc.passes.quantize._solve import factor, relative, solve, squares
from effc.passes.quantize._uniform import nearest
from effc.specs.diagnostic import Diagnostic, EffcError

if TYPE_CHECKING:
    from effc.passes.quantize.gptq import GPTQ

TOGETHER = 1 << 24
"""Weights that are solved at once: rows do not depend on each other, and several copies in float32 of a
large matrix would be more than its layer.
"""


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
        return (m.bits, self.group, m.scheme, m.scale, m.clip, m.damp, m.order, m.block)


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
    find = fit_least_squares if method.clip == "mse" else fit
    if first.moment is None:
        q, scale, zero, first.error = nearest(
            first.w, method.bits, first.w.shape[1] // first.group, symmetric, method.store, find
        )
        first.rounded = (q, scale, zero)
        return
    c = first.moment.mean()
    dead = c.diagonal() == 0  # an input that never fires has no say: its row and column are zero
    order = c.diagonal().argsort(descending=True, stable=True) if method.order else None
    found = factor(c, method.damp, order)
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
    sums: dict[int, list[tuple[float, float]]] = {}
    parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for strip in _strips(pieces):
        live = torch.cat([rows.float() for _, rows in strip]).masked_fill_(dead, 0.0)
        q, scale, zero = solve(
            live, u, method.bits, first.group, symmetric, method.store, method.block, order, find
        )
        counts = [len(rows) for _, rows in strip]
        splits = zip(*(t.split(counts) for t in (live, q, scale, zero)), strict=True)
        for (number, _), (w, codes, s, z) in zip(strip, splits, strict=True):
            rounded = decode(codes.view(*s.shape, -1), s, z).view_as(w)
            sums.setdefault(number, []).append(squares(w, rounded, c))
            parts.setdefault(number, []).append((codes.to(torch.int8), s, z))
    for number, piece in enumerate(pieces):
        piece.error = relative(sums[number])
        q, scale, zero = (torch.cat(part) for part in zip(*parts[number], strict=True))
        piece.rounded = (q, scale, zero)


def _strips(pieces: Sequence[Piece]) -> Iterator[list[tuple[int, Tensor]]]:
    """Rows of the pieces in turn, each with the number of its piece, that are solved in one go."""
    most = max(1, TOGETHER // pieces[0].w.shape[1])
    strip: list[tuple[int, Tensor]] = []
    room = most
    for number, piece in enumerate(pieces):
        rest = piece.w
        while len(rest):
            strip.append((number, rest[:room]))
            room -= len(rest[:room])
            rest = rest[len(strip[-1][1]) :]
            if not room:
                yield strip
                strip, room = [], most
    if strip:
        yield strip


def _moment(statistic: Statistic | None) -> Moment | None:
    return statistic if isinstance(statistic, Moment) and statistic.rows else None
