"""The tiny models that the common checks run on, for tests beside them."""

from __future__ import annotations

from effc.runtime.tiny_models import (
    HIDDEN,
    LAYERS,
    ROPE,
    VOCAB,
    WIDTH,
    Sequences,
    blank,
    filled,
    on_meta,
    outputs,
)

__all__ = [
    "HIDDEN",
    "LAYERS",
    "ROPE",
    "VOCAB",
    "WIDTH",
    "Sequences",
    "blank",
    "filled",
    "on_meta",
    "outputs",
]
