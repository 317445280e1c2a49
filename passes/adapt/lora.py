"""Train a low-rank change beside frozen weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from effc.compiler.auxiliary import answered, total
from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.quant_linear import QuantLinear
from effc.compiler.contract import TRAIN, Contract, Fact
from effc.compiler.losses import cross_entropy
from effc.compiler.method import Batch, Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Train
from effc.compiler.trained import training_work
from effc.passes._dense import shared, some
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Share


class Lora(Selects, Train):
    """Learn y = W x + s B A x with W frozen, A [rank, in] random and B [out, rank] zero, s = alpha / rank.

    At the start the change is zero, so the function is the model's; `adapt.fold` adds it to W at the end.

    Use when: few numbers should be trained or published, or the weights are packed.
    Costs:    rank (in + out) numbers and twice as many FLOPs a token for each weight, until folded.
    """

    paper = Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models", arxiv="2106.09685", year=2021, section="4.1"
    )
    contract = Contract(
        TRAIN,
        gives=(Fact("adapter", "select"),),
        keeps=tuple(Fact(name, "select") for name in ("packed", "sparse", "sparse_2_4", "sparse_4_8")),
    )
    examples: ClassVar[tuple[str, ...]] = (
        "adapt.lora(data = code, steps = 3, batch = 2)",
        'adapt.lora(data = code, steps = 2, batch = 2, rank = 2, select = ["attention.q", "attention.v"])',
    )
    overrides: ClassVar[tuple[str, ...]] = ("rank", "alpha")

    rank: int = Field(default=8, ge=1, description="inner width of the change")
    alpha: float = Field(default=16.0, gt=0, description="strength of the change, as if trained at rank 1")
    scaling: Literal["rank", "sqrt_rank"] = Field(
        default="rank", description="s = alpha / rank, or / sqrt(rank)"
    )
    dropout: Share = Field(
        default=0.0, ge=0, lt=1, description="share of inputs hidden from the change in training"
    )

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        for path, method in self.targets(rw.model).items():
            unit = LoraLinear.over(rw.module(path), method.rank, method.alpha, method.scaling, method.dropout)
            rw.swap(path, unit, f"rank {method.rank}")

    def begin(self, rw: Rewriter, seed: int) -> None:
        """A uniform in +-1 / sqrt(in), from the seed and the path; B zero."""
        for path in self.targets(rw.model):
            unit = rw.module(path)
            digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
            dice = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            a = (torch.rand(unit.a.shape, generator=dice) * 2 - 1) / unit.in_features**0.5
            rw.write(path, "a", a.to(unit.a.dtype))
            rw.write(path, "b", torch.zeros(unit.b.shape, dtype=unit.b.dtype))

    def trains(self, model: Model) -> list[str]:
        return [f"{path}.{name}" for path in self.targets(model) for name in ("a", "b")]

    def loss(self, student: Model, teachers: Mapping[str, Model], batch: Batch) -> Mapping[str, Tensor]:
        if self.dropout:
            student.train()
        z, more = answered(student, batch)
        return total(cross_entropy(z, batch.labels), more)

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        """Each problem once, with the modules that have it."""
        found: dict[str, list[str]] = {}
        notes: dict[str, tuple[str, str]] = {}
        high: dict[str, tuple[int, int]] = {}
        ties = shared(model)
        for path, method in self.targets(model).items():
            module = model.module(path)
            if isinstance(module, LoraLinear):
                problem = ("has an adapter already", "fold it first with adapt.fold, or leave the module out")
            elif not isinstance(module, Linear | QuantLinear):
                problem = (f"is {type(module).__name__}, not a linear", f'write except = ["{path}"]')
            elif path in ties:
                problem = ("shares its weight with another module", f'write except = ["{path}"]')
            elif method.rank > (limit := min(module.in_features, module.out_features)):
                high[path] = limit, method.rank
                continue
            else:
                continue
            found.setdefault(problem[0], []).append(path)
            notes[problem[0]] = problem
        return [
            *self._high_ranks(high),
            *(
                Diagnostic(
                    "E320",
                    f"`{self.kind}` cannot adapt {some(paths)}",
                    notes=(f"it {problem}",),
                    help=notes[problem][1],
                )
                for problem, paths in found.items()
            ),
        ]

    def _high_ranks(self, limits: Mapping[str, tuple[int, int]]) -> Iterator[Diagnostic]:
        """One diagnostic for all modules whose shorter side is below the rank."""
        if limits:
            least = min(limits, key=limits.__getitem__)
            limit, rank = limits[least]
            yield Diagnostic(
                "E340",
                f"`{self.kind}` cannot adapt {some([least, *(path for path in limits if path != least)])}",
                notes=(f"it takes a rank of at most {limit}, not {rank}",),
                help=f"use rank = {limit} or less",
                about="rank",
            )

    def work(self, model: Model, seq: int = 0) -> Work:
        """No gradient of W is taken, but the small products beside it and their sums cost as much.

        Measured at width 256: a step takes 1.2 to 1.9 times that of adapt.full. That sums and their gradients
        move the input and the output of a module seven times is an estimate.
        """
        full = training_work(self, model, seq)
        linears = [model.module(path) for path in self.targets(model)]
        sides = sum(m.in_features + m.out_features for m in linears if isinstance(m, Linear | QuantLinear))
        tokens = self.steps * self.batch * seq
        return replace(full, traffic=full.traffic + 7.0 * 2 * sides * tokens)
