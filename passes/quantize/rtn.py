"""Round every weight to the nearest point of a uniform grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from effc.compiler.blocks.quant_linear import WHOLE
from effc.compiler.contract import LOSSY, Contract, Fact
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._dense import finite, inputs_of, matrix
from effc.passes.quantize._grid import fit, fit_least_squares
from effc.passes.quantize._uniform import CHUNK, PackedUnit, Uniform, nearest, packed_unit, place
from effc.specs.paper import FOLKLORE
from effc.specs.units import Unit


class RTN(Uniform, Rewrite):
    """Store w as q with w' = s (q - z), the nearest point of a grid that each group of inputs fits to itself.

    symmetric:  s = max|w| / (2^(b-1) - 1), z = 0
    asymmetric: s = (max(0, w) - min(0, w)) / (2^b - 1), z = round(-min(0, w) / s)

    Inside the range |w - w'| <= s / 2. `clip = mse` shrinks each range to the one of ten with the least
    squared error. Stored bits a weight: b + 16 / group, asymmetric b + (16 + b) / group.

    Use when: you want fewer bytes without data: 8 bits are nearly free, 4 bits in groups are usually fine.
    Costs:    nothing to run; at 3 bits and below the loss rises steeply (see quantize.gptq).
    """

    paper = FOLKLORE
    contract = Contract(
        LOSSY,
        needs=(Fact("dense", "select"),),
        gives=(Fact("packed", "select"),),
        keeps=tuple(
            Fact(name, "select") for name in ("sparse", "sparse_2_4", "sparse_4_8")
        ),  # zero is a code
    )
    examples = (
        "quantize.rtn(bits = 4, group = 16)",
        "quantize.rtn(bits = 8)",
        "quantize.rtn(bits = 3, group = 8, scheme = asymmetric, clip = mse)",
        'quantize.rtn(bits = 4, group = tensor, rules = [{on = "head", bits = 8, group = channel}])',
    )
    streams = True
    overrides: ClassVar[tuple[str, ...]] = (*Uniform.overrides, "clip")

    bits: Annotated[int, Unit("bits")] = Field(default=4, ge=2, le=8, description="bits of a code")
    clip: Literal["none", "mse"] = Field(default="none", description="how the range of a group is chosen")

    def rewrite(self, rw: Rewriter) -> Mapping[str, float]:
        errors: dict[str, float] = {}
        done: set[str] = set()
        ties = rw.model.ties()
        with rw.together():
            for path, method in self.targets(rw.model).items():
                if path not in done:
                    module = rw.module(path)
                    unit = packed_unit(module, method.width(method.bits, inputs_of(module)))
                    errors |= method.round_into(unit, path, matrix(rw.present(path)))
                    done |= place(rw, path, unit, ties)
        return errors

    def round_into(self, unit: PackedUnit, path: str, w: Tensor) -> Mapping[str, float]:
        """Fill a unit with w [R, i] rounded; on meta it stays empty and has no error."""
        if w.is_meta:
            return {}
        finite(path, w)
        find = fit_least_squares if self.clip == "mse" else fit
        wide = w.reshape(1, -1) if unit.group == WHOLE else w
        q, scale, zero, error = nearest(wide, self.bits, unit.grid[1], unit.symmetric, self.store, find)
        unit.fill(q.view_as(w), scale, None if unit.symmetric else zero)
        return {path: error}

    def work(self, model: Model, seq: int = 0) -> Work:
        tries = 10 if self.clip == "mse" else 1
        weights = [matrix(model.module(p)) for p in self.targets(model)]
        nbytes = sum(w.numel() * w.element_size() for w in weights)
        sizes = [w.numel() for w in weights]
        held = 40 * min(CHUNK, max(sizes, default=0))
        return Work(solve=10.0 * tries * sum(sizes), disk=2 * nbytes, memory=held)
