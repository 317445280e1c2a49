"""Move the gain and the bias of norms into the weights that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear, StackedLinear
from effc.compiler.blocks.norm import Norm
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.contract import EXACT, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.readers import Readers, readers
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Rewrite
from effc.passes._dense import shared, some
from effc.passes.reparam._affine import add_bias, put_affine
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import FOLKLORE
from effc.specs.select import resolve


class FoldNorm(Selects, Rewrite):
    """Replace W (g * n(x) + b) + c by (W diag g) n(x) + (W b + c), in every layer that reads a norm.

    The norm keeps a gain of one and a bias of zero, so the architecture stays what it was. Readers that have
    no bias get one where the norm has one. q, k and v of an attention, gate and up of an MLP, router and
    experts of a mixture are folded together.

    Use when: a later stage turns or slices the residual stream, or compares rows of weights, which needs
              norms without gain.
    Costs:    nothing; half-precision weights are rounded once more. A shared head stays shared only with
              `tied = skip`.
    """

    paper = FOLKLORE
    contract = Contract(
        EXACT,
        needs=(Fact("dense", "select"),),
        gives=(Fact("unit_gain", "select"),),
        keeps=(*map(Fact, ("sparse", "sparse_2_4", "sparse_4_8", "low_rank", "tied", "packed")),),
    )
    streams = True
    examples = (
        "reparam.fold_norm(tied = skip)",
        "reparam.fold_norm(tied = untie)",
        'reparam.fold_norm(select = ["layers[0..2].norm1"])',
    )

    select: tuple[str, ...] = Field(
        default=(), description="norms to fold; default: all that feed matrices and nothing else"
    )
    tied: Literal["refuse", "skip", "untie"] = Field(
        default="refuse",
        description="where a reader shares its weight: an error, the norm stays, or sharing ends",
    )

    def targets(self, model: Model) -> dict[str, Self]:  # pyright: ignore[reportIncompatibleMethodOverride]
        names = [name for name in model.names() if name.role == "norm"]
        table = resolve(self.select or ("norm",), self.except_, self.rules, names)
        chosen = [path for path, given in table.items() if given is not None]
        reads = {path: readers(model, path) for path in chosen}
        if not self.select:
            chosen = [p for p in chosen if isinstance(model.module(p), Norm) and not reads[p].others]
        if self.tied == "skip":
            ties = shared(model)
            chosen = [p for p in chosen if not ties.intersection(reads[p].units)]
        return dict.fromkeys(chosen, self)

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        reads = {path: readers(model, path) for path in self.targets(model)}
        if not reads:
            return [_nothing(self.kind, model)]
        found = [*self._unfit(model, reads), *self._unlike(model, reads)]
        return [*found, *self._tied(model, reads)]

    def _unfit(self, model: Model, reads: Mapping[str, Readers]) -> Iterator[Diagnostic]:
        """Norms that were named and whose gain has nowhere to go."""
        for path, read in reads.items():
            module = model.module(path)
            if isinstance(module, Norm) and not read.others:
                continue
            what = type(module).__name__
            why = f"it is read by {', '.join(read.others)}"
            yield Diagnostic(
                "E320",
                f"the gain of `{path}` cannot be folded",
                notes=(why if isinstance(module, Norm) else f"it is {what}, not a norm of the last axis",),
                help="leave it out with `except`; without `select`, norms that feed matrices alone are taken",
                about="select",
            )

    def _unlike(self, model: Model, reads: Mapping[str, Readers]) -> Iterator[Diagnostic]:
        """Readers that do not hold plain numbers, or cannot take a bias."""
        units = {unit: path for path, read in reads.items() for unit in read.units}
        packed = [u for u in units if isinstance(model.module(u), Packed)]
        other = [u for u in units if u not in packed and not _plain(model.module(u))]
        stacks = [
            u
            for u, path in units.items()
            if isinstance(model.module(u), StackedLinear)
            and getattr(model.module(path), "bias", None) is not None
        ]
        if packed:
            yield Diagnostic(
                "E322",
                f"`{self.kind}` cannot scale what is already packed",
                notes=(f"{some(packed)} {'is' if len(packed) == 1 else 'are'} packed",),
                help="fold before the stage that packs, or leave the norms before it out with `except`",
            )
        if other:
            types = sorted({type(model.module(u)).__name__ for u in other})
            yield Diagnostic(
                "E323",
                f"`{self.kind}` needs dense weights behind a norm",
                notes=(f"{some(other)}: {', '.join(types)}",),
                help="fold before the stage that made them, or fold them in first (adapt.fold)",
            )
        if stacks:
            yield Diagnostic(
                "E320",
                f"the bias of `{units[stacks[0]]}` cannot be folded",
                notes=(f"{some(stacks)} holds experts, which have no bias",),
                help="leave the norm out with `except`",
            )

    def _tied(self, model: Model, reads: Mapping[str, Readers]) -> Iterator[Diagnostic]:
        ties = shared(model)
        units = [unit for read in reads.values() for unit in read.units if unit in ties]
        if units and self.tied == "refuse":
            yield Diagnostic(
                "E341",
                f"`{self.kind}` cannot scale a weight that is shared",
                notes=(f"{some(units)} shares its weight with another module, which reads no such norm",),
                help="write tied = skip to leave the norms before it, or tied = untie to end the sharing",
                about="tied",
            )
        alone = [path for path in reads if path in ties and not _together(model, path, reads)]
        if alone:
            yield Diagnostic(
                "E341",
                f"`{some(alone)}` shares its gain with a norm that is not folded",
                help="fold all norms that share a gain, or none of them",
                about="select",
            )

    def rewrite(self, rw: Rewriter) -> None:
        targets = self.targets(rw.model)
        reads = {path: readers(rw.model, path).units for path in targets}
        taken = {path: _gain(rw.present(path)) for path in targets}
        for path, units in reads.items():
            gain, bias = taken[path]
            for unit in units:
                if unit in shared(rw.model):
                    rw.untie(unit)
                _fold(rw, unit, gain, bias, rw.module(path).bias is not None)
            if gain is not None:
                norm = rw.module(path)
                rw.write(
                    path, "weight", torch.full_like(norm.weight, 1 - norm.offset, device="cpu"), "gain one"
                )
                if bias is not None:
                    rw.write(path, "bias", torch.zeros_like(norm.bias, device="cpu"), "bias zero")

    def work(self, model: Model, seq: int = 0) -> Work:
        units = {u for path in self.targets(model) for u in readers(model, path).units}
        weights = [model.module(u).get_parameter("weight") for u in units]
        numbers, nbytes = [w.numel() for w in weights], sum(w.nbytes for w in weights)
        return Work(solve=2.0 * sum(numbers), disk=2 * nbytes, memory=16 * max(numbers, default=0))


def _plain(module: nn.Module) -> bool:
    """Holds a matrix of plain numbers; a subclass of torch's linear may compute something else."""
    return isinstance(module, Linear | StackedLinear) or type(module) is nn.Linear


def _gain(norm: Norm) -> tuple[Tensor | None, Tensor | None]:
    """What the norm multiplies by and adds, float64 [d]; None for both where its weights are not known."""
    if norm.weight.is_meta:
        return None, None
    held = cast("Tensor | None", norm.bias)
    bias = None if held is None else held.detach().double()
    return norm.weight.detach().double() + norm.offset, bias


def _fold(rw: Rewriter, path: str, gain: Tensor | None, bias: Tensor | None, biased: bool) -> None:
    """Scale the columns of one matrix; W b goes to its bias, which is made where there is none."""
    old = rw.present(path)
    known = gain is not None and not old.weight.is_meta
    weight: Tensor | None = None
    moved: Tensor | None = None
    if known and gain is not None:
        wide = old.weight.detach().double()
        weight = (wide * gain).to(old.weight.dtype)
        if bias is not None:
            before = 0 if old.bias is None else old.bias.detach().double()
            moved = (wide @ bias + before).to(old.weight.dtype)
    if biased and old.bias is None and moved is None:
        add_bias(rw, path, None, None, "takes the bias of its norm")
    elif weight is not None:
        put_affine(rw, path, weight, moved, "takes the gain of its norm")


def _together(model: Model, path: str, reads: Mapping[str, Readers]) -> bool:
    """Whether every norm that shares the gain at `path` is folded too."""
    ties = model.ties()
    owner = ties.get(f"{path}.weight", f"{path}.weight")
    names = [owner, *(alias for alias, to in ties.items() if to == owner)]
    return all(name.rpartition(".")[0] in reads for name in names)


def _nothing(kind: str, model: Model) -> Diagnostic:
    """Why no norm at all can be folded."""
    names = [name.path for name in model.names() if name.role == "norm"]
    notes = []
    for path in names[:3]:
        others = readers(model, path).others
        notes.append(f"`{path}` is read by {', '.join(others or ['weights that are shared'])}")
    return Diagnostic(
        "E320",
        f"`{kind}` finds no norm whose gain can be folded",
        notes=tuple(notes),
        help="leave the stage out: gains move only where nothing but matrices reads a norm",
    )
