"""Torch's optimizers without torch's compiler, which they import in case a step is to be compiled.

The import costs a second of work, and 150 MB of memory for as long as the process lives.
"""

from __future__ import annotations

import inspect
from typing import TypeVar, cast

import torch

Kind = TypeVar("Kind", bound=torch.optim.Optimizer)

_LEFT_ALONE = "__dynamo_disable"
"""Where torch keeps the form of a function that its compiler must not touch, else it asks the compiler."""


def eager(kind: type[Kind]) -> type[Kind]:
    """The optimizer with the same arithmetic, bit for bit, whose methods are called as they are."""
    for method in vars(torch.optim.Optimizer).values():
        within = getattr(method, "__wrapped__", None)
        if within is not None and not hasattr(within, _LEFT_ALONE):
            setattr(within, _LEFT_ALONE, within)
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return cast(type[Kind], type(kind.__name__, (kind,), {"step": step}))
