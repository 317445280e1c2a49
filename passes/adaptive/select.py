"""Cut a narrower model out of one that was trained at several widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from effc.compiler.blocks.unit import Unit
from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import layer_of
from effc.compiler.shapes import Rewrite
from effc.passes.adaptive._widths import Config, cut, divided, kept, slim, unfit
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Share


class Select(Rewrite):
    """Keep the first channels and heads of every layer: of all configurations within `budget` the widest.

    A configuration is a width of the encoder (the lower `split` of the layers) and one of the decoder; what
    counts are FLOPs a token, as shares of the model that came in. Of those within the budget the one with the
    most FLOPs is taken, the wider encoder first. The result equals the model with all other channels and
    heads at zero.

    Use when: a model was trained with adaptive.slimmable, with the same widths and split.
    Costs:    what the narrow configuration has lost; any other model loses far more.
    """

    paper = Paper(
        "Efficient Controllable Multi-Task Architectures", arxiv="2308.11744", year=2023, section="3"
    )
    contract = Contract(LOSSY, needs=(Fact("dense", "model"),), keeps=(Fact("dense"), Fact("unit_gain")))
    examples = (
        "adaptive.select(budget = 70%, widths = [50%, 100%])",
        "adaptive.select(budget = 90%, enc_widths = [50%], dec_widths = [50%, 100%])",
    )
    streams = True

    budget: Share = Field(gt=0, description="greatest share of the FLOPs a token that may be kept")
    widths: tuple[Share, ...] = Field(default=(0.5, 1.0), min_length=1, description="widths to choose from")
    enc_widths: tuple[Share, ...] = Field(default=(), description="those of the encoder; default: `widths`")
    dec_widths: tuple[Share, ...] = Field(default=(), description="those of the decoder; default: `widths`")
    split: Share = Field(default=0.5, gt=0, lt=1, description="share of the layers that are the encoder")

    @model_validator(mode="after")
    def _above_zero(self) -> Self:
        if min((*self.widths, *self.enc_widths, *self.dec_widths)) <= 0:
            raise ValueError("a width of 0% leaves nothing")
        return self

    def configs(self) -> list[Config]:
        return [(e, d) for e in self.enc_widths or self.widths for d in self.dec_widths or self.widths]

    def costs(self, model: Model) -> dict[Config, float]:
        """Configuration -> its share of the FLOPs a token."""
        encoder = divided(model, self.split)
        return {
            config: _flops(model, config, encoder) / _flops(model, (1, 1), encoder)
            for config in self.configs()
        }

    def chosen(self, model: Model) -> Config:
        """The widest configuration within the budget. Raises ValueError when there is none."""
        within = [(share, c) for c, share in self.costs(model).items() if share <= self.budget]
        return max(within)[1]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if found := list(unfit(self.kind, model, sorted({w for c in self.configs() for w in c}))):
            return found
        costs = self.costs(model)
        if min(costs.values()) > self.budget:
            least = min(costs.values())
            title = f"no configuration fits {100 * self.budget:g}% of the FLOPs a token"
            note = f"the narrowest one takes {100 * least:.3g}%"
            help_ = f"use a budget of {100 * least + 0.05:.3g}% or more, or narrower widths"
            return [Diagnostic("E331", title, notes=(note,), help=help_, about="budget")]
        if self.chosen(model) == (1.0, 1.0):
            note = f"the whole model is within {100 * self.budget:g}%"
            return [
                Diagnostic("E325", f"`{self.kind}` would change nothing", (), (note,), "lower the budget")
            ]
        return []

    def rewrite(self, rw: Rewriter) -> None:
        cut(rw, self.chosen(rw.model), divided(rw.model, self.split))


def _flops(model: Model, config: Config, encoder: int) -> int:
    """FLOPs a token of the model at a width."""
    total = 0
    blocks = slim(model)
    inside = {id(u) for b in blocks.values() for u in b.modules()}
    total += sum(unit.flops(ATTENDED) for _, unit in model.units() if id(unit) not in inside)
    for path, block in blocks.items():
        width = config[0] if (layer_of(path) or 0) < encoder else config[1]
        whole = sum(u.flops(ATTENDED) for u in block.modules() if isinstance(u, Unit))
        total += whole * kept(block, width) // kept(block, 1.0)
    return total
