"""Cut a narrower model out of one that was trained at several widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

from pydantic import Field, model_validator

from effc.compiler.blocks.unit import Unit
from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import layer_of
from effc.compiler.shapes import Rewrite
from effc.compiler.trace import TracedModel
from effc.passes._dense import some
from effc.passes.adaptive._slim_fit import unfit as unfit_network
from effc.passes.adaptive._slim_net import BATCH_NORMS, Widths, network, sketched
from effc.passes.adaptive._slim_net import cut as cut_network
from effc.passes.adaptive._slim_norm import SlimNorm
from effc.passes.adaptive._widths import Config, cut, divided, kept, slim, unfit
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Share


class Select(Rewrite):
    """Keep the first channels and heads of every layer: of all configurations within `budget` the widest.

    A configuration is a width of the encoder (the lower `split` of the layers) and one of the decoder, in a
    traced network of convolutions one of the decoder of each answer; what counts are FLOPs a token or image,
    as shares of the model that came in. Of those within the budget the one with the most FLOPs is taken, the
    wider encoder first. With `pref`, one share for each answer, decoders get widths in proportion to it, the
    most wanted one the widest, and the encoder is the widest that stays within the budget. The result equals
    the model with all other channels and heads at zero, norms with the statistics of that width.

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
    pref: tuple[Share, ...] = Field(
        default=(), description="how much each answer of a network matters; shares that sum up to 100%"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if min((*self.widths, *self.enc_widths, *self.dec_widths)) <= 0:
            raise ValueError("a width of 0% leaves nothing")
        if self.pref and abs(sum(self.pref) - 1) > 1e-6:
            raise ValueError(f"pref sums up to {100 * sum(self.pref):g}%, not 100%")
        return self

    def configs(self) -> list[Config]:
        """Those of a transformer."""
        return [(e, d) for e in self.enc_widths or self.widths for d in self.dec_widths or self.widths]

    def of(self, model: Model) -> list[Widths]:
        """The configurations of a model to choose from."""
        if not isinstance(model, TracedModel):
            return list(self.configs())
        decoder = self.dec_widths or self.widths
        found = network(model).all(self.enc_widths or self.widths, decoder)
        if not self.pref:
            return found
        wanted = [max(decoder) * share / max(self.pref) for share in self.pref]
        own = tuple(min(decoder, key=lambda d: (abs(d - w), d)) for w in wanted)
        return [c for c in found if c[1:] == own]

    def costs(self, model: Model) -> dict[Widths, float]:
        """Configuration -> its share of the FLOPs a token or image."""
        if isinstance(model, TracedModel):
            net = network(model)
            whole = sketched(model, net, (1.0,) * (1 + net.decoders)).flops
            return {c: sketched(model, net, c).flops / whole for c in self.of(model)}
        encoder = divided(model, self.split)
        return {
            config: _flops(model, config, encoder) / _flops(model, (1, 1), encoder)
            for config in self.configs()
        }

    def chosen(self, model: Model) -> Widths:
        """The widest configuration within the budget. Raises ValueError when there is none."""
        within = [(share, c) for c, share in self.costs(model).items() if share <= self.budget]
        return max(within)[1]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        unfits = self._of_network(model) if isinstance(model, TracedModel) else self._of_transformer(model)
        if found := list(unfits):
            return found
        costs = self.costs(model)
        if min(costs.values()) > self.budget:
            least = min(costs.values())
            title = f"no configuration fits {100 * self.budget:g}% of the FLOPs a token"
            title = title.replace("a token", "an image") if isinstance(model, TracedModel) else title
            note = f"the narrowest one takes {100 * least:.3g}%"
            help_ = f"use a budget of {100 * least + 0.05:.3g}% or more, or narrower widths"
            return [Diagnostic("E331", title, notes=(note,), help=help_, about="budget")]
        if min(self.chosen(model)) == 1 and not _slim_norms(model):
            note = f"the whole model is within {100 * self.budget:g}%"
            return [
                Diagnostic("E325", f"`{self.kind}` would change nothing", (), (note,), "lower the budget")
            ]
        return []

    def _of_transformer(self, model: Model) -> Iterator[Diagnostic]:
        if self.pref:
            title = "`pref` weighs the answers of a network, and the model has one"
            yield Diagnostic("E325", title, help="leave it out", about="pref")
            return
        yield from unfit(self.kind, model, sorted({w for c in self.configs() for w in c}))

    def _of_network(self, model: TracedModel) -> Iterator[Diagnostic]:
        net = network(model)
        if self.pref and len(self.pref) != net.answers:
            title = f"`pref` has {len(self.pref)} shares for {net.answers} answers of the network"
            yield Diagnostic("E331", title, help="give one share for each answer", about="pref")
            return
        if plain := [p for p in net.region if isinstance(model.module(p), BATCH_NORMS)]:
            note = f"{some(plain)} has those of the whole network alone"
            help_ = "train with adaptive.slimmable first"
            title = f"`{self.kind}` needs norms with statistics for each width"
            yield Diagnostic("E320", title, (), (note,), help_)
            return
        for path, norm in _slim_norms(model).items():
            if missing := [c for c in self.of(model) if net.state(path, c) not in norm.states]:
                words = ", ".join(f"{100 * w:g}%" for w in net.state(path, missing[0]))
                there = sorted({100 * w for state in norm.states for w in state})
                title = f"`{path}` has no statistics for widths {words}"
                help_ = f"use widths that were trained: {', '.join(f'{w:g}%' for w in there)}"
                yield Diagnostic("E331", title, help=help_, about="widths")
                return
        widths = self.enc_widths or self.widths, self.dec_widths or self.widths
        yield from unfit_network(self.kind, model, *widths)

    def rewrite(self, rw: Rewriter) -> None:
        chosen = self.chosen(rw.model)
        if isinstance(rw.model, TracedModel):
            cut_network(rw, network(rw.model), chosen)
        else:
            cut(rw, (chosen[0], chosen[1]), divided(rw.model, self.split))


def _slim_norms(model: Model) -> dict[str, SlimNorm]:
    return {path: m for path, m in model.gm.named_modules() if isinstance(m, SlimNorm)}


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
