"""LaunchedDecoder: generation by the launches of a GPU; a token behind the prompt is one graph."""

from __future__ import annotations

import torch
from torch import Tensor

from effc.kernels.gpu.launches import LaunchPlan
from effc.kernels.gpu.session import Session


class LaunchedDecoder:
    """A Decoder (see runtime/decoder.py). Rows are real tokens, so padding is never computed."""

    def __init__(self, lowered: LaunchPlan, batch: int, longest: int) -> None:
        self.session = Session(lowered, batch, longest)

    def prefill(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """ids [B, T] padded on the left where mask [B, T] is False -> logits [B, V] behind the last."""
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return self.session.prefill([row[kept] for row, kept in zip(ids, real, strict=True)]).clone()

    def next(self, tokens: Tensor) -> Tensor:
        """tokens [B] -> logits [B, V] behind them."""
        return self.session.next(tokens).clone()

    def likeliest(self) -> Tensor:
        """The tokens [B] that the last logits put first, the lowest among equals."""
        return self.session.chosen.clone()
