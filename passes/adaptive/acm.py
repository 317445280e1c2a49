"""Let each token take as much of a module as it needs: small learners in its place, and gates that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from effc.compiler.blocks.acm import ACM
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.mlp import MLP
from effc.compiler.blocks.unit import Unit
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.losses import cross_entropy
from effc.compiler.method import Batch, Data, Work
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Train
from effc.compiler.spent import counting
from effc.compiler.trained import parameters, training_work
from effc.passes._dense import shared, some
from effc.passes.moe._ffn import seeded
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Share

PARTS = {"ffn": "mlp", **{name: f"attention.{name}" for name in "qkvo"}}
"""Name of a target -> its path in a layer."""


class Adaptive(Train):
    """Replace modules by N learners, y_k = sum_{j <= k} learner_j(x), and let a gate choose k for each token.

    A learner is a plain feed-forward net; N of them cost what the module costs. Phase 1, `distil` of the
    steps: mean_k |y_k - y|^2 / |y|^2 against the module's own output y on its own input. Phase 2, `gating` of
    them: gates learn the smallest k behind which a further learner would improve the error by less than
    `error_factor` (e_k / e_{k+1}). Phase 3: the whole model, with k drawn by a straight-through Gumbel
    softmax, on loss + lambda_budget |cost - budget| - lambda_entropy H - lambda_diverse S: cost the share of
    the learners' work that is done, H the entropy of the gates, S the mean distance of a token's cost from
    the mean. k may be 0 where a residual is added (ffn, o), 1 at least for q, k and v (effc's reading).

    Use when: tokens differ in how much they need, and data like the model's own are at hand.
    Costs:    quality, by the budget. A plan counts the budget, `spent(data)` what was done. There is no
              kernel for learners yet, so torch runs them, one after another, on the tokens that take them.
    """

    paper = Paper(
        "Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference",
        arxiv="2312.10193",
        year=2023,
        section="3",
    )
    contract = Contract(TRAIN, needs=(Fact("dense", "model"),), keeps=(Fact("dense", "model"),))
    remembers = True
    examples: ClassVar[tuple[str, ...]] = (
        "adaptive.acm(data = code, steps = 4, batch = 2)",
        'adaptive.acm(data = code, targets = ["ffn"], learners = 3, budget = 50%, steps = 3, batch = 2)',
    )

    learners: int = Field(default=4, ge=2, le=64, description="N: learners in place of each module")
    targets: tuple[str, ...] = Field(
        default=("ffn", "q", "k", "v", "o"), min_length=1, description="modules to replace: ffn, q, k, v, o"
    )
    gate_hidden: int = Field(default=16, ge=1, description="hidden width of a gate")
    error_factor: float = Field(default=1.2, gt=1, description="least gain that a further learner must bring")
    budget: Share = Field(default=0.6, gt=0, description="share of the learners' work to aim at")
    lambda_budget: float = Field(default=0.1, ge=0, description="weight of the distance from the budget")
    lambda_entropy: float = Field(default=0.05, ge=0, description="weight of the gates' entropy")
    lambda_diverse: float = Field(default=0.05, ge=0, description="weight of the spread of costs over tokens")
    tau: float = Field(default=0.8, gt=0, description="temperature of the Gumbel softmax")
    distil: Share = Field(default=0.5, description="share of the steps of phase 1")
    gating: Share = Field(default=0.2, description="share of the steps of phase 2")

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if odd := [name for name in self.targets if name not in PARTS]:
            raise ValueError(f"{odd[0]} is no target; there are {', '.join(PARTS)}")
        if self.budget < 1 / self.learners:
            raise ValueError(f"budget {self.budget:g} is less than one learner of {self.learners}")
        if self.distil + self.gating > 1:
            raise ValueError("distil and gating are more than all steps together")
        return self

    def places(self, model: Model) -> list[str]:
        """Paths of the modules that are replaced."""
        tails = {PARTS[name] for name in self.targets}
        found = [path for path, _ in model.units() if path.startswith("layers.")]
        return [path for path in found if path.split(".", 2)[2] in tails]

    def turn(self, step: int) -> str:
        """The phase of a step: `distil`, `gates` or `whole`."""
        done = step / self.steps
        return "distil" if done < self.distil else "gates" if done < self.distil + self.gating else "whole"

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        return list(self._unfit(model))

    def _unfit(self, model: Model) -> Iterator[Diagnostic]:
        units: dict[str, Any] = {path: model.module(path) for path in self.places(model)}
        if not units:
            note = f"no layer has {', '.join(PARTS[name] for name in self.targets)}"
            title = f"`{self.kind}` finds no module to replace"
            yield Diagnostic("E320", title, (), (note,), "use a transformer")
            return
        leaves = {
            inner if not tail else f"{inner}.{tail}": leaf
            for inner, unit in units.items()
            for tail, leaf in unit.named_modules()
            if isinstance(leaf, Unit) and not list(leaf.children())
        }
        odd = [path for path, leaf in leaves.items() if type(leaf) is not Linear]
        odd += [path for path, unit in units.items() if type(unit) not in (Linear, MLP) and path not in odd]
        if odd:
            types = sorted({type(model.module(path)).__name__ for path in odd})
            help_ = "put this stage before the one that made them, or fold them first"
            note = f"{some(odd)}: {', '.join(types)}"
            yield Diagnostic("E323", f"`{self.kind}` replaces dense modules", (), (note,), help_)
            return
        if tied := [path for path in leaves if path in shared(model)]:
            note = f"{some(tied)} {'share' if len(tied) > 1 else 'shares'} weights with other layers"
            title = f"`{self.kind}` cannot replace modules that share weights"
            yield Diagnostic("E341", title, (), (note,), "put this stage before the one that ties")
        hidden = {path: unit.hidden for path, unit in units.items() if isinstance(unit, MLP)}
        for path, width in hidden.items():
            if width % self.learners:
                fits = [n for n in range(2, 17) if width % n == 0]
                title = f"{width} channels of {path} do not divide into {self.learners} learners"
                help_ = f"use learners in {{{', '.join(map(str, fits))}}}"
                yield Diagnostic("E331", title, help=help_, about="learners")
                return

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        with rw.together():
            for path in self.places(rw.model):
                old = rw.module(path)
                new = self._block(path, old)
                rw.swap(path, new, f"{self.learners} learners of width {new.hidden}")

    def _block(self, path: str, old: Linear | MLP) -> ACM:
        flops = sum(u.flops(0) for u in old.modules() if isinstance(u, Unit))
        inputs, outputs, dtype = (
            (old.width, old.width, old.dtype)
            if isinstance(old, MLP)
            else (old.in_features, old.out_features, old.dtype)
        )
        biased = old.bias if isinstance(old, MLP) else old.bias is not None
        return ACM(
            in_features=inputs,
            out_features=outputs,
            learners=self.learners,
            hidden=max(1, flops // (2 * (inputs + outputs) * self.learners)),
            gate_hidden=self.gate_hidden,
            fewest=0 if path.endswith((".mlp", ".o")) else 1,
            budget=self.budget,
            tau=self.tau,
            bias=bool(biased),
            dtype=dtype,
        )

    def begin(self, rw: Rewriter, seed: int) -> None:
        """Weights normal, of deviation 1 / sqrt(inputs), those that are summed over learners smaller; biases
        zero.
        """
        for path, unit in _modules(rw.model).items():
            for name, tensor in list(unit.named_parameters()):
                inner, _, slot = f"{path}.{name}".rpartition(".")
                value = torch.zeros(tensor.shape)
                if tensor.dim() > 1:
                    dice = seeded(f"{seed}/{path}.{name}")
                    value = torch.randn(tensor.shape, generator=dice) / tensor.shape[-1] ** 0.5
                    value = value / self.learners**0.5 if "learners_out" in name else value
                rw.write(inner, slot, value.to(tensor.dtype))

    def trains(self, model: Model) -> list[str]:
        return parameters(model)

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Mapping[str, Tensor]:
        turn = self.turn(batch.at)
        if turn == "whole":
            return self._whole(student, batch)
        units = _modules(student)
        seen = _seen(teachers["before"], list(units), batch)
        terms = [
            self._distilled(units[path], *seen[path])
            if turn == "distil"
            else self._gated(units[path], *seen[path])
            for path in units
        ]
        total = torch.stack(terms).mean()
        return {"total": total, "task": torch.zeros_like(total), "cost": torch.zeros_like(total)}

    def _distilled(self, unit: ACM, x: Tensor, y: Tensor) -> Tensor:
        """mean over k >= 1 of |y_k - y|^2, in parts of |y|^2; x [n, i], y [n, o]."""
        gap = unit.sums(x)[:, 1:] - y.unsqueeze(1)
        return gap.float().square().mean() / y.float().square().mean().clamp(min=1e-12)

    def _gated(self, unit: ACM, x: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of the numbers of learners that x [n, i] is worth."""
        with torch.no_grad():
            gap = (unit.sums(x) - y.unsqueeze(1)).float().square().mean(-1)
            due = worth(gap, self.error_factor).clamp(min=unit.fewest)
        return F.cross_entropy(unit.scores(x), due)

    def _whole(self, student: Model, batch: Batch) -> Mapping[str, Tensor]:
        units = _modules(student)
        for unit in units.values():
            unit.train()
            unit.told.clear()
        z = student(batch.ids, step=batch.step)
        weights = torch.tensor([float(u.learners * u.learner_flops()) for u in units.values()])
        ran = [u.told[0] @ torch.arange(u.learners + 1.0) / u.learners for u in units.values()]
        costs = (torch.stack(ran) * (weights / weights.sum())[:, None]).sum(0)
        mean = torch.stack([u.told[0].mean(0) for u in units.values()])
        entropy = -(mean * mean.clamp(min=1e-9).log()).sum(-1).mean()
        for unit in units.values():
            unit.told.clear()
            unit.eval()
        task = cross_entropy(z, batch.labels)
        gap, spread = (costs.mean() - self.budget).abs(), (costs - costs.mean()).abs().mean()
        total = task + self.lambda_budget * gap - self.lambda_entropy * entropy - self.lambda_diverse * spread
        return {"total": total, "task": task.detach(), "cost": costs.mean().detach()}

    def measure(self, model: Model, data: Data) -> Mapping[str, Any]:
        """On held-out text: the share of the learners' work that was done, and FLOPs a token."""
        units = _modules(model)
        batch = data.batch("heldout", range(min(16, data.size("heldout"))))
        rows = {path: 0 for path in units}

        def count(path: str) -> Any:
            def enter(_: Any, args: tuple[Tensor, ...]) -> None:
                rows[path] += len(args[0])

            return units[path].learners_in.register_forward_pre_hook(enter)

        handles = [count(path) for path in units]
        with counting(model, ATTENDED) as spent:
            model(batch.ids, step=batch.step)
        for handle in handles:
            handle.remove()
        share = {path: n / (batch.ids.numel() * units[path].learners) for path, n in rows.items()}
        weights = {path: u.learners * u.learner_flops() for path, u in units.items()}
        done = sum(share[path] * weights[path] for path in units) / max(1, sum(weights.values()))
        return {"shares": share, "cost": done, "flops_spent": spent.flops_per_token}

    def work(self, model: Model, seq: int = 0) -> Work:
        return training_work(self, model, seq, teachers=1, teacher=model)


def worth(errors: Tensor, factor: float) -> Tensor:
    """errors e_0 .. e_N [n, N + 1] -> the least k with e_k / e_{k+1} < factor [n]; N where there is none."""
    enough = errors[:, :-1] < factor * errors[:, 1:]
    last = torch.ones_like(enough[:, :1])
    return torch.cat((enough, last), 1).int().argmax(1)


def _modules(model: Model) -> dict[str, ACM]:
    return {path: unit for path, unit in model.units() if isinstance(unit, ACM)}


def _seen(model: Model, paths: Sequence[str], batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """What enters and leaves modules of a model on real tokens: x [n, i], y [n, o]."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    real = batch.step.key_mask
    keep = torch.ones_like(batch.ids, dtype=torch.bool) if real is None else real

    def watch(path: str) -> Any:
        def leave(_: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            found[path] = args[0][keep].detach(), y[keep].detach()

        return model.module(path).register_forward_hook(leave)

    handles = [watch(path) for path in paths]
    try:
        with torch.no_grad():
            model(batch.ids, step=batch.step)
    finally:
        for handle in handles:
            handle.remove()
    return found
