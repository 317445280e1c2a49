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
    "add",
    "mul",
    "scale",
    "softcap",
    "sigmoid",
    "silu",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu2",
    "quick_gelu",
    "tanh",
]


class ElementwiseSpec(KernelSpec, frozen=True):
    """y = x + z, x z, factor x, factor tanh(x / factor), sigmoid or an activation of x; float32."""

    op: ClassVar[str] = "elementwise"
    version: ClassVar[int] = 2

    form: Form
    factor: float = Field(1.0, allow_inf_nan=False)
    """What scale multiplies by; the cap of softcap, above 0."""
    each: int = Field(1, ge=0)
    """Neighboring numbers of x that share one of z; 0: all of them."""

    @model_validator(mode="after")
    def _possible(self) -> ElementwiseSpec:
        if self.each != 1 and self.form not in ("add", "mul"):
            raise ValueError(f"{self.form} has one operand")
        if self.form == "softcap" and self.factor <= 0:
            raise ValueError(f"a cap of {self.factor} is not above 0")
        return self


def reference(spec: ElementwiseSpec, x: Tensor, z: Tensor | None = None) -> Tensor:
    """x and z of one shape (fewer numbers of z where they are shared) -> y, in the precision of x."""
    if spec.form in ("add", "mul"):
        if z is None:
            raise ValueError(f"{spec.form} takes two tensors")
        if spec.each != 1:
            z = z.flatten().repeat_interleave(spec.each or x.numel())[: x.numel()].view_as(x)
        return x + z if spec.form == "add" else x * z
    if spec.form == "scale":
        return x * spec.factor
    if spec.form == "softcap":
        return spec.factor * torch.tanh(x / spec.factor)
    return torch.sigmoid(x) if spec.form == "sigmoid" else EPILOGUES[spec.form].torch(x)


def function(spec: ElementwiseSpec) -> str:
    """`elementwise_<key>` on numbers first to last; y may be x or z; z is null for forms of x alone."""
    factor = f"{spec.factor!r}f"
    second = {0: "z[0]", 1: "take(z + i, count)"}.get(spec.each, f"shared_{spec.key}(z, i, last)")
    own = {
        "add": f"a + {second}",
        "mul": f"a * {second}",
        "sigmoid": "sigmoid(a)",
        "scale": f"a * {factor}",
        "softcap": f"hyperbolic_tangent(a / {factor}) * {factor}",
    }
    c = own[spec.form] if spec.form in own else EPILOGUES[spec.form].c
    shared = f"""
INLINE f32x16 shared_{spec.key}(const float *z, long i, long last) {{
  if (i / {spec.each} == (i + 15) / {spec.each}) return all(z[i / {spec.each}]);
  f32x16 v = {{0}};
  for (long j = i; j < i + 16 && j < last; j++) v[j - i] = z[j / {spec.each}];
  return v;
}}"""
    return f"""{shared if spec.each > 1 else ""}
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
    due = -(-x.numel() // spec.each) if spec.each else 1
    if spec.form in ("add", "mul") and (z is None or z.numel() != due):
        raise ValueError(f"{spec.form} takes two tensors of one shape, or {due} numbers of the second")
    y = torch.empty_like(x)
    launch(emit(spec), spec.op, isa, threads, x, z, y, x.numel())
    return y


def parse(data: Mapping[str, Any]) -> ElementwiseSpec:
    return ElementwiseSpec.model_validate(data)


def cases(spec: ElementwiseSpec) -> Iterator[Case]:
    """Counts below a vector, of whole vectors, and with a rest; for kernels/cpu/check.py."""
    for size in (5, 64, 215):
        x, z = torch.randn(2, size, generator=torch.Generator().manual_seed(size)) * 3
        z = z[: -(-size // spec.each) if spec.each else 1].contiguous()
        given = {"x": x, "z": z, "y": torch.empty(size), "size": size}
        yield Case(f"{size} numbers", given, {"y": reference(spec, x.double(), z.double())}, 1e-6)
