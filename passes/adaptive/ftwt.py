"""Let each token use the channels that will matter to it, as a predictor says before they are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from effc.compiler.blocks.fire_mlp import FireMLP, should_fire
from effc.compiler.blocks.mlp import MLP
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.losses import cross_entropy
from effc.compiler.method import Batch, Data, Work
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Train
from effc.compiler.spent import counting
from effc.compiler.trained import parameters, training_work
from effc.passes.moe._ffn import feed_forwards, seeded
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share

SEEN = 16
"""Held-out sequences that are looked at for the report."""


class FTWT(Train):
    """Mask channels of feed-forward blocks for each token, by a predictor that learns which ones will fire.

    Should fire: of |a|, a the input of `down`, the largest channels until together they have more than `mass`
    of the sum. A linear on the block's input, of rank r where `predictor_rank` is not 0 (an option of effc),
    learns them by binary cross-entropy, added to the loss with weight one; its sign is the mask, with the
    gradient of a sigmoid. `decoupled`: the predictor's losses do not reach what lies before it; `joint`: they
    do. The share of channels that should fire in the model as it comes in is what to expect of the work.

    Use when: tokens differ in the channels that they need, and one is decoded at a time: then rows of
              channels that do not fire are not read. Several tokens together are masked and save nothing yet.
    Costs:    a predictor of d f weights a layer, or r (d + f). Feed-forward blocks alone; convolutions of
              traced modules, the paper's own case, are not changed. A plan counts all channels,
              `spent(data)` those that fire.
    """

    paper = Paper("Fire Together Wire Together", arxiv="2110.08232", year=2021, section="3")
    contract = Contract(TRAIN, needs=(Fact("trainable", "mlp"),), keeps=(Fact("dense", "model"),))
    examples: ClassVar[tuple[str, ...]] = (
        "adaptive.ftwt(data = code, predictor_rank = 4, steps = 3, batch = 2)",
        "adaptive.ftwt(data = code, mass = 1.0, mode = joint, steps = 2, batch = 2)",
    )

    mass: Share = Field(default=0.92, gt=0, description="share of a token's activation that is kept")
    mode: Literal["decoupled", "joint"] = Field(
        default="decoupled", description="whether a predictor's loss reaches what lies before it"
    )
    predictor_rank: Count = Field(default=0, description="rank r of a predictor; 0: a full matrix")

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = feed_forwards(model)
        if not paths:
            note = "a block called mlp of a layer, gated or plain, is what it masks"
            title = f"`{self.kind}` finds no dense feed-forward block"
            return [Diagnostic("E320", title, (), (note,), "put this stage before the one that changed them")]
        widths = {path: self._sizes(model.module(path)) for path in paths}
        rank = self.predictor_rank
        if low := [path for path, (d, f) in widths.items() if rank and rank >= d * f / (d + f)]:
            d, f = widths[low[0]]
            title = f"a predictor of rank {self.predictor_rank} is no smaller than a full matrix"
            note = f"{low[0]} is {d} wide and has {f} channels"
            help_ = f"use a rank of at most {int(d * f / (d + f))}, or 0 for a full matrix"
            return [Diagnostic("E340", title, (), (note,), help_, about="predictor_rank")]
        return []

    def _sizes(self, unit: Any) -> tuple[int, int]:
        return unit.width, unit.hidden

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        with rw.together():
            for path in feed_forwards(rw.model):
                words = f"channels that make {100 * self.mass:g}% of a token"
                rw.swap(path, self._block(rw.module(path)), words)

    def _block(self, old: MLP) -> FireMLP:
        given = {name: value for name, value in old.spec().items() if name != "type"}
        more = {"mass": self.mass, "rank": self.predictor_rank, "detached": self.mode == "decoupled"}
        new = FireMLP(**given | more)
        new._modules.update(old._modules)
        return new

    def begin(self, rw: Rewriter, seed: int) -> None:
        """Predictors that begin by letting every channel fire: small weights and a small bias."""
        for path, unit in _blocks(rw.model).items():
            for name in ("fire_in", "fire_out")[0 if unit.rank else 1 :]:
                weight = unit.get_submodule(name).get_parameter("weight")
                drawn = torch.randn(weight.shape, generator=seeded(f"{seed}/{path}.{name}"))
                scale = 1.0 if name == "fire_in" else 0.02
                rw.write(
                    f"{path}.{name}", "weight", (drawn * scale / weight.shape[1] ** 0.5).to(weight.dtype)
                )
            bias = unit.fire_out.get_parameter("bias")
            rw.write(f"{path}.fire_out", "bias", torch.full(bias.shape, 0.1, dtype=bias.dtype))

    def trains(self, model: Model) -> list[str]:
        return parameters(model)

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        units = _blocks(student)
        for unit in units.values():
            unit.told.clear()
            unit.train()
        z = student(batch.ids, step=batch.step)
        told = [unit.told[0] for unit in units.values()]
        for unit in units.values():
            unit.told.clear()
            unit.eval()
        task = cross_entropy(z, batch.labels)
        terms = [F.binary_cross_entropy_with_logits(s.float(), due.float()) for s, due in told]
        right = torch.stack([((s > 0) == due).float().mean() for s, due in told]).mean()
        fire = torch.stack(terms).mean()
        return {"total": task + fire, "task": task.detach(), "fire": fire.detach(), "right": right.detach()}

    def measure(self, model: Model, data: Data) -> Mapping[str, Any]:
        """On held-out text: the share of channels that fire, of those that should, and FLOPs a token."""
        batch = data.batch("heldout", range(min(SEEN, data.size("heldout"))))
        due = estimate(model, self.mass, batch)
        fired: dict[str, float] = {}

        def watch(path: str, unit: FireMLP) -> Any:
            def leave(_: Any, __: Any, z: Tensor) -> None:
                fired[path] = float((z > 0).double().mean())

            return unit.fire_out.register_forward_hook(leave)

        handles = [watch(path, unit) for path, unit in _blocks(model).items()]
        again = data.batch("heldout", range(min(SEEN, data.size("heldout"))))
        with counting(model, ATTENDED) as spent:
            model(again.ids, step=again.step)
        for handle in handles:
            handle.remove()
        return {
            "fires": sum(fired.values()) / max(1, len(fired)),
            "should_fire": due,
            "flops_spent": spent.flops_per_token,
        }

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq)


def estimate(model: Model, mass: float, batch: Batch) -> float:
    """The share of channels that should fire in a model, masked or not, on real tokens."""
    found: list[Tensor] = []
    paths = [path for path, unit in model.units() if isinstance(unit, MLP) and path.endswith(".mlp")]
    real = batch.step.key_mask
    keep = torch.ones_like(batch.ids, dtype=torch.bool) if real is None else real

    def watch(path: str) -> Any:
        unit: Any = model.module(path)

        def enter(_: Any, args: tuple[Tensor, ...]) -> None:
            inner = unit.inner(args[0]) if isinstance(unit, FireMLP) else None
            if inner is not None:
                found.append(should_fire(inner[keep], mass).double().mean())

        def read(_: Any, args: tuple[Tensor, ...]) -> None:
            found.append(should_fire(args[0][keep], mass).double().mean())

        if isinstance(unit, FireMLP):
            return unit.register_forward_pre_hook(enter)
        return unit.down.register_forward_pre_hook(read)

    handles = [watch(path) for path in paths]
    try:
        with torch.no_grad():
            model(batch.ids, step=batch.step)
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.stack(found).mean()) if found else 0.0


def _blocks(model: Model) -> dict[str, FireMLP]:
    return {path: unit for path, unit in model.units() if isinstance(unit, FireMLP)}
