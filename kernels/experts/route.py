"""route in C: which experts a row goes to, and with what weights, from the scores of all of them.

Shapes: scores [M, E] -> weights [M, k] float32, chosen [M, k] int32; the number E stands for no expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from effc.kernels.cpu.case import Argument, Case
from effc.kernels.cpu.entry import self_contained
from effc.kernels.epilogue import EPILOGUES
from effc.kernels.kernel import KernelSpec

Form = Literal["best", "above", "largest"]
Act = Literal["none", "sigmoid", "tanh", "gelu"]


class RouteSpec(KernelSpec, frozen=True):
    """p = softmax(act(scores) / tau), in order of the experts' numbers; of equal p the lower number wins.

    best: the k largest, in falling order; above: every expert in its own place (k = E), none where p is below
    `least` and not the largest; largest: the number of the largest score, without a weight.
    """

    op: ClassVar[str] = "route"
    version: ClassVar[int] = 1

    form: Form
    experts: int = Field(gt=0, le=4096)
    active: int = Field(gt=0)
    """k"""
    renormalize: bool = True
    """Weights are divided by their sum."""
    act: Act = "none"
    tau: float = Field(default=1.0, gt=0)
    least: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> RouteSpec:
        if self.active > self.experts:
            raise ValueError(f"{self.active} active experts of {self.experts}")
        if self.active != {"best": self.active, "above": self.experts, "largest": 1}[self.form]:
            raise ValueError(f"the form {self.form} of {self.experts} experts has not {self.active} active")
        return self


def reference(spec: RouteSpec, scores: Tensor) -> tuple[Tensor, Tensor]:
    """scores [M, E] -> weights [M, k] in their precision, chosen [M, k] int32; ones where there are none."""
    if spec.form == "largest":
        return torch.ones_like(scores[:, :1]), scores.argmax(-1, keepdim=True).int()
    bent = torch.sigmoid(scores) if spec.act == "sigmoid" else scores
    if spec.act in EPILOGUES:
        bent = EPILOGUES[spec.act].torch(scores)
    p = torch.softmax(bent / spec.tau, -1)
    if spec.form == "above":
        stay = (p >= spec.least) | (p == p.amax(-1, keepdim=True))
        weights, number = p * stay, torch.arange(spec.experts).expand_as(p)
        return weights / weights.sum(-1, keepdim=True), number.where(stay, spec.experts).int()
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    weights = ranked[:, : spec.active]
    weights = weights / weights.sum(-1, keepdim=True) if spec.renormalize else weights
    return weights, order[:, : spec.active].int()


def function(spec: RouteSpec) -> str:
    """`route_<key>` on rows first to last; `weights` is not read or written by the form `largest`."""
    e, k, key = spec.experts, spec.active, spec.key
    if spec.form == "largest":
        return f"""
static void route_{key}(const float *RESTRICT scores, float *RESTRICT weights, int32_t *RESTRICT chosen,
                        long first, long last) {{
  for (long m = first; m < last; m++) {{
    const float *p = scores + m * {e};
    int32_t best = 0;
    for (int32_t i = 1; i < {e}; i++) if (p[i] > p[best] || (p[i] != p[i] && p[best] == p[best])) best = i;
    chosen[m] = best;
  }}
}}
"""
    padded = -(-e // 16) * 16
    bent = {"none": "a", "sigmoid": "sigmoid(a)", "tanh": "hyperbolic_tangent(a)"}
    act = bent.get(spec.act, EPILOGUES["gelu"].c)
    heat = "" if spec.tau == 1.0 else f" * {1 / spec.tau!r}f"
    choice = _above(spec) if spec.form == "above" else _best(spec)
    return f"""
static void route_{key}(const float *RESTRICT scores, float *RESTRICT weights, int32_t *RESTRICT chosen,
                        long first, long last) {{
  for (long m = first; m < last; m++) {{
    float p[{padded}], most = -INFINITY, total = 0;
    for (long i = 0; i < {e}; i += 16) {{
      f32x16 a = take(scores + m * {e} + i, {e} - i);
      store(p + i, ({act}){heat});
    }}
    for (long i = 0; i < {e}; i++) if (p[i] > most || p[i] != p[i]) most = p[i];
    for (long i = {e}; i < {padded}; i++) p[i] = -INFINITY;
    for (long i = 0; i < {padded}; i += 16) store(p + i, exponential(load(p + i) - most));
    for (long i = 0; i < {e}; i++) total += p[i];
    for (long i = 0; i < {e}; i++) p[i] /= total;
    float *w = weights + m * {k}, sum = 0;
    int32_t *number = chosen + m * {k};
{choice}  }}
}}
"""


def _best(spec: RouteSpec) -> str:
    e, k = spec.experts, spec.active
    share = f"    for (long j = 0; j < {k}; j++) w[j] /= sum;\n" if spec.renormalize else ""
    return f"""    unsigned char taken[{e}] = {{0}};
    for (long j = 0; j < {k}; j++) {{
      int32_t best = -1;
      for (int32_t i = 0; i < {e}; i++) if (!taken[i] && (best < 0 || p[i] > p[best])) best = i;
      taken[best] = 1;
      number[j] = best;
      w[j] = p[best];
      sum += p[best];
    }}
{share}"""


def _above(spec: RouteSpec) -> str:
    e = spec.experts
    return f"""    float top = 0;
    for (long i = 0; i < {e}; i++) if (p[i] > top) top = p[i];
    for (int32_t i = 0; i < {e}; i++) {{
      const int stays = p[i] >= {spec.least!r}f || p[i] == top;
      number[i] = stays ? i : {e};
      w[i] = stays ? p[i] : p[i] * 0;
      sum += w[i];
    }}
    for (long i = 0; i < {e}; i++) w[i] /= sum;
"""


FIELDS = {"scores": "const float *", "weights": "float *", "chosen": "int32_t *", "M": "long"}


@cache
def emit(spec: RouteSpec) -> str:
    """The self-contained file."""
    work = (
        f"  route_{spec.key}(a->scores, a->weights, a->chosen, "
        "a->M * member / members, a->M * (member + 1) / members);"
    )
    return self_contained(spec, function(spec), FIELDS, work)


def parse(data: Mapping[str, Any]) -> RouteSpec:
    return RouteSpec.model_validate(data)


def cases(spec: RouteSpec) -> Iterator[Case]:
    """Few rows and more; one with equal scores, of which the first experts win; for kernels/cpu/check.py."""
    for m in (1, 7):
        scores = torch.randn(m, spec.experts, generator=torch.Generator().manual_seed(m)) * 2
        scores[-1] = scores[-1].round()
        weights, chosen = reference(spec, scores.double())
        given: dict[str, Argument] = {"scores": scores, "weights": None, "chosen": torch.empty_like(chosen)}
        due = {"chosen": chosen}
        if spec.form != "largest":
            given["weights"], due["weights"] = torch.empty(weights.shape), weights
        yield Case(f"{m} rows", given | {"M": m}, due, 2e-6)
