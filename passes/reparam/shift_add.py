"""Write weights as planes of signs times powers of two, so that products become shifts and additions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from annotated_types import Gt
from pydantic import Field, model_validator
from torch import Tensor, nn

from effc.compiler.blocks.planes_linear import PlanesLinear
from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.cost import count
from effc.compiler.method import DataRef, Work
from effc.compiler.model import Model
from effc.compiler.planes import pack_signs
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Calibrate, Statistic
from effc.passes._dense import finite, inputs_of, matrix
from effc.passes._moment import Moment
from effc.passes.quantize._solve import factor, output_error
from effc.passes.reparam._linears import dtype_of, not_shared, not_single, with_bias
from effc.passes.reparam._planes import Form, score, solve
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.paper import Paper
from effc.specs.units import Bits, Unit

EIGHTH = 8
"""Runs of rows, and columns in a run, of `layout = block8`."""


class ShiftAdd(Selects, Calibrate):
    """Replace W by sum_k a_k b_k, b_k signs and a_k sums of powers of two that a group of weights shares.

    Scales: from b = sign(rest), a = mean |rest| on, `rounds` turns of a = least squares, rounded to what is
    stored, and b = the nearest of the 2^bits sums. Outputs: column after column, (w_j - w'_j) / U_jj goes
    into the columns still to come, with U as in quantize.gptq. layout = column: each input has its own
    scales, for `group` rows; row: each output, for `group` columns; block8: 8 columns of an eighth of the
    rows. With `budget`, every weight has the least of `choices` and those that suffer most more: suffering is
    ||V||_F std(V)^2 with V = W / diag U, and `mlp_weight` a factor on it that the source leaves open.

    Use when: 2 or 3 bits must do, without training; at 4 bits scale = fp16 or apot2 is closer.
    Costs:    as quantize.gptq, and the rounds of every group. Stored: bits + 8 bits terms / group a weight.
              No processor is faster for shifts: size and energy shrink, and time as of other packed weights.
    """

    paper = Paper(
        "ShiftAddLLM: Accelerating Pretrained LLMs via Post-Training Multiplication-Less Reparameterization",
        arxiv="2406.05981",
        year=2024,
        section="4",
    )
    contract = Contract(LOSSY, needs=(Fact("dense", "select"),), gives=(Fact("planes", "select"),))
    examples = (
        "reparam.shift_add(data = code, bits = 3, samples = 8)",
        'reparam.shift_add(data = code, bits = 2, layout = block8, samples = 8, select = ["mlp"])',
        "reparam.shift_add(metric = weight, bits = 4, layout = row, group = 16, scale = apot2, terms = 2)",
        "reparam.shift_add(data = code, choices = [2, 3], budget = 2.8 bits, samples = 8, rounds = 4)",
    )
    overrides = ("bits", "layout", "group", "scale", "terms")

    data: DataRef | None = Field(default=None, description="calibration sequences, for metric = activation")  # type: ignore[assignment]
    bits: Annotated[int, Unit("bits")] = Field(default=3, ge=1, le=4, description="planes of signs")
    layout: Literal["column", "block8", "row"] = Field(
        default="column", description="which weights share scales"
    )
    group: Annotated[int, Gt(0)] | Literal["all"] = Field(
        default="all", description="rows of a column, or columns of a row, that share scales"
    )
    scale: Literal["pow2", "apot2", "fp16"] = Field(
        default="pow2", description="a power of two, a sum of `terms`, or half precision"
    )
    terms: int = Field(default=1, ge=1, le=3, description="powers of two in a scale, of apot2")
    rounds: int = Field(default=50, ge=0, description="most turns of scales and signs; 0: the greedy start")
    metric: Literal["activation", "weight"] = Field(
        default="activation", description="what should stay close: outputs, or weights alone"
    )
    damp: Annotated[float, Unit("share")] = Field(
        default=0.01, gt=0, le=0.1, description="added to the diagonal of H, as a share of its mean"
    )
    act_order: bool = Field(default=True, description="take columns by falling diagonal of H")
    choices: tuple[int, ...] = Field(default=(), description="bits that `budget` chooses among")
    budget: Bits | None = Field(
        default=None, description="average stored bits a weight, scales included; none: `bits` everywhere"
    )
    mlp_weight: float = Field(default=1.0, gt=0, description="factor on what weights of an mlp suffer")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if (self.metric == "activation") == (self.data is None):
            word = "needs calibration sequences" if self.data is None else "goes without data"
            raise ValueError(f"metric = {self.metric} {word}")
        if (self.terms > 1) != (self.scale == "apot2"):
            raise ValueError("apot2 has 2 or 3 terms, every other scale one")
        if self.layout == "block8" and self.group != "all":
            raise ValueError(
                "block8 shares scales over 8 columns of an eighth of the rows; leave `group` out"
            )
        if bool(self.choices) != (self.budget is not None):
            raise ValueError("choices and budget go together")
        if self.choices and not all(1 <= bits <= 4 for bits in self.choices):
            raise ValueError(f"choices are 1 to 4 bits, not {', '.join(map(str, self.choices))}")
        if self.choices and self.metric == "weight":
            raise ValueError("what suffers is seen on data; write metric = activation")
        return self

    @property
    def at_most(self) -> bool:
        return self.budget is not None

    @property
    def foresees(self) -> bool:
        return self.budget is not None

    def form(self, module: nn.Module, bits: int | None = None) -> Form:
        """How the weight of a linear is written."""
        rows, columns = matrix(module).shape
        whole = rows if self.layout == "column" else columns
        group = whole if self.group == "all" else self.group
        down, across = {
            "column": (group, 1),
            "row": (1, group),
            "block8": (rows // EIGHTH, EIGHTH),
        }[self.layout]
        most = max(self.choices) if self.choices else self.bits
        terms = 0 if self.scale == "fp16" else self.terms
        return Form(bits or most, down, across, self.scale, terms, self.rounds)

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        targets = self.targets(model)
        help_ = "write planes before the stage that ties, or leave these modules out with `except`"
        found = [
            *not_single(self.kind, "rewrite", model, targets),
            *not_shared(self.kind, "rewrite", model, targets, help_),
        ]
        return found or [*self._undivided(model, targets), *self._over_budget(model, targets)]

    def _undivided(self, model: Model, targets: Mapping[str, ShiftAdd]) -> Iterator[Diagnostic]:
        for path, method in targets.items():
            rows, columns = matrix(model.module(path)).shape
            if method.layout == "block8" and (rows % EIGHTH or columns % EIGHTH):
                yield Diagnostic(
                    "E321",
                    f"blocks of 8 columns and an eighth of the rows do not divide {path} [{rows}, {columns}]",
                    help="use layout = column, or leave the module out with `except`",
                    about="layout",
                )
                return
            whole, word = (rows, "rows") if method.layout == "column" else (columns, "columns")
            group = method.group
            if isinstance(group, int) and whole % group:
                fits = [n for n in range(1, whole + 1) if whole % n == 0]
                near = sorted(n for _, n in sorted((abs(n - group), n) for n in fits)[:3])
                yield Diagnostic(
                    "E321",
                    f"groups of {group} do not divide the {whole} {word} of {path}",
                    help=f"use {', '.join(map(str, near))} or all",
                    about="group",
                )
                return

    def _over_budget(self, model: Model, targets: Mapping[str, ShiftAdd]) -> Iterator[Diagnostic]:
        if self.budget is None:
            return
        sizes = [matrix(model.module(path)).numel() for path in targets]
        least = sum(self._stored(model.module(p), min(self.choices)) for p in targets) / sum(sizes)
        if least > self.budget:
            yield Diagnostic(
                "E325",
                f"{min(self.choices)} bits everywhere take {least:.2f} bits a weight, above the budget",
                notes=("scales are counted",),
                help=f"raise the budget to {least + 0.005:.2f} bits, or share scales among more weights",
                about="budget",
            )

    def _stored(self, module: nn.Module, bits: int) -> int:
        """Bits that a weight [o, i] takes with its scales."""
        unit = self._blank(module, bits)
        return 8 * (unit.signs.numel() + unit.scales.nbytes)

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        with rw.together():
            for path, method in self.targets(rw.model).items():
                rw.swap(path, method._blank(rw.module(path)))

    def watch(self, rw: Rewriter, paths: Sequence[str]) -> list[str]:
        return list(paths) if self.metric == "activation" else []

    def start(self, rw: Rewriter, path: str) -> Statistic:
        return Moment(inputs_of(rw.module(path)))

    def foresee(
        self, rw: Rewriter, paths: Sequence[str], seen: Mapping[str, Statistic]
    ) -> Mapping[str, float]:
        """What each of a layer's weights suffers from few bits."""
        found = {}
        for path in paths:
            c, _ = self._moment(path, seen)
            w = matrix(rw.module(path)).float()
            within = self.mlp_weight if rw.role(path).within("mlp") else 1.0
            found[path] = score(w, _root(path, c, self.damp, None)) * within
        return found

    def settled(self, model: Model, seen: Mapping[str, float]) -> Self:
        """Bits as rules: those that suffer most are given more, as long as the budget holds."""
        assert self.budget is not None
        modules = {path: model.module(path) for path in seen}
        low, *higher = sorted(set(self.choices))
        bits = dict.fromkeys(seen, low)
        left = self.budget * sum(matrix(m).numel() for m in modules.values())
        left -= sum(self._stored(module, low) for module in modules.values())
        for more in higher:
            for path in sorted(seen, key=lambda p: -seen[p]):
                extra = self._stored(modules[path], more) - self._stored(modules[path], bits[path])
                if extra <= left:
                    left -= extra
                    bits[path] = more
        rules = (*self.rules, *({"on": _selector(path), "bits": number} for path, number in bits.items()))
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**fields, "rules": rules, "choices": (), "budget": None})

    def rewrite_layer(
        self, rw: Rewriter, paths: Sequence[str], seen: Mapping[str, Statistic]
    ) -> Mapping[str, float]:
        targets = self.targets(rw.model)
        roots: dict[int, Tensor] = {}
        errors: dict[str, float] = {}
        for path in paths:
            module, method = rw.module(path), targets[path]
            finite(path, w := matrix(module))
            w = w.float()
            c = u = order = None
            if self.metric == "activation":
                c, moment = self._moment(path, seen)
                order = c.diagonal().argsort(descending=True, stable=True) if self.act_order else None
                if moment not in roots:  # q, k and v see one input
                    roots = {moment: _root(path, c, self.damp, order)}
                u = roots[moment]
            unit = method._blank(module)
            signs, scales, rounded = solve(w, u, method.form(module), order)
            unit.signs, unit.scales = pack_signs(signs), scales
            errors[path] = output_error(w, rounded, torch.eye(w.shape[1]) if c is None else c)
            rw.swap(path, unit, f"{unit.planes} planes, {unit.scales.numel()} scales")
        return errors

    def _moment(self, path: str, seen: Mapping[str, Statistic]) -> tuple[Tensor, int]:
        """E[x x^T] of a module's inputs and its number. Raises EffcError E421 when none was seen."""
        moment = seen.get(path)
        if not isinstance(moment, Moment) or not moment.rows:
            raise EffcError(
                Diagnostic(
                    "E421",
                    f"{path} never ran on the calibration data",
                    help="use other data or more samples, or leave the module out with `except`",
                    about="data",
                )
            )
        return moment.mean(), id(moment)

    def _blank(self, module: nn.Module, bits: int | None = None) -> PlanesLinear:
        """An empty unit for a linear; it keeps the bias."""
        rows, columns = matrix(module).shape
        form = self.form(module, bits)
        unit = PlanesLinear(
            in_features=columns,
            out_features=rows,
            planes=form.planes,
            down=rows // form.down,
            across=columns // form.across,
            terms=form.terms,
            bias=module._parameters.get("bias") is not None,
            dtype=dtype_of(module),
        )
        return with_bias(unit, module)

    def work(self, model: Model, seq: int = 0) -> Work:
        tokens = self.samples * seq
        total = Work(2.0 * tokens * count(model, seq // 2).flops_per_token)
        for path in self.targets(model):
            rows, inputs = matrix(model.module(path)).shape
            planes = self.bits if not self.choices else max(self.choices)
            turns = 3.0 * (1 + self.rounds) * rows * inputs * (planes + 2**planes)
            solving = 2.0 * rows * inputs**2 + inputs**3 if self.metric == "activation" else 0.0
            squares = 2.0 * tokens * inputs**2 if self.metric == "activation" else 0.0
            held = 4 * (2 * inputs**2 + (4 + planes) * rows * inputs)
            total += Work(solve=solving + turns, exact=squares, memory=held)
        return total


def _selector(path: str) -> str:
    """layers.3.mlp.up -> layers[3].mlp.up"""
    return re.sub(r"^layers\.(\d+)", r"layers[\1]", path)


def _root(path: str, c: Tensor, damp: float, order: Tensor | None) -> Tensor:
    """U of inv(H), in order. Raises EffcError E422 when no damping makes H invertible."""
    found = factor(c, damp, order)
    if found is None:
        raise EffcError(
            Diagnostic(
                "E422",
                f"the inputs of {path} give a matrix that cannot be inverted",
                notes=("damping up to 0.1 of its mean was tried",),
                help="use more samples, or leave the module out with `except`",
                about="damp",
            )
        )
    return found[0]
