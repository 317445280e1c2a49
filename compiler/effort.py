"""Effort: the memory and the time of a stage on a machine, from its shape and its own work."""

from __future__ import annotations

from effc.compiler.method import Method, Work
from effc.compiler.model import Model
from effc.compiler.shapes import Calibrate, Merge, Rewrite, Train
from effc.specs.target import Target

STREAMED = 4096
"""Tokens that a calibration runs through a layer at once."""

BACKWARD = 180_000_000
"""Bytes that a backward pass needs beside tensors: buffers and generated code of the libraries, measured."""


def peak_of(method: Method, model: Model, work: Work, target: Target) -> int:
    """Resident bytes of the process: itself, the models its shape holds at once, and the stage's own work.

    A stage that calibrates holds two layers and the activations of one batch; one that streams a weight or
    two; a merge blocks alone.
    """
    held = sum(t.numel() * t.element_size() for t in model.tensors().values())
    match method:
        case Merge():
            held = 0
        case Calibrate():
            width = int(model.config.get("hidden_size", 0))
            inner = int(model.config.get("intermediate_size", 4 * width))
            held = 2 * held // max(1, model.layers) + 4 * STREAMED * (6 * width + 4 * inner)
        case Rewrite() if method.streams:
            largest = max((t.numel() * t.element_size() for t in model.tensors().values()), default=0)
            held = 2 * largest  # what is read, and what is made of it
        case Train():
            held += BACKWARD
    return target.base_bytes + held + work.memory


def seconds_of(method: Method, model: Model, work: Work, target: Target) -> float:
    """Estimated time of the stage's own work."""
    training = isinstance(method, Train)
    stored = next((str(t.dtype)[6:] for t in model.tensors().values() if t.is_floating_point()), "float32")
    precision = {"fp32": "float32", "bf16": "bfloat16"}.get(getattr(method, "precision", "auto"))
    dtype = (precision or target.training_dtype) if training else stored
    rate = target.rate(dtype, int(model.config.get("hidden_size", 0)), training)
    return work.flops / rate + work.solve / target.solve + work.disk / target.disk_read
