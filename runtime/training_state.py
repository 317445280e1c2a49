"""What a training holds between two steps: float32 weights, the optimizer's state, and their checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effc.compiler.method import Journal
from effc.runtime.curve import Curve

UNIT = "training"
_EVERY = 10.0
"""Seconds between checkpoints, as long as saving stays under `_SHARE` of the time."""
_SHARE = 0.05


class Moving:
    """The parameters that train: `masters` in float32, which move, and the model's own, which compute."""

    def __init__(self, working: Mapping[str, nn.Parameter], exact: Mapping[str, Tensor]) -> None:
        """`exact` holds the values to begin with, unrounded by the working dtype."""
        self._working = dict(working)
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in self._working.items():
            begin = exact[name].detach().to(parameter.device, torch.float32, copy=True)
            self.masters[name] = nn.Parameter(begin)
            parameter.requires_grad_(True)

    def collect(self) -> None:
        """Add the gradients of the passes so far to those of the masters."""
        for name, parameter in self._working.items():
            if parameter.grad is None:
                continue
            master = self.masters[name]
            found = parameter.grad.to(torch.float32)
            master.grad = found if master.grad is None else master.grad.add_(found)
            parameter.grad = None

    def clip(self, limit: float) -> float:
        """Shrink the gradient to norm `limit` where it is longer; returns its norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self.masters.values(), limit))

    @torch.no_grad()
    def publish(self) -> None:
        """Hand the masters' values to the model that computes."""
        torch._foreach_copy_(list(self._working.values()), list(self.masters.values()))
        for master in self.masters.values():
            master.grad = None


class Checkpoints:
    """Saves a training in its journal about every ten seconds, and takes it up again."""

    def __init__(
        self, journal: Journal | None, moving: Moving, optimizer: torch.optim.Optimizer, curve: Curve
    ) -> None:
        self._journal, self._moving, self._optimizer, self._curve = journal, moving, optimizer, curve
        self._last = time.monotonic()
        self._cost = 0.0

    def offer(self, done: int, force: bool = False) -> None:
        """Save behind step `done` when it is time or when forced."""
        now = time.monotonic()
        if self._journal is None or not (force or now - self._last >= max(_EVERY, self._cost / _SHARE)):
            return
        tensors: dict[str, Tensor] = {}
        plain: dict[str, dict[str, Any]] = {}
        for name, master in self._moving.masters.items():
            tensors[f"weight/{name}"] = master.detach()
            for key, value in self._optimizer.state[master].items():
                if isinstance(value, Tensor):
                    tensors[f"state/{key}/{name}"] = value
                else:
                    plain.setdefault(name, {})[key] = value
        self._journal.save(UNIT, tensors, {"step": done, "state": plain, "curve": self._curve.state()})
        self._last = time.monotonic()
        self._cost = self._last - now

    def restore(self) -> int:
        """Take up the last checkpoint; returns the number of steps that are done."""
        if self._journal is None or not self._journal.done(UNIT):
            return 0
        tensors, data = self._journal.read(UNIT)
        state: dict[str, dict[str, Any]] = {name: dict(plain) for name, plain in data["state"].items()}
        for full, tensor in tensors.items():
            kind, _, rest = full.partition("/")
            if kind == "weight":
                master = self._moving.masters[rest]
                master.data.copy_(tensor)
            else:
                key, _, name = rest.partition("/")
                state.setdefault(name, {})[key] = tensor
        for name, found in state.items():
            master = self._moving.masters[name]
            self._optimizer.state[master] = {k: _placed(k, v, master) for k, v in found.items()}
        self._curve.restore(data["curve"])
        return int(data["step"])


def _placed(key: str, value: Any, master: Tensor) -> Any:
    """State lives where its parameter lives; a step count stays where the optimizer keeps it."""
    return value.to(master.device).clone() if isinstance(value, Tensor) else value
