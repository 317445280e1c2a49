"""Let each token or image use the channels that will matter to it, as a predictor says beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
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
from effc.compiler.trace import TracedModel
from effc.compiler.trained import parameters, training_work
from effc.passes.adaptive._fire_conv import FireConv, FireGate, Predictor
from effc.passes.adaptive._fire_net import (
    Place,
    as_weights,
    image_flops,
    layer_flops,
    places,
    watching,
    wire,
)
from effc.passes.moe._ffn import feed_forwards, seeded
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share

SEEN = 16
"""Held-out sequences that are looked at for the report."""
IMAGES = 256
"""The same for images."""


class FTWT(Train):
    """Mask channels for each image or token, by a predictor that learns which ones will fire.

    In a traced network of convolutions every convolution (its norm and activation with it) gets a mask: of
    a_c = max |out_c| over places, the largest channels should fire until together they have more than `mass`
    of the sum. A linear on the averaged input learns them by binary cross-entropy, added to the loss with
    weight one; its sign is the mask, with the gradient of a sigmoid. Batch norms keep their statistics. In
    feed-forward blocks of transformers a is the input of `down`, and the predictor reads the block's input.
    `decoupled`: the predictor's losses do not reach what lies before it; `joint`: they do. `expected` says
    before a training what an image will cost: the work of channels that should fire in the model as it is.

    Use when: images or tokens differ in the channels that they need, and come one at a time: then rows (of
              convolutions columns too) that do not fire are not read. Several together are masked and save
              nothing yet.
    Costs:    a predictor of C K weights a layer, or r (C + K) with the `predictor_rank` r of effc's own.
              A plan counts all channels, `spent(data)` and `flops_spent` those that fire.
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
    predictor_rank: Count = Field(
        default=0, description="rank r of a predictor; 0, or where it saves nothing: a full matrix"
    )
    pool: int = Field(default=1, ge=1, description="side of the averaged input that is read; of convolutions")
    softmax: bool = Field(default=False, description="take a softmax over that input; of convolutions")

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        sizes = self._sizes(model)
        if not sizes:
            note = "it masks blocks called mlp, and convolutions of traced modules that other layers read"
            title = f"`{self.kind}` finds no dense feed-forward block and no convolution"
            return [Diagnostic("E320", title, (), (note,), "put this stage before the one that changed them")]
        low = [path for path, (d, f) in sizes.items() if not self._saves(d, f)]
        if self.predictor_rank and (len(low) == len(sizes) or not isinstance(model, TracedModel)) and low:
            d, f = max((sizes[path] for path in low), key=prod)
            title = f"a predictor of rank {self.predictor_rank} is no smaller than a full matrix"
            note = f"one reads {d} numbers and tells of {f} channels"
            help_ = f"use a rank of at most {-(-d * f // (d + f)) - 1}, or 0 for a full matrix"
            return [Diagnostic("E340", title, (), (note,), help_, about="predictor_rank")]
        return []

    def _saves(self, inputs: int, channels: int) -> bool:
        """Whether two matrices of the rank are smaller than a full one."""
        return 0 < self.predictor_rank * (inputs + channels) < inputs * channels

    def _sizes(self, model: Model) -> dict[str, tuple[int, int]]:
        """Path of what is masked -> what its predictor reads and how many channels it tells of."""
        found: dict[str, tuple[int, int]] = {}
        for path in feed_forwards(model):
            block: Any = model.module(path)
            found[path] = block.width, block.hidden
        for place in self._places(model):
            conv: Any = model.module(place.convs[0])
            inputs = conv.in_channels * self.pool ** len(conv.kernel_size)
            found[place.convs[0]] = inputs, conv.out_channels
        return found

    def _places(self, model: Model) -> list[Place]:
        return places(model) if isinstance(model, TracedModel) else []

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        with rw.together():
            for path in feed_forwards(rw.model):
                words = f"channels that make {100 * self.mass:g}% of a token"
                rw.swap(path, self._block(rw.module(path)), words)
        sizes = self._sizes(rw.model)
        for place in self._places(rw.model):
            rank = self.predictor_rank if self._saves(*sizes[place.convs[0]]) else 0
            more = {"rank": rank, "detached": self.mode == "decoupled"}
            wire(rw, place, self.mass, pool=self.pool, softmax=self.softmax, **more)

    def _block(self, old: MLP) -> FireMLP:
        given = {name: value for name, value in old.spec().items() if name != "type"}
        more = {"mass": self.mass, "rank": self.predictor_rank, "detached": self.mode == "decoupled"}
        new = FireMLP(**given | more)
        new._modules.update(old._modules)
        return new

    def begin(self, rw: Rewriter, seed: int) -> None:
        """Predictors that begin by letting every channel fire: small weights and a small bias."""
        for path, unit in _predictors(rw.model).items():
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
        units = [m for m in student.gm.modules() if isinstance(m, FireMLP | FireConv | FireGate)]
        masks = [m for m in units if not isinstance(m, FireConv)]
        for mask in masks:
            mask.told.clear()
        for unit in units:
            unit.train()
        z = _answer(student, batch)
        told = [mask.told[0] for mask in masks]
        for mask in masks:
            mask.told.clear()
        for unit in units:
            unit.eval()
        task = cross_entropy(z, batch.labels)
        terms = [F.binary_cross_entropy_with_logits(s.float(), due.float()) for s, due in told]
        right = torch.stack([((s > 0) == due).float().mean() for s, due in told]).mean()
        fire = torch.stack(terms).mean()
        return {"total": task + fire, "task": task.detach(), "fire": fire.detach(), "right": right.detach()}

    def measure(self, model: Model, data: Data) -> Mapping[str, Any]:
        """On held-out data: the share of channels that fire, of those that should, FLOPs a token or image."""
        if isinstance(model, TracedModel):
            return _of_images(model, data.batch("heldout", range(min(IMAGES, data.size("heldout")))))
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

    def expected(self, model: TracedModel, batch: Batch) -> float:
        """FLOPs of an image when all channels fire that should, in the network as it is, on real images.

        Predictors are counted; what a training does to the share that fires is not known here.
        """
        rw = Rewriter(model, self.kind)
        self.outline(rw, ())
        self.begin(rw, 0)
        wired = rw.done()
        assert isinstance(wired, TracedModel)
        with torch.no_grad(), watching(wired, due=True) as due:
            wired(as_weights(wired, batch.ids))
        return float(image_flops(wired, due).mean())

    def work(self, model: Model, seq: int = 0) -> Work:
        work = training_work(self, model, seq)
        if not isinstance(model, TracedModel):
            return work
        images = self.steps * self.batch
        return work + Work(flops=3.0 * images * sum(layer_flops(model).values()))


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


def _answer(model: Model, batch: Batch) -> Tensor:
    """What the loss is of: logits [B, T, V] of tokens, [B, K] of images."""
    if isinstance(model, TracedModel):
        z: Tensor = model(as_weights(model, batch.ids))
        return z
    z = model(batch.ids, step=batch.step)
    return z


def _of_images(model: TracedModel, batch: Batch) -> Mapping[str, Any]:
    """The shares of channels that fire and that should, FLOPs of an image so, and of a whole one."""
    with torch.no_grad():
        with watching(model, due=False) as fired:
            model(as_weights(model, batch.ids))
        with watching(model, due=True) as due:
            model(as_weights(model, batch.ids))
    return {
        "fires": _mean(fired),
        "should_fire": _mean(due),
        "flops_spent": float(image_flops(model, fired).mean()),
        "flops_whole": sum(layer_flops(model).values()),
    }


def _mean(live: Mapping[str, Tensor]) -> float:
    return sum(float(mask.double().mean()) for mask in live.values()) / max(1, len(live))


def _predictors(model: Model) -> dict[str, FireMLP | Predictor]:
    """What holds the weights of a predictor, by path."""
    found = model.gm.named_modules()
    return {path: m for path, m in found if isinstance(m, FireMLP | Predictor)}


def _blocks(model: Model) -> dict[str, FireMLP]:
    return {path: unit for path, unit in model.units() if isinstance(unit, FireMLP)}
