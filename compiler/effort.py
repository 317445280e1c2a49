"""Effort: the memory and the time of a stage on a machine, from its shape and its own work."""

from __future__ import annotations

from effc.compiler.method import Method, Work
from effc.compiler.model import Model
from effc.compiler.shapes import Analyze, Calibrate, Merge, Rewrite, Train
from effc.specs.target import Target

STREAMED = 4096
"""Tokens that a calibration runs through a layer at once."""

WARM = 8
"""Models that ran leave buffers and code of libraries: one part in so many of an idle process, fitted."""

OPENED = 4
"""Bytes resident for each byte of text: tokens, the documents they belong to, and the text itself."""

KEPT = 1 << 29
"""Bytes of hidden states that a calibration holds; what comes beyond goes to files."""


def peak_of(method: Method, model: Model, work: Work, target: Target, text: int = 0, seq: int = 0) -> int:
    """Resident bytes of the process: itself, `text` bytes of open data, the models its shape holds at once,
    and the stage's own work.

    A stage that calibrates holds two layers and the activations of one batch; one that streams a weight or
    two; a merge blocks alone.
    """
    held = sum(t.numel() * t.element_size() for t in model.tensors().values())
    match method:
        case Merge():
            held = 0
        case Analyze():
            held = 2 * max((t.numel() * t.element_size() for t in model.tensors().values()), default=0)
        case Calibrate():
            inner = int(model.config.get("intermediate_size", 4 * width(model)))
            active = 4 * STREAMED * (6 * width(model) + 4 * inner)
            states = 2 * method.samples * seq * width(model)
            held = 2 * held // max(1, model.layers) + active + min(KEPT, states)
        case Rewrite() if method.streams:
            largest = max((t.numel() * t.element_size() for t in model.tensors().values()), default=0)
            held = 2 * largest  # what is read, and what is made of it
    return target.base_bytes + target.base_bytes // WARM + OPENED * text + held + work.memory


def seconds_of(method: Method, model: Model, work: Work, target: Target) -> float:
    """Estimated time of the stage's own work."""
    training = isinstance(method, Train)
    precision = {"fp32": "float32", "bf16": "bfloat16"}.get(getattr(method, "precision", "auto"))
    dtype = (precision or target.training_dtype) if training else stored(model)
    rate = target.rate(dtype, width(model), training)
    return (
        work.flops / rate
        + work.exact / target.gemm["float32"]
        + work.solve / target.solve
        + work.traffic / target.bandwidth
        + work.disk / target.disk_read
    )


MERGED = 40
"""Bytes that move for each number of each model in a pass: read, widened, checked, scaled, added."""


def merging(model: Model, models: int, rounds: int) -> Work:
    """What a merge of so many models reads and computes: every number, once for each pass."""
    numbers = sum(t.numel() for t in model.tensors().values())
    nbytes = sum(t.numel() * t.element_size() for t in model.tensors().values())
    passes = 1 + rounds
    return Work(disk=passes * models * nbytes, traffic=float(passes * models * numbers * MERGED))


def stored(model: Model) -> str:
    """The dtype in which a model's own products are computed."""
    return next((str(t.dtype)[6:] for t in model.tensors().values() if t.is_floating_point()), "float32")


def width(model: Model) -> int:
    """Channels of the residual stream; 0 where the config does not say."""
    return int(model.config.get("hidden_size", 0))
