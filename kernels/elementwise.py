"""elementwise in C: add, multiply, scale, softcap and the activations, number by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from effc.kernels.cpu.case import Case
from effc.kernels.cpu.entry import launch, self_contained
from effc.kernels.cpu.isa import Isa
from effc.kernels.epilogue import EPILOGUES
from effc.kernels.kernel import KernelSpec

Form = Literal[
    "add", "mul", "scale", "softcap", "silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu", "tanh"
]


class ElementwiseSpec(KernelSpec, frozen=True):
    """y = x + z, x z, factor x, factor tanh(x / factor) or an activation of x; float32."""

    op: ClassVar[str] = "elementwise"
    version: ClassVar[int] = 1

    form: Form
    factor: float = Field(1.0, allow_inf_nan=False)
    """What scale multiplies by; the cap of softcap, above 0."""

    @model_validator(mode="after")
    def _possible(self) -> ElementwiseSpec:
        if self.form == "softcap" and self.factor <= 0:
            raise ValueError(f"a cap of {self.factor} is not above 0")
        return self


def reference(spec: ElementwiseSpec, x: Tensor, z: Tensor | None = None) -> Tensor:
    """x and z of one shape -> y, in the precision of x."""
    if spec.form in ("add", "mul"):
        if z is None:
            raise ValueError(f"{spec.form} takes two tensors")
        return x + z if spec.form == "add" else x * z
    if spec.form == "scale":
        return x * spec.factor
    if spec.form == "softcap":
        return spec.factor * torch.tanh(x / spec.factor)
    return EPILOGUES[spec.form].torch(x)


def function(spec: ElementwiseSpec) -> str:
    """`elementwise_<key>` on numbers first to last; y may be x or z; z is null for forms of x alone."""
    factor = f"{spec.factor!r}f"
    own = {
        "add": "a + take(z + i, count)",
        "mul": "a * take(z + i, count)",
        "scale": f"a * {factor}",
        "softcap": f"hyperbolic_tangent(a / {factor}) * {factor}",
    }
    c = own[spec.form] if spec.form in own else EPILOGUES[spec.form].c
    return f"""
static void elementwise_{spec.key}(const float *x, const float *z, float *y, long first, long last) {{
  for (long i = first; i < last; i += 16) {{
    const long count = last - i;
    f32x16 a = take(x + i, count);
    a = {c};
    give(y + i, a, count);
  }}
}}
"""


FIELDS = {"x": "const float *", "z": "const float *", "y": "float *", "size": "long"}


@cache
def emit(spec: ElementwiseSpec) -> str:
    """The self-contained file."""
    work = (
        f"  elementwise_{spec.key}(a->x, a->z, a->y, "
        "a->size * member / members, a->size * (member + 1) / members);"
    )
    return self_contained(spec, function(spec), FIELDS, work)


def elementwise(spec: ElementwiseSpec, isa: Isa, x: Tensor, z: Tensor | None, threads: int) -> Tensor:
    """x and z (for add and mul) float32 contiguous of one shape -> y of that shape.

    Raises:
        ValueError: z is missing, or of another shape.
    """
    if spec.form in ("add", "mul") and (z is None or z.shape != x.shape):
        raise ValueError(f"{spec.form} takes two tensors of one shape")
    y = torch.empty_like(x)
    launch(emit(spec), spec.op, isa, threads, x, z, y, x.numel())
    return y


def parse(data: Mapping[str, Any]) -> ElementwiseSpec:
    return ElementwiseSpec.model_validate(data)


def cases(spec: ElementwiseSpec) -> Iterator[Case]:
    """Counts below a vector, of whole vectors, and with a rest; for kernels/cpu/check.py."""
    for size in (5, 64, 215):
        x, z = torch.randn(2, size, generator=torch.Generator().manual_seed(size)) * 3
        given = {"x": x, "z": z, "y": torch.empty(size), "size": size}
        yield Case(f"{size} numbers", given, {"y": reference(spec, x.double(), z.double())}, 1e-6)
