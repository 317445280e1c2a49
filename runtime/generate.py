"""Generation: a prompt is read once (prefill), then each new token costs one step over a static cache.

Shapes: ids [B, T] int64, padded on the left where lengths differ; attention_mask [B, T], 1 for tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effc.compiler.blocks.rope import changes
from effc.compiler.model import Model
from effc.kernels.cpu.isa import Isa
from effc.runtime.decoder import Kernels, decoder
from effc.specs.diagnostic import Diagnostic, EffcError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. A temperature of 0 takes the likeliest one (greedy)."""

    temperature: float = 0.0
    top_k: int = 0
    """Only the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens that together reach this probability."""
    seed: int = 0


def generate(
    model: Model,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: Collection[int] = (),
    pad: int = 0,
    watch: Callable[[Tensor], None] | None = None,
    kernels: Kernels = "auto",
    isa: Isa | None = None,
) -> Tensor:
    """ids [B, T] and up to `max_new_tokens` more -> [B, T + n].

    A row that has drawn a token of `eos` is filled with `pad`; generation ends when every row has. Each row
    draws from a stream of its own, keyed by seed and row, so no row's sample depends on another's. `watch`
    sees the new tokens [B] of every step. `kernels`: torch, c, or auto, which is c for packed weights;
    `isa`: the instructions of a C program, by default the fastest that the processor has.

    Raises:
        EffcError: E630 for padding that is not on the left or an empty prompt, E631 when the sequence would
            be longer than the model's table of positions, E632 for a setting out of range, E503 when
            `kernels` is c and the model has no program.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    mask = _checked(model, ids, attention_mask, max_new_tokens, sampling)
    streams = [_stream(seed, row) for row in range(ids.shape[0])]
    longest = ids.shape[1] + max_new_tokens
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    stops = torch.tensor(sorted(eos), dtype=ids.dtype, device=ids.device)
    ropes = _ropes(model)
    out, token = ids, None
    with torch.inference_mode():
        engine = decoder(model, ids.shape[0], longest, kernels, isa)
        for _ in range(max_new_tokens):
            logits = engine.prefill(out, mask) if token is None else engine.next(token)
            drawn = choose(logits, sampling, streams) if sampling.temperature else engine.likeliest()
            token = torch.where(ended, pad, drawn)
            ended = ended | torch.isin(token, stops)
            out = torch.cat((out, token[:, None]), 1)
            if watch is not None:
                watch(token)
            if bool(ended.all()):
                break
            lengths = _lengths(out[:, :-1], mask)
            if mask is not None:
                mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            if any(changes(rope, n) for rope in ropes for n in lengths):
                token, engine = None, decoder(model, ids.shape[0], longest, kernels, isa)
    return out.clone()


def choose(logits: Tensor, sampling: Sampling, streams: list[torch.Generator]) -> Tensor:
    """logits [B, V] -> tokens [B]. Probabilities are float64 and each row has its own random stream."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    chances = probabilities(logits, sampling)
    draws = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in streams]).to(logits.device)
    edges = chances.cumsum(-1)
    place = torch.searchsorted(edges, (draws * edges[:, -1])[:, None], right=True)[:, 0]
    last = (chances > 0).long().cumsum(-1).argmax(-1)  # rounding may push a draw behind the last chance
    return torch.minimum(place, last)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [B, V] -> probabilities [B, V] float64 after temperature, top_k and top_p, not renormalized."""
    scores = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    chances = torch.softmax(scores, -1)
    if sampling.top_p < 1:
        ranked, order = torch.sort(chances, dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        chances = torch.zeros_like(chances).scatter(-1, order, ranked * (before < sampling.top_p))
    return chances


def _ropes(model: Model) -> list[Mapping[str, Any]]:
    """The different rotary settings whose frequencies depend on the length of a row.

    When they change, all that was cached is stale, in every layer but the first: the row is read anew.
    """
    found = [rope for _, unit in model.units() if (rope := getattr(unit, "rope", None)) is not None]
    growing = [rope for rope in found if rope.get("rope_type") in ("dynamic", "longrope")]
    return list({str(rope): rope for rope in growing}.values())


def _lengths(ids: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each row, padding not counted."""
    if mask is None:
        return [ids.shape[1]]
    return [int(n) for n in mask.sum(1).unique()]


def _stream(seed: int, row: int) -> torch.Generator:
    key = hashlib.sha256(f"{seed}/generate/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))


def _checked(
    model: Model, ids: Tensor, attention_mask: Tensor | None, new: int, sampling: Sampling
) -> Tensor | None:
    """The mask as bool, None when nothing is padded."""
    if ids.ndim != 2 or ids.shape[0] == 0 or ids.shape[1] == 0:
        raise EffcError(Diagnostic("E630", "the prompt is empty", help="give at least one token"))
    limits = {
        "max_new_tokens": (new, new >= 0, "0 or more"),
        "temperature": (sampling.temperature, sampling.temperature >= 0, "0 or more"),
        "top_k": (sampling.top_k, sampling.top_k >= 0, "0 or more"),
        "top_p": (sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
    }
    wrong = [(name, value, due) for name, (value, good, due) in limits.items() if not good]
    if wrong:
        problems = [Diagnostic("E632", f"`{n}` is {v}", notes=(f"it must be {due}",)) for n, v, due in wrong]
        raise EffcError(*problems)
    table = getattr(model.module("embedding"), "positions", 0)
    if table and ids.shape[1] + new > table:
        note = f"{ids.shape[1]} tokens of prompt and {new} new ones; the model has {table} positions"
        raise EffcError(
            Diagnostic("E631", "the sequence is longer than the model's positions", notes=(note,))
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    if not bool(mask[:, -1].all()):
        help = "pad prompts on the left, so that each ends with its last token"
        raise EffcError(Diagnostic("E630", "a prompt is padded on the right", help=help))
    return mask


Model.generation = generate
