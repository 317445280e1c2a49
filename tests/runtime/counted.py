"""Weights that book the memory they take, from the moment they are read until nothing holds them."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from effc.compiler.model import Model
from effc.compiler.weights import LazyTensor


class Counted:
    """Bytes of weights that are in memory now, and the most that ever were, as float32."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def on_disk(self, model: Model) -> Model:
        """The same model with every weight lazy and booked."""
        lazy = model.clone()
        lazy.weights = {name: self.lazy(tensor) for name, tensor in model.tensors().items()}
        lazy.release()
        return lazy

    def lazy(self, tensor: Tensor) -> LazyTensor:
        """The tensor as one on disk: each read takes memory of its own."""

        def read() -> Tensor:
            held = tensor.detach().float().numpy().copy()
            self.now += held.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(held, self._freed, held.nbytes)
            return torch.from_numpy(held)

        return LazyTensor(tuple(tensor.shape), tensor.dtype, read)

    def _freed(self, count: int) -> None:
        self.now -= count
