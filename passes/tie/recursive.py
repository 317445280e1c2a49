"""Run the same layers several times: share weights between layers, with a low-rank difference for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear, StackedLinear
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.norm import Norm
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._dense import matrix, some
from effc.passes.tie._groups import shared_already, tails, unlike
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Gradient


class Recursive(Rewrite):
    """Keep K = L / loops layers of weights and run each `loops` times, in every loop plus a low-rank
    difference.

    Layer l uses slot l mod K (`share = cycle`) or floor(l / loops) (`sequence`); `middle_*` leaves the first
    and the last layer alone. A slot starts as `average` of its layers, as evenly spaced layers (`stepwise`),
    as the first or last K layers (`lower`, `upper`), or with random numbers of the deviation that its first
    layer has. With `lora_rank` r > 0, W_l - W_slot = U S V^T gives B = U_r S_r and A = V_r^T (`lora_init =
    svd`), so W_l = W_slot + BA up to the singular values behind r; depth(4, 16) gives every layer a rank of
    its own. Biases and norm gains stay per layer, unless `tie_norms`. Quantizing afterwards packs what is
    shared, once, and leaves the differences as they are.

    Use when: memory or download size matters more than compute, and a training stage follows.
    Costs:    FLOPs and the key-value cache stay as they are; quality falls until the model is healed by
              distillation.
    """

    paper = Paper(
        "Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA",
        arxiv="2410.20672",
        year=2024,
        section="2",
    )
    contract = Contract(HEALED, needs=(Fact("dense", "model"),), gives=(Fact("tied", "model"),))
    streams = True
    examples = (
        "tie.recursive(loops = 2)",
        "tie.recursive(loops = 2, share = middle_cycle, init = stepwise, lora_rank = 4)",
        "tie.recursive(loops = 2, share = sequence, init = lower, lora_rank = 2, tie_norms = true)",
        "tie.recursive(loops = 3, init = random, lora_rank = depth(6, 1), lora_init = zero)",
    )

    loops: int = Field(default=2, ge=2, description="how often each kept layer runs")
    share: Literal["cycle", "sequence", "middle_cycle", "middle_sequence"] = Field(
        default="cycle",
        description="which layers share: every K-th, or neighbors; `middle_`: not the first and last",
    )
    init: Literal["average", "stepwise", "lower", "upper", "random"] = Field(
        default="average", description="what the shared weights start as"
    )
    lora_rank: Count | Gradient = Field(
        default=0, description="rank of each layer's own difference; 0: none, the layers are equal"
    )
    lora_init: Literal["svd", "zero"] = Field(
        default="svd", description="whether differences start at the best fit or at zero"
    )
    tie_norms: bool = Field(default=False, description="share norm gains as well")

    @field_validator("lora_rank")
    @classmethod
    def _no_less_than_nothing(cls, given: int | Gradient) -> int | Gradient:
        if isinstance(given, Gradient) and min(given.first, given.last) < 0:
            raise ValueError("ranks must be 0 or more")
        return given

    def rank_of(self, layer: int, layers: int) -> int:
        """The rank of one layer's difference."""
        given = self.lora_rank
        return given if isinstance(given, int) else int(given.at(layer, layers) + 0.5)

    def ranks(self, layers: int) -> list[int]:
        """Of all layers that take part."""
        return [self.rank_of(layer, layers) for layer in self._inner(layers)]

    def slots(self, layers: int) -> list[list[int]]:
        """The layers that share, slot by slot."""
        inner = self._inner(layers)
        kept = len(inner) // self.loops
        if self.share.endswith("sequence"):
            return [inner[i * self.loops : (i + 1) * self.loops] for i in range(kept)]
        return [inner[i::kept] for i in range(kept)]

    def sources(self, layers: int) -> list[list[int]]:
        """The layers whose mean each slot starts as."""
        inner, slots = self._inner(layers), self.slots(layers)
        kept = len(slots)
        if self.init in ("average", "random"):
            return slots
        if self.init == "lower":
            return [[layer] for layer in inner[:kept]]
        if self.init == "upper":
            return [[layer] for layer in inner[-kept:]]
        step = (len(inner) - 1) / max(1, kept - 1)
        return [[inner[round(i * step)]] for i in range(kept)]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        layers = model.layers
        inner = len(self._inner(layers))
        if inner < 2:
            title = f"`{self.kind}` needs layers to share, and this model has {layers}"
            help = f"leave the stage out; `share = {self.share}` takes at least {layers - inner + 2} layers"
            return [Diagnostic("E330", title, help=help)]
        if inner % self.loops:
            fits = [n for n in range(2, inner + 1) if inner % n == 0]
            which = "inner layers" if self.share.startswith("middle") else "layers"
            return [
                Diagnostic(
                    "E331",
                    f"{inner} {which} do not divide into {self.loops} loops",
                    help=f"use loops in {{{', '.join(map(str, fits))}}}",
                    about="loops",
                )
            ]
        help_ = "tie once, with the number of loops you want"
        return [
            *unlike(model, self._inner(layers)),
            *shared_already(self.kind, model, help_),
            *self._wrong_ranks(model),
        ]

    def _wrong_ranks(self, model: Model) -> list[Diagnostic]:
        largest = max(self.ranks(model.layers))
        if not largest:
            return []
        first = self._inner(model.layers)[0]
        units = {tail: model.module(f"layers.{first}.{tail}") for tail in _matrices(model, first)}
        if not units:
            title = f"`{self.kind}` adds factors to dense weights, and no layer holds any"
            return [Diagnostic("E323", title, help="tie before the stage that packs, or use lora_rank = 0")]
        stacks = [tail for tail, unit in units.items() if isinstance(unit, StackedLinear)]
        if stacks:
            note = f"{some(stacks)} in every layer"
            help_ = "use lora_rank = 0"
            return [
                Diagnostic(
                    "E320", f"`{self.kind}` has no low-rank difference for experts", (), (note,), help_
                )
            ]
        shortest = min((min(matrix(unit).shape), tail) for tail, unit in units.items())
        if largest <= shortest[0]:
            return []
        title = f"`lora_rank` {largest} is above the shorter side of {shortest[1]}"
        return [Diagnostic("E340", title, help=f"use a rank of at most {shortest[0]}", about="lora_rank")]

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        given = rw.model.clone()
        given.weights.clear()  # a plan reads none
        self._tie(rw, given)

    def rewrite(self, rw: Rewriter) -> Mapping[str, float]:
        return self._tie(rw, rw.model.clone())

    def _tie(self, rw: Rewriter, given: Model) -> Mapping[str, float]:
        """Edit slot after slot, from weights of `given`: a slot may start as a layer that shares by then."""
        layers = given.layers
        errors: dict[str, float] = {}
        first = self._inner(layers)[0]
        with rw.together():
            for tail in _matrices(given, first):
                for slot, sources in zip(self.slots(layers), self.sources(layers), strict=True):
                    shared = self._start([partial(_read, given, tail, "weight", n) for n in sources])
                    errors |= self._share(rw, given, tail, slot, shared)
        for tail in _norms(given, first) if self.tie_norms else ():
            self._share_norm(rw, given, tail)
        return errors

    def _start(self, tensors: Sequence[Callable[[], Tensor]]) -> Tensor:
        """What a slot starts as, of the weights that its sources have."""
        if self.init != "random":
            return _mean(tensors)
        first = tensors[0]()
        if first.is_meta:
            return first.clone()
        return (torch.randn(first.shape) * first.float().std()).to(first.dtype)

    def _share(
        self, rw: Rewriter, given: Model, tail: str, slot: Sequence[int], shared: Tensor
    ) -> dict[str, float]:
        """One weight of every layer in a slot becomes the shared one; returns the relative error at each."""
        owner = nn.Parameter(shared, requires_grad=False)
        errors = {}
        for layer in slot:
            path = f"layers.{layer}.{tail}"
            unit = rw.module(path).blank()
            unit.weight = owner
            if getattr(rw.module(path), "bias", None) is not None:
                unit.bias = rw.module(path).bias
            rank = self.rank_of(layer, given.layers)
            if rank:
                unit = LoraLinear.over(unit, rank, float(rank), "rank")
            if not shared.is_meta:
                own = _read(given, tail, "weight", layer)
                gap = own - shared
                left = self._fit(unit, gap) if rank else gap
                norm = float(own.float().norm())
                errors[path] = float(left.float().norm()) / norm if norm else 0.0
            rw.swap(path, unit, f"shares with layers {', '.join(map(str, slot))}")
        return errors

    def _fit(self, unit: LoraLinear, gap: Tensor) -> Tensor:
        """Set A, B of a unit to the best fit of `gap` [o, i], or B to zero; returns what is left of it."""
        u, s, vh = torch.linalg.svd(gap.float(), full_matrices=False)
        b, a = u[:, : unit.rank] * s[: unit.rank], vh[: unit.rank]
        if self.lora_init == "zero":
            b = torch.zeros_like(b)
        unit.a, unit.b = (nn.Parameter(t.to(gap.dtype).contiguous(), requires_grad=False) for t in (a, b))
        return gap - (unit.b @ unit.a).detach()

    def _share_norm(self, rw: Rewriter, given: Model, tail: str) -> None:
        slots, sources = self.slots(given.layers), self.sources(given.layers)
        names = [name for name, _ in given.module(f"layers.{slots[0][0]}.{tail}").named_parameters()]
        for slot, layers in zip(slots, sources, strict=True):
            for name in names:
                mean = _mean([partial(_read, given, tail, name, layer) for layer in layers])
                rw.write(f"layers.{slot[0]}.{tail}", name, mean)
            for layer in slot[1:]:
                rw.tie(f"layers.{layer}.{tail}", to=f"layers.{slot[0]}.{tail}")

    def _inner(self, layers: int) -> list[int]:
        """The layers that take part."""
        return list(range(1, layers - 1) if self.share.startswith("middle") else range(layers))

    def work(self, model: Model, seq: int = 0) -> Work:
        shapes = [
            matrix(model.module(f"layers.{layer}.{tail}")).shape
            for layer in self._inner(model.layers)
            for tail in _matrices(model, layer)
        ]
        own = any(self.ranks(model.layers))
        solving = sum(14.0 * o * i * min(o, i) for o, i in shapes) if own else 0.0
        largest = max((4 * o * i for o, i in shapes), default=0)
        return Work(solve=solving, memory=(6 if own else 3) * largest)


def _matrices(model: Model, layer: int) -> list[str]:
    return [
        t
        for t in tails(model, layer)
        if isinstance(model.module(f"layers.{layer}.{t}"), Linear | StackedLinear)
    ]


def _norms(model: Model, layer: int) -> list[str]:
    return [t for t in tails(model, layer) if isinstance(model.module(f"layers.{layer}.{t}"), Norm)]


def _read(model: Model, tail: str, name: str, layer: int) -> Tensor:
    """One tensor of a layer, read where it is not in memory; on meta where there is nothing to read."""
    path = f"layers.{layer}.{tail}"
    held = model.module(path).get_parameter(name).detach()
    if not held.is_meta or f"{path}.{name}" not in model.weights:
        return held
    return model.weights[f"{path}.{name}"].read()


def _mean(tensors: Sequence[Callable[[], Tensor]]) -> Tensor:
    """The mean, taken in float32; one tensor alone is itself, and on meta there is nothing to add up."""
    first = tensors[0]()
    if len(tensors) == 1 or first.is_meta:
        return first.clone()
    total = first.float() + 0.0
    for read in tensors[1:]:
        total += read().float()
    return (total / len(tensors)).to(first.dtype)
