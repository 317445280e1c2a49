"""Round weights and inputs to few bits: what channels of a norm need moves into it and its readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.coded_attention import CodedAttention, Curve
from effc.compiler.blocks.coded_linear import CodedLinear, on_grid
from effc.compiler.blocks.linear import Linear
from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.cost import count
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Calibrate, Statistic
from effc.passes._dense import finite, inputs_of, not_dense
from effc.passes.quantize._fed import (
    Fed,
    attending,
    feeding,
    unfit_attention,
    unfit_linears,
    unfit_norms,
)
from effc.passes.quantize._one_grid import into_norm, into_readers, one_grid, outline_readers, reader
from effc.passes.quantize._ranges import Range, curve_size, cut, grid, learned
from effc.passes.quantize._rebuild import Rounded, rebuilt, to_nearest
from effc.passes.quantize._seen import Heads, Rows, most_rows
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.paper import Paper
from effc.specs.units import Unit

LEARNT = 1024
"""Rows that a learned range is fitted to."""


class RepQuant(Selects, Calibrate):
    """Round inputs to a static grid of each layer, weights to one of each row, probabilities to powers of
    sqrt 2.

    A norm's channels differ too much for one grid, so each gets its own (s, z); then s / mean s and z - round
    mean z move into the norm's gain and bias and into what reads it, and the codes stay as they are on one
    grid (S, Z). Norms without a bias (RMS) take symmetric grids, z = 0. Other inputs, and queries, keys and
    values, have one grid with zero among its points. softmax = log_sqrt2 rounds p to D 2^(-n / 2): a shift,
    and sqrt 2 where n is odd.

    clip = learned: two factors on each range are learned by the error of the layer's output; reconstruct:
    weights make up for the rounding of inputs and of each other. How the source does these two is not known
    in every detail; see _ranges.py and _rebuild.py. Layers run in order, each on what those before give.

    Use when: inputs are to be integers too, with 4 to 8 bits, from some ten sequences or images.
    Costs:    four passes over the data and i^3 for each layer; at 4 bits the loss rises. There is no kernel
              for coded inputs yet, so torch runs the model and speed does not change.
    """

    paper = Paper(
        "RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale "
        "Reparameterization",
        arxiv="2402.05628",
        year=2024,
        section="III",
    )
    contract = Contract(LOSSY, needs=(Fact("dense", "select"),), gives=(Fact("packed", "select"),))
    examples = (
        "quantize.repquant(data = code, weight_bits = 8, act_bits = 8, samples = 8, steps = 2)",
        "quantize.repquant(data = code, samples = 8, clip = percentile, reconstruct = false, softmax = log2)",
        "quantize.repquant(data = code, samples = 8, clip = minmax, ln = layer, softmax = none)",
    )
    overrides: ClassVar[tuple[str, ...]] = ("weight_bits", "act_bits")

    samples: int = Field(default=32, ge=1, description="sequences that are seen; 32 to 1024 are usual")
    weight_bits: Annotated[int, Unit("bits")] = Field(
        default=4, ge=2, le=8, description="bits of a weight's code"
    )
    act_bits: Annotated[int, Unit("bits")] = Field(
        default=4, ge=2, le=8, description="bits of an input's code; the source has 4 and 6"
    )
    ln: Literal["channel_to_layer", "layer"] = Field(
        default="channel_to_layer",
        description="grids behind a norm: of each channel, moved into the norm; or one found for all",
    )
    scheme: Literal["auto", "asymmetric", "symmetric"] = Field(
        default="auto",
        description="whether a norm's channels have zero points; auto: where the norm has a bias for them",
    )
    softmax: Curve = Field(default="log_sqrt2", description="the points that probabilities are rounded to")
    clip: Literal["learned", "percentile", "minmax"] = Field(
        default="learned", description="ranges: learned from the whole one, cut at a percentile, or whole"
    )
    steps: int = Field(default=100, ge=1, description="steps in which a range is learned")
    rate: float = Field(default=0.1, gt=0, le=1, description="learning rate of a range's factors")
    reconstruct: bool = Field(default=True, description="fit weights to the rounded inputs of their layer")
    damp: Annotated[float, Unit("share")] = Field(
        default=0.01, gt=0, le=0.1, description="added to the diagonal of x^T x, as a share of its mean"
    )

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        targets = self.targets(model)
        found = list(not_dense(self.kind, "quantize", model, targets))
        if found:
            return found
        found += unfit_linears(self.kind, model, targets)
        if self.softmax != "none":
            found += unfit_attention(self.kind, model, targets)
        if self.ln == "channel_to_layer":
            found += unfit_norms(self.kind, model, targets, self.scheme)
        return found

    # -- structure

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        targets = self.targets(rw.model)
        fed = feeding(rw.model, targets) if self.ln == "channel_to_layer" else []
        moved = {path for one in fed if self._shifts(rw, one) for path in (*one.chosen, *one.others)}
        blocks = self._blocks(rw.model, targets)
        with rw.together():
            for one in fed:
                if self._shifts(rw, one):
                    outline_readers(rw, one.others)
            for path, method in targets.items():
                rw.swap(path, method.coded(rw.module(path), path in moved))
            for path in blocks:
                rw.swap(path, self._attention(rw.module(path), targets[f"{path}.q"].act_bits))

    def _shifts(self, rw: Rewriter, one: Fed) -> bool:
        """Whether zero points of a norm's channels move into its bias."""
        return self.scheme != "symmetric" and rw.module(one.norm).bias is not None

    def _blocks(self, model: Model, targets: Mapping[str, RepQuant]) -> list[str]:
        """Attention blocks whose products are of codes; with softmax = none, those that are of that kind."""
        return [b for b in attending(model, targets) if type(model.module(b)) is Attention]

    def coded(self, old: Linear, biased: bool) -> CodedLinear:
        """An empty unit in the place of a linear; `biased`: with a bias, whether or not the old one has."""
        bias = biased or old.bias is not None
        unit = CodedLinear(
            in_features=old.in_features,
            out_features=old.out_features,
            bits=self.weight_bits,
            group=old.in_features,
            input_bits=self.act_bits,
            symmetric=False,
            bias=bias,
            dtype=old.dtype,
        )
        if old.bias is not None:
            unit.bias = old.bias
        return unit

    def _attention(self, old: Attention, bits: int) -> CodedAttention:
        form = {key: value for key, value in old.spec().items() if key != "type"}
        new = CodedAttention(curve=self.softmax, bits=bits, **form)
        for name, child in old.named_children():
            new._modules[name] = child
        return new

    # -- calibration

    def watch(self, rw: Rewriter, paths: Sequence[str]) -> list[str]:
        return [*self._blocks(rw.model, {p: self for p in paths}), *paths]

    def start(self, rw: Rewriter, path: str) -> Statistic:
        module = rw.module(path)
        return Heads() if isinstance(module, Attention) else Rows(inputs_of(module))

    def rewrite_layer(
        self, rw: Rewriter, paths: Sequence[str], seen: Mapping[str, Statistic]
    ) -> Mapping[str, float]:
        targets = {p: m for p, m in self.targets(rw.model).items() if p in paths}
        if absent := [p for p in paths if p not in seen]:
            raise EffcError(
                Diagnostic(
                    "E421",
                    f"`{absent[0]}` was never run on the calibration data",
                    help="leave it out with `except`",
                )
            )
        for path in paths:
            finite(path, rw.present(path).weight)
        errors: dict[str, float] = {}
        layers = {rw.role(path).layer for path in paths}
        fed = feeding(rw.model, targets, layers) if self.ln == "channel_to_layer" else []
        blocks = self._blocks(rw.model, targets)
        behind = {path for one in fed for path in one.chosen}
        for one in fed:
            errors |= self._behind_norm(rw, one, targets, seen)
        for path, method in targets.items():
            if path not in behind:
                errors |= method._alone(rw, path, seen[path])
        for path in blocks:
            self._attend(rw, path, targets[f"{path}.q"].act_bits, seen[path])
        return errors

    def _behind_norm(
        self, rw: Rewriter, fed: Fed, targets: Mapping[str, RepQuant], seen: Mapping[str, Statistic]
    ) -> dict[str, float]:
        """Linears behind a norm: a grid for each channel, made one."""
        rows, bits = _rows(seen[fed.chosen[0]]), targets[fed.chosen[0]].act_bits
        symmetric = not self._shifts(rw, fed)
        x = rows.sample.whole()
        units = {path: rw.present(path) for path in fed.chosen}
        gram = torch.stack([_gram(unit.weight) for unit in units.values()]).sum(0)
        span = self._range(x, gram, Range(rows.low, rows.high), bits, symmetric)
        one = one_grid(*grid(span, bits, symmetric), bits, symmetric)
        turned = {path: reader(unit, one) for path, unit in units.items()}
        into_readers(rw, fed.others, one)
        into_norm(rw, fed.norm, one)
        y = one.turned(x)
        coded = on_grid(y, one.scale, one.zero, bits)
        return {
            path: targets[path]._put(rw, path, *turned[path], y, coded, one.scale, one.zero) for path in units
        }

    def _alone(self, rw: Rewriter, path: str, statistic: Statistic) -> dict[str, float]:
        """A linear with one grid for all that it reads."""
        rows, unit = _rows(statistic), rw.present(path)
        x = rows.sample.whole()
        whole = Range(rows.low.min().reshape(1), rows.high.max().reshape(1)).with_zero()
        span = self._range(x, _gram(unit.weight), whole, self.act_bits, False)
        scale, zero = grid(span, self.act_bits, False)
        coded = on_grid(x, scale, zero, self.act_bits)
        bias = None if unit.bias is None else unit.bias.detach().double()
        return {path: self._put(rw, path, unit.weight.detach().double(), bias, x, coded, scale, zero)}

    def _range(self, x: Tensor, gram: Tensor, whole: Range, bits: int, symmetric: bool) -> Range:
        if self.clip == "minmax":
            return whole
        if self.clip == "percentile":
            return cut(x, whole, bits, symmetric)
        every = max(1, len(x) // LEARNT)
        return learned(x[::every], gram, whole, bits, symmetric, self.steps, self.rate)

    def _put(
        self,
        rw: Rewriter,
        path: str,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        coded: Tensor,
        scale: Tensor,
        zero: Tensor,
    ) -> float:
        """Round one weight [o, i] for inputs x [n, i] and swap the unit in; returns the outputs' error."""
        found: Rounded
        if self.reconstruct:
            found = rebuilt(weight.float(), x, coded, self.weight_bits, self.damp)
        else:
            found = to_nearest(weight.float(), x, coded, self.weight_bits)
        old = rw.module(path)
        unit = self.coded(old, bias is not None)
        unit.fill(found.q, found.scale, found.zero)
        unit.input_scale, unit.input_zero = scale.clone(), zero.to(torch.int16)
        if bias is not None:
            kept = bias.to(old.weight.dtype)
            unit.bias = torch.nn.Parameter(kept, requires_grad=False)
        rw.swap(path, unit)
        return found.error

    def _attend(self, rw: Rewriter, path: str, bits: int, statistic: Statistic) -> None:
        """Grids of queries, keys, values and probabilities."""
        assert isinstance(statistic, Heads)
        new = self._attention(rw.module(path), bits)
        for name in ("q", "k", "v"):
            numbers = statistic.seen[name]
            whole = Range(torch.tensor([numbers.low]), torch.tensor([numbers.high])).with_zero()
            x = numbers.sample.whole()
            span = whole if self.clip == "minmax" else cut(x, whole, bits, False)
            scale, zero = grid(span, bits, False)
            setattr(new, f"{name}_scale", scale)
            setattr(new, f"{name}_zero", zero.to(torch.int16))
        p = statistic.seen["p"]
        new.p_scale = curve_size(p.sample.whole(), p.high, self.softmax, bits)
        rw.swap(path, new)

    def work(self, model: Model, seq: int = 0) -> Work:
        tokens = self.samples * seq
        flops = 2.5 * tokens * count(model, seq // 2).flops_per_token
        exact, solving, largest, nbytes = 0.0, 0.0, 0, 0
        for path in self.targets(model):
            w = model.module(path).get_parameter("weight")
            rows, inputs = w.shape
            sample = min(tokens, most_rows(inputs))
            exact += 2.0 * sample * inputs * (3 * inputs + 4 * rows) + 2.0 * rows * inputs**2
            if self.clip == "learned":
                exact += 6.0 * self.steps * min(sample, 2 * LEARNT) * inputs**2
            solving += 100.0 * rows * inputs
            if self.reconstruct:
                solving += 2.0 * rows * inputs**2 + 2.0 * inputs**3
            largest = max(largest, 4 * (6 * sample * inputs + 8 * inputs**2 + 6 * rows * inputs))
            nbytes += w.numel() * w.element_size()
        return Work(flops, solving, exact=exact, disk=2 * nbytes, memory=largest)


def _rows(statistic: Statistic) -> Rows:
    assert isinstance(statistic, Rows)
    return statistic


def _gram(weight: Tensor) -> Tensor:
    """W^T W [i, i] float32"""
    wide = weight.detach().float()
    return wide.T @ wide
