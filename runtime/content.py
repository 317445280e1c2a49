"""What a model's weights hold now, cheaply: to tell whether what was made from them still stands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effc.compiler.model import Model

Content = dict[str, tuple[Any, ...]]
_SAMPLES = 61
"""Numbers of each tensor that are looked at: changes that torch does not count (through `.data`, or within
`inference_mode`) concern whole tensors as a rule."""


def content(model: Model) -> Content:
    """Per tensor its place, shape and type, the changes that torch has counted, and some of its bytes."""
    return {name: _of(tensor.detach()) for name, tensor in model.tensors().items()}


def _of(tensor: Tensor) -> tuple[Any, ...]:
    about = (tuple(tensor.shape), tensor.dtype, tensor.device)
    if tensor.is_meta:
        return about
    counted = -1 if tensor.is_inference() else tensor._version
    step = max(1, tensor.numel() // _SAMPLES)
    some = tensor.reshape(-1)[::step].contiguous().view(torch.uint8) if tensor.numel() else tensor
    return (*about, tensor.data_ptr(), counted, bytes(some.cpu().numpy()))
