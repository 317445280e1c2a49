"""Round weights one column after another, and let the columns still to come make up for the error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Gt
from pydantic import Field

from effc.compiler.blocks.embedding import Embedding
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.cost import count
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Calibrate, Statistic
from effc.passes._dense import inputs_of, matrix
from effc.passes._moment import Moment
from effc.passes.quantize._pieces import TOGETHER, Piece, grouped, pieces_of, round_together
from effc.passes.quantize._uniform import Uniform, packed_unit, place
from effc.specs.paper import Paper
from effc.specs.units import Unit


class GPTQ(Uniform, Calibrate):
    """Round weights so that outputs stay rather than weights: later columns make up for earlier ones.

    With H = 2 E[x x^T] of the layer's inputs and inv(H) = U^T U, for every column j:
    q_j = round(w_j), e = (w_j - q_j) / U_jj, W[:, j:] -= e U[j, j:].

    A group's range is fitted when its first column is reached; `clip = mse` shrinks it to the one of ten with
    the least squared error of the weights as they then are.

    Layers run in order, each on what the quantized layers before it produce; q, k, v share one H, and so do
    gate and up. A table that is looked up sees no inputs and is rounded to nearest, as is an expert that no
    token chose.

    Use when: you want 3 or 4 bits from some hundred sequences of data, without training.
    Costs:    three passes over the data, i^3 for an inverse and R i^2 for the rounding of a weight [R, i]; it
              fits the calibration data, so take data like those of the task.
    """

    paper = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        arxiv="2210.17323",
        year=2022,
        section="3",
    )
    contract = Contract(LOSSY, needs=(Fact("dense", "select"),), gives=(Fact("packed", "select"),))
    examples = (
        "quantize.gptq(data = code, bits = 4, group = 16)",
        "quantize.gptq(data = code, bits = 3, samples = 8, scheme = asymmetric, order = true)",
        'quantize.gptq(data = code, bits = 4, group = 16, samples = 8, rules = [{on = "head", bits = 8}])',
    )

    group: Annotated[int, Gt(0)] | Literal["channel"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="channel", description="inputs that share a scale; `channel`: a whole row"
    )
    bits: Annotated[int, Unit("bits")] = Field(default=4, ge=2, le=8, description="bits of a code")
    clip: Literal["none", "mse"] = Field(
        default="mse",
        description="how the range of a group is chosen: whole, or with the least squared error",
    )
    damp: Annotated[float, Unit("share")] = Field(
        default=0.01, gt=0, le=0.1, description="added to the diagonal of H, as a share of its mean"
    )
    order: bool = Field(
        default=False, description="round columns by falling diagonal of H; grids are fitted before"
    )
    block: int = Field(default=128, ge=1, description="columns whose updates are applied together")

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        done: set[str] = set()
        ties = rw.model.ties()
        with rw.together():
            for path, method in self.targets(rw.model).items():
                if path not in done:
                    module = rw.module(path)
                    unit = packed_unit(module, method.width(method.bits, inputs_of(module)))
                    done |= place(rw, path, unit, ties)

    def watch(self, rw: Rewriter, paths: Sequence[str]) -> list[str]:
        return [p for p in paths if not isinstance(rw.module(p), Embedding | Packed)]

    def start(self, rw: Rewriter, path: str) -> Statistic:
        return Moment(inputs_of(rw.module(path)))

    def rewrite_layer(
        self, rw: Rewriter, paths: Sequence[str], seen: Mapping[str, Statistic]
    ) -> Mapping[str, float]:
        targets = self.targets(rw.model)
        here = [
            p for p in paths if not isinstance(rw.module(p), Packed) and not _awaited(rw, p, targets, paths)
        ]
        pieces = [piece for path in here for piece in pieces_of(rw, path, targets[path], seen)]
        errors: dict[str, float] = {}
        for alike in grouped(pieces):
            round_together(self.kind, alike)
            for path in dict.fromkeys(piece.path for piece in alike):
                mine = [piece for piece in pieces if piece.path == path]
                if isinstance(rw.module(path), Packed) or not all(piece.rounded for piece in mine):
                    continue  # tied to one that was packed just now, or with experts still to come
                errors[path] = self._put(rw, path, targets[path], mine)
                for piece in mine:
                    piece.rounded = ()  # type: ignore[assignment]
        return errors

    def _put(self, rw: Rewriter, path: str, method: GPTQ, pieces: Sequence[Piece]) -> float:
        """Swap the packed unit in; returns the relative error of the outputs (worst expert)."""
        module = rw.module(path)
        unit = packed_unit(module, method.width(method.bits, inputs_of(module)))
        q, scale, zero = (torch.cat(parts) for parts in zip(*(p.rounded for p in pieces), strict=True))
        unit.fill(q, scale, None if unit.symmetric else zero)
        place(rw, path, unit, rw.model.ties())
        return max(piece.error for piece in pieces)

    def work(self, model: Model, seq: int = 0) -> Work:
        tokens = self.samples * seq
        flops = 2.0 * tokens * count(model, seq // 2).flops_per_token
        tries = 100.0 if self.clip == "mse" else 10.0
        squares, solving, largest, nbytes = 0.0, 0.0, 0, 0
        for path in self.targets(model):
            w = matrix(model.module(path))
            rows, inputs = w.shape
            squares += 2.0 * tokens * inputs**2  # X X^T, in float32
            solving += 2.0 * rows * inputs**2 + inputs**3 + tries * rows * inputs
            together = min(rows * inputs, TOGETHER)
            largest = max(largest, 4 * (2 * inputs**2 + 4 * together))  # C and its factor
            nbytes += w.numel() * w.element_size()
        return Work(flops, solving, exact=squares, disk=2 * nbytes, memory=largest)


def _awaited(rw: Rewriter, path: str, targets: Mapping[str, GPTQ], paths: Sequence[str]) -> bool:
    """A table whose numbers a selected head shares: the head sees inputs, so it decides later."""
    if not isinstance(rw.module(path), Embedding):
        return False
    ties = rw.model.ties()
    owner = ties.get(f"{path}.weight", f"{path}.weight")
    later = (f"{p}.weight" for p in targets if p not in paths)
    return any(ties.get(name, name) == owner for name in later)
