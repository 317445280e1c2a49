"""A stage that needs nothing but the model, run on it, and how far the function moved."""

from __future__ import annotations

import torch
from torch import Tensor

from effc.compiler.model import Model
from effc.compiler.probe import difference, widened
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite


def edited(method: Rewrite, model: Model) -> Model:
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def moved(method: Rewrite, model: Model, x: Tensor, dtype: torch.dtype) -> float:
    """How far the outputs of a clone in `dtype` move, as a share of their range."""
    before = widened(model, dtype)
    given = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        return difference(before(given), edited(method, before)(given))
