"""Scan: the gated linear recurrence that linear attention is made of, in three forms that agree.

    S_t = diag(a_t) S_{t-1} + k_t^T v_t,   o_t = scale q_t S_t,   a_t = exp(g_t), g_t <= 0

`over = "value"` gates the columns of S instead: S_t = S_{t-1} diag(a_t) + k_t^T v_t (gated slot attention).

Shapes: q [B, H, T, K]; k [B, Hk, T, K], v [B, Hk, T, V], H a multiple of Hk; log gates g [B, Hk, T, G] with
G = K (V over values), or 1 for a gate that all channels share; state S [B, Hk, K, V]; o [B, H, T, V]. Every
exponent is a sum of log gates of neighboring tokens, added up from those alone and never as the difference
of two longer sums. So none is positive, none loses digits to a strong gate before it, and g = -inf (a gate
that forgets all) is as good as any. Source: Gated Linear Attention, arXiv 2312.06635, sections 3 and 4.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Over = Literal["key", "value"]
CHUNK, SUB = 64, 16
"""Tokens of a chunk, between which a state is kept, and of a sub-block of it."""


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    past: Tensor | None = None,
    *,
    over: Over = "key",
    scale: float = 1.0,
    chunk: int = CHUNK,
    sub: int = SUB,
) -> tuple[Tensor, Tensor]:
    """The outputs [B, H, T, V] in q's dtype and the state after them, in float32 at least.

    One token takes the recurrent form, more take the chunk form.

    Raises:
        ValueError: `chunk` is no multiple of `sub`.
    """
    a, b, c, d = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (q, k, v, g))
    if q.shape[2] == 1:
        y, state = recurrent(a, b, c, d, past, over=over)
    else:
        y, state = chunked(a, b, c, d, past, over=over, chunk=chunk, sub=sub)
    return (y if scale == 1.0 else y * scale).to(q.dtype), state


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, past: Tensor | None = None, *, over: Over = "key"
) -> tuple[Tensor, Tensor]:
    """Token by token: the definition, and the form that decodes."""
    state = _start(k, v) if past is None else past
    heads = k.shape[1]
    outputs = []
    for t in range(q.shape[2]):
        gate = g[:, :, t].exp()
        gate = gate.unsqueeze(-1) if over == "key" else gate.unsqueeze(-2)
        state = state * gate + k[:, :, t, :, None] * v[:, :, t, None, :]
        query = q[:, :, t].unflatten(1, (heads, -1))  # [B, Hk, H / Hk, K]
        outputs.append((query @ state).flatten(1, 2))
    return torch.stack(outputs, 2), state


def parallel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, past: Tensor | None = None, *, over: Over = "key"
) -> tuple[Tensor, Tensor]:
    """All pairs of tokens at once, T^2 max(K, V) numbers: to hold the other forms to."""
    heads = k.shape[1]
    q, k, v, g = (t.unflatten(1, (heads, -1)) for t in (q, k, v, g))  # [B, Hk, H / Hk or 1, T, .]
    decay, since = _between_tokens(g).exp(), g.cumsum(-2).exp()
    behind = _after(g, -2).exp()
    state = (_start(k.squeeze(2), v.squeeze(2)) if past is None else past).unsqueeze(2)
    last = g.sum(-2).exp().unsqueeze(-1 if over == "key" else -2)
    if over == "key":
        scores = (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1)
        y = scores @ v + (q * since) @ state
        after = last * state + (k * behind).transpose(-1, -2) @ v
    else:
        scores = q @ k.transpose(-1, -2)
        y = (scores.unsqueeze(-1) * v.unsqueeze(-3) * decay).sum(-2) + (q @ state) * since
        after = last * state + k.transpose(-1, -2) @ (v * behind)
    return y.flatten(1, 2), after.squeeze(2)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    past: Tensor | None = None,
    *,
    over: Over = "key",
    chunk: int = CHUNK,
    sub: int = SUB,
) -> tuple[Tensor, Tensor]:
    """Matrix products inside chunks, one state between them; differentiable, linear in T.

    Pairs of tokens in different sub-blocks of a chunk meet in plain products of keys and queries scaled to
    the edge between them; only pairs inside one sub-block need a decay of their own for every channel.
    """
    if sub < 1 or chunk % sub:
        raise ValueError(f"chunk is a multiple of sub, not {chunk} of {sub}")
    length, heads = q.shape[2], k.shape[1]
    blocks = min(chunk // sub, -(-length // sub))
    short = -length % (blocks * sub)

    def cut(x: Tensor) -> Tensor:
        """[B, H, T, .] -> [B, Hk, H / Hk, chunks, blocks, sub, .]; what is added changes no state"""
        parts: Tensor = F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, blocks, sub)).unflatten(1, (heads, -1))
        return parts

    q, k, v, g = (cut(t) for t in (q, k, v, g))
    sums = _sums(g)
    inside = _within_chunks(q, k, v, g, sums, over)
    states, last = _states(k, v, sums, _start(k, v) if past is None else past, over)
    if over == "key":
        before = (q * sums.since.exp()).flatten(4, 5) @ states
    else:
        before = (q.flatten(4, 5) @ states) * sums.since.exp().flatten(4, 5)
    y = (inside.flatten(4, 5) + before).flatten(3, 4).flatten(1, 2)
    return y[:, :, :length], last


class _Sums(NamedTuple):
    """Sums of log gates, of chunks cut into n sub-blocks of c tokens; batch dimensions are left out."""

    head: Tensor
    """[n, c, G] from the start of the sub-block up to a token, the token included"""
    across: Tensor
    """[n, n, c, G] of row block, column block, token there: behind the token up to the row block's start"""
    since: Tensor
    """[n, c, G] from the start of the chunk up to a token"""
    until: Tensor
    """[n, c, G] behind a token up to the end of the chunk"""
    whole: Tensor
    """[G] of the chunk"""


def _sums(g: Tensor) -> _Sums:
    head, tail = g.cumsum(-2), _after(g, -2)
    total = head[..., -1, :]
    n = total.shape[-2]
    rows, columns = (torch.arange(n, device=g.device).view(shape) for shape in ((-1, 1), (1, -1)))
    # Totals of the sub-blocks that lie strictly between a column block and a row block.
    moved = _before(torch.where((rows > columns)[..., None], total.unsqueeze(-2), 0.0), -3)
    across = (moved.unsqueeze(-2) + tail.unsqueeze(-4)).masked_fill(
        ~(rows > columns)[..., None, None], -torch.inf
    )
    since = head + _before(total, -2).unsqueeze(-2)
    until = tail + _after(total, -2).unsqueeze(-2)
    return _Sums(head, across, since, until, total.sum(-2))


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, sums: _Sums, over: Over) -> Tensor:
    """What tokens take from tokens of their own chunk, as cut as q is, V wide."""
    near, far, head = _between_tokens(g).exp(), sums.across.exp(), sums.head.exp()
    if over == "key":
        if g.shape[-1] == 1:
            scores = (q @ k.transpose(-1, -2)) * near.squeeze(-1)
        else:
            scores = (near * k.unsqueeze(-3) @ q.unsqueeze(-1)).squeeze(-1)
        keys = (k.unsqueeze(-4) * far).flatten(-3, -2)  # [n, n c, K]
        return scores @ v + (q * head @ keys.transpose(-1, -2)) @ v.flatten(-3, -2).unsqueeze(-3)
    scores = q @ k.transpose(-1, -2)
    y = (scores.unsqueeze(-2) @ (near * v.unsqueeze(-3))).squeeze(-2)
    values = (v.unsqueeze(-4) * far).flatten(-3, -2)  # [n, n c, V]
    return y + (q @ k.flatten(-3, -2).unsqueeze(-3).transpose(-1, -2) @ values) * head


def _states(k: Tensor, v: Tensor, sums: _Sums, start: Tensor, over: Over) -> tuple[Tensor, Tensor]:
    """States [B, Hk, 1, chunks, K, V] at the start of every chunk, and the last one [B, Hk, K, V]."""
    until, whole = sums.until.exp().flatten(4, 5), sums.whole.exp()
    keys, values = k.flatten(4, 5), v.flatten(4, 5)
    if over == "key":
        written, kept = (keys * until).transpose(-1, -2) @ values, whole.unsqueeze(-1)
    else:
        written, kept = keys.transpose(-1, -2) @ (values * until), whole.unsqueeze(-2)
    state = start
    states = []
    for n in range(written.shape[3]):
        states.append(state)
        state = state * kept[:, :, 0, n] + written[:, :, 0, n]
    return torch.stack(states, 2).unsqueeze(2), state


def _start(k: Tensor, v: Tensor) -> Tensor:
    """An empty state [B, Hk, K, V]"""
    return k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])


def _between_tokens(g: Tensor) -> Tensor:
    """g [..., c, G] -> [..., i, j, G]: the sum behind token j up to and with token i; -inf where j > i."""
    c = g.shape[-2]
    rows, columns = (torch.arange(c, device=g.device).view(shape) for shape in ((-1, 1), (1, -1)))
    masked = torch.where((rows > columns)[..., None], g.unsqueeze(-2), 0.0)
    return masked.cumsum(-3).masked_fill((rows < columns)[..., None], -torch.inf)


def _after(x: Tensor, dim: int) -> Tensor:
    """Sums of all that lies behind each place."""
    return _before(x.flip(dim), dim).flip(dim)


def _before(x: Tensor, dim: int) -> Tensor:
    """Sums of all that lies before each place."""
    found = x.cumsum(dim)
    zero = torch.zeros_like(found.narrow(dim, 0, 1))
    return torch.cat((zero, found.narrow(dim, 0, found.shape[dim] - 1)), dim)
