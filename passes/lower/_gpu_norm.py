"""Norms on a GPU: of rows, and of heads within rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effc.kernels.gpu.load import load
from effc.kernels.norm import emit_triton as norm_triton
from effc.kernels.norm.emit_triton import NormGpuSpec
from effc.passes.lower._jobs import Normalize
from effc.passes.lower._launching import Launching


def normalizer(
    build: Launching, job: Normalize, width: int, total: int = 0
) -> tuple[Callable[[Tensor, Tensor], Tensor | None], NormGpuSpec]:
    """x [N, width], y the same, written -> the sums of y over runs of `total` columns, if there are any."""
    form: Any = job.form
    run: Any = total if total and width % total == 0 else 0
    spec = NormGpuSpec(form=form, eps=job.eps, offset=job.offset, bias=job.bias is not None, run=run)
    given: dict[str, Any] = {"gain": build.tensor(job.weight, torch.float32)} if job.weight else {}
    given = given or {"gain": torch.ones(width, device=build.device)}
    if job.bias is not None:
        given["bias"] = build.tensor(job.bias, torch.float32)
    module = load(norm_triton.emit(spec))

    def norm(x: Tensor, y: Tensor) -> Tensor | None:
        rows = {"inverse": torch.empty(len(x), device=x.device)}
        if job.form == "layer":
            rows["mean"] = torch.empty(len(x), device=x.device)
        if run:
            rows["sums"] = torch.empty(width // run, len(x), device=x.device)
        module.forward(x=x, y=y, **given, **rows)
        return rows.get("sums")

    return norm, spec
