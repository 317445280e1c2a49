"""Fast weights: a small gated network whose weights learn, chunk by chunk, from the tokens that pass.

    f_W(x) = W_out (silu(W_gate x) * W_in x)

A chunk's tokens are read by the weights that the chunks before it left; then the weights move to make
sum_t eta_t <v_t, f_W(k_t)> larger. The last chunk moves nothing until a token follows it.

Shapes: q, k, v [B, N, T, D], N heads of D channels; W_in, W_gate [B, N, F, D], W_out [B, N, D, F]; rates
[B, N, T, 3] of W_in, W_gate, W_out; betas [B, N, T]. Source: Test-Time Training Done Right, arXiv
2505.23884, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.step import Step

Rule = Literal["sgd", "momentum", "muon"]
Three = tuple[Tensor, Tensor, Tensor]
_SERIES = (3.4445, -4.775, 2.0315)
"""Coefficients of x, x^3, x^5 that press singular values towards one (Muon)."""
_ROUNDS = 5


class Fast(NamedTuple):
    """What a sequence carries on: weights, their running gradients, and the chunk that is being filled."""

    weights: Three
    running: Three | tuple[()]
    """Sums of gradients that decay by beta; none for sgd."""
    keys: Tensor
    """[B, N, C, D], of which the first `count mod C` (or all) are there"""
    values: Tensor
    rates: Tensor
    """[B, N, C, 3]"""
    betas: Tensor
    """[B, N, C]"""


class Read(NamedTuple):
    """What fast weights read and learn from: q, k, v [B, N, T, D], rates [B, N, T, 3], betas [B, N, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    rates: Tensor
    betas: Tensor


def begin(weights: Three, batch: int, chunk: int, rule: Rule) -> Fast:
    """Of `batch` sequences before their first token; weights without the batch dimension."""
    own = _three(w.expand(batch, *w.shape) for w in weights)
    heads, width = weights[0].shape[0], weights[0].shape[2]
    room = weights[0].new_zeros(batch, heads, chunk, width)
    return Fast(
        own,
        _three(torch.zeros_like(w) for w in own) if rule != "sgd" else (),
        room,
        torch.zeros_like(room),
        room.new_zeros(batch, heads, chunk, 3),
        room.new_zeros(batch, heads, chunk),
    )


def learn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    betas: Tensor | None,
    weights: Three,
    past: tuple[Tensor, ...] | None,
    step: Step,
    chunk: int,
    rule: Rule,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What tokens read [B, N, T, D], and the state as plain tensors.

    q and k are brought to length one, rates pass softplus, betas (absent for sgd) sigmoid. Each row, and each
    packed document, counts its own tokens, and padding is none, so chunks do not depend on what runs beside.
    """
    given = [_wide(t) for t in (q, k, v, rates)]
    betas = given[3].new_zeros(given[3].shape[:3]) if betas is None else torch.sigmoid(_wide(betas))
    read = Read(
        F.normalize(given[0], dim=-1), F.normalize(given[1], dim=-1), given[2], F.softplus(given[3]), betas
    )
    weights = _three(map(_wide, weights))
    fast = begin(weights, q.shape[0], chunk, rule) if past is None else _packed(past)
    if step.key_mask is None and step.segments is None:
        y, fast = stream(fast, read, step.start, rule)
    else:
        y, fast = _by_row(fast, read, step, begin(weights, 1, chunk, rule), rule)
    return y.to(v.dtype), _flat(fast)


def _by_row(fast: Fast, read: Read, step: Step, empty: Fast, rule: Rule) -> tuple[Tensor, Fast]:
    length = read.q.shape[2]
    y = torch.zeros_like(read.v)
    real, fresh = step.real(length), step.fresh()
    rows = []
    for b in range(y.shape[0]):
        own = _packed(tuple(t[b : b + 1] for t in _flat(fast)))
        count = 0 if step.key_mask is None else int(step.key_mask[b, : step.start].sum())
        places = torch.arange(length, device=y.device) if real is None else real[b].nonzero()[:, 0]
        cuts = [] if fresh is None else fresh[b, places].nonzero()[:, 0].tolist()
        for start, end in zip([0, *cuts], [*cuts, len(places)], strict=True):
            if start:
                own, count = empty, 0
            if end > start:
                here = places[start:end]
                part, own = stream(own, Read(*(t[b : b + 1, :, here] for t in read)), count, rule)
                y[b : b + 1, :, here] = part
                count += end - start
        rows.append(own)
    return y, _packed(tuple(torch.cat(parts) for parts in zip(*map(_flat, rows), strict=True)))


def stream(fast: Fast, read: Read, count: int, rule: Rule) -> tuple[Tensor, Fast]:
    """Tokens `count`, `count` + 1, ... of every sequence -> what they read [B, N, T, D], and the state
    behind them.

    Where calls begin and end changes nothing: chunks are counted from the start of the sequence.
    """
    chunk = fast.keys.shape[2]
    done, parts = 0, []
    length = read.q.shape[2]
    while done < length:
        place = (count + done) % chunk
        if place == 0 and count + done:
            fast = _moved(fast, rule)
        end = min(length, done + chunk - place)
        part = Read(*(t[:, :, done:end] for t in read))
        parts.append(apply(fast.weights, part.q))
        fast = _filled(fast, part, place)
        done = end
    return torch.cat(parts, 2), fast


def apply(weights: Three, x: Tensor) -> Tensor:
    """f_W(x), x [B, N, T, D]"""
    w_in, w_gate, w_out = weights
    return (F.silu(x @ w_gate.mT) * (x @ w_in.mT)) @ w_out.mT


def gradients(weights: Three, k: Tensor, v: Tensor, rates: Tensor) -> Three:
    """Of sum_t <v_t, f_W(k_t)>, each token's share times its rate, with respect to W_in, W_gate, W_out."""
    w_in, w_gate, w_out = weights
    gate, inner = k @ w_gate.mT, k @ w_in.mT
    opened, slope = F.silu(gate), torch.sigmoid(gate)
    back = v @ w_out  # [B, N, T, F]
    steep = back * inner * slope * (1 + gate * (1 - slope))
    of_in = (back * opened).mT @ (k * rates[..., 0:1])
    of_gate = steep.mT @ (k * rates[..., 1:2])
    of_out = v.mT @ (opened * inner * rates[..., 2:3])
    return of_in, of_gate, of_out


def orthogonal(g: Tensor) -> Tensor:
    """The nearest matrix with singular values of about one, by five rounds of Newton and Schulz; g [..., m,
    n].
    """
    tall = g.shape[-2] > g.shape[-1]
    x: Tensor = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _SERIES
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _moved(fast: Fast, rule: Rule) -> Fast:
    """After a full chunk; rows of weights keep their norms."""
    found = gradients(fast.weights, fast.keys, fast.values, fast.rates)
    running = fast.running
    if running:
        beta = fast.betas.mean(-1)[..., None, None]
        found = _three(g + r * beta for g, r in zip(found, running, strict=True))
        running = found
    if rule == "muon":
        found = _three(map(orthogonal, found))
    pairs = zip(fast.weights, found, strict=True)
    return fast._replace(weights=_three(_renormed(w + g, w) for w, g in pairs), running=running)


def _renormed(new: Tensor, old: Tensor) -> Tensor:
    factor: Tensor = old.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(min=1e-5)
    return new * factor


def _filled(fast: Fast, new: Read, place: int) -> Fast:
    """The chunk with some more tokens; what it held of the chunk before is overwritten."""

    def put(room: Tensor, part: Tensor) -> Tensor:
        return torch.cat((room[:, :, :place], part, room[:, :, place + part.shape[2] :]), 2)

    return fast._replace(
        keys=put(fast.keys, new.k),
        values=put(fast.values, new.v),
        rates=put(fast.rates, new.rates),
        betas=put(fast.betas, new.betas),
    )


def _flat(fast: Fast) -> tuple[Tensor, ...]:
    return (fast.keys, fast.values, fast.rates, fast.betas, *fast.weights, *fast.running)


def _packed(tensors: tuple[Tensor, ...]) -> Fast:
    keys, values, rates, betas, a, b, c, *running = tensors
    return Fast((a, b, c), _three(running) if running else (), keys, values, rates, betas)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _three(tensors: Iterable[Tensor]) -> Three:
    a, b, c = tensors
    return a, b, c
