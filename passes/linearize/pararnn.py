"""Put a nonlinear recurrent cell in place of softmax attention, trained over all tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from effc.compiler.blocks.para_rnn import ParaRNN
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes.linearize._blocks import Blocks, begun, depth_scale
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count


class ParaRNNSwap(Blocks, Rewrite):
    """Replace attention by y = W_o h, h_t = f(h_{t-1}, x_t) of a GRU, or an LSTM with one gate for two.

    Recurrent weights are diagonal, so df/dh is a number a channel, or a 2 x 2 block. All T states are found
    together: `iters` steps of Newton's method, each a scan of log2 T rounds; where the largest residual is
    still above `tol`, as where states run away from each other, the sequence runs token by token instead.
    Gradients are those of the solution, by one scan backwards. `jac = diag` of an LSTM leaves the
    off-diagonal of its blocks out of the steps, which then need more of them. All weights of the block are
    new, drawn from the stage's seed.

    Use when: a task needs states that change nonlinearly, and the model is trained from the start.
    Costs:    what the attention knew. A token costs the same however long the sequence; the cache is one
              state of d numbers (gru) or two. There is no C kernel, so torch runs the model.
    """

    paper = Paper(
        "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models",
        arxiv="2510.21450",
        year=2025,
        section="3",
    )
    contract = Contract(HEALED, gives=(Fact("dense", "select"),))
    examples = (
        "linearize.pararnn(heads = 2)",
        'linearize.pararnn(cell = lstm_cifg, jac = block2, heads = 4, select = ["layers[::2].attention"])',
    )

    cell: Literal["gru", "lstm_cifg"] = Field(default="gru", description="which cell")
    jac: Literal["diag", "block2"] = Field(
        default="diag", description="what a step of Newton's method knows of df/dh"
    )
    iters: Count = Field(default=3, gt=0, le=50, description="steps of Newton's method")
    omega: float = Field(
        default=1.0, gt=0, le=1, description="length of a step; below one where steps overshoot"
    )
    tol: float = Field(default=1e-4, gt=0, description="largest residual of a solution that is taken")
    heads: Count = Field(default=2, gt=0, description="parts of the input that do not meet in the gates")

    @model_validator(mode="after")
    def _has_blocks(self) -> Self:
        if self.cell == "gru" and self.jac == "block2":
            raise ValueError("a gru has one state a channel, so its df/dh is diagonal; write jac = diag")
        return self

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = self.blocks(model)
        if found := list(self.unfit(model, paths)):
            return found
        width = int(model.module(paths[0]).width)  # type: ignore[arg-type]
        if width % self.heads == 0:
            return []
        fits = [n for n in range(1, min(width, 64) + 1) if width % n == 0]
        return [
            Diagnostic(
                "E320",
                f"{width} channels do not divide over {self.heads} heads",
                help=f"use heads in {{{', '.join(map(str, fits))}}}",
                about="heads",
            )
        ]

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        for path in self.blocks(rw.model):
            rw.swap(path, self._block(rw.module(path)))

    def rewrite(self, rw: Rewriter) -> None:
        layers = rw.model.layers
        for path in self.blocks(rw.model):
            block = self._block(rw.module(path))
            begun(block, lambda child, slot, tensor: _first(child, slot, tensor, layers))
            rw.swap(path, block)

    def _block(self, old: nn.Module) -> ParaRNN:
        return ParaRNN(
            width=old.width,  # type: ignore[arg-type]
            cell=self.cell,
            heads=self.heads,
            jac=self.jac,
            iters=self.iters,
            omega=self.omega,
            tol=self.tol,
            dtype=old.dtype,  # type: ignore[arg-type]
        )


def _first(name: str, slot: str, tensor: Tensor, layers: int) -> Tensor:
    """First values: recurrent weights small, so that no state runs away; matrices normal; biases zero."""
    if slot == "bias":
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    if name == "peep":
        return (torch.rand(tensor.shape) - 0.5).to(tensor.dtype)
    drawn: Tensor = torch.randn(tensor.shape) / (tensor.shape[-1] ** 0.5 * depth_scale(name, layers))
    return drawn.to(tensor.dtype)
