"""Rotary positions: the frequencies of every scaling that checkpoints use, and the rotation.

Shapes: h head width, r rotated width (r <= h), F = ceil(r / 2) frequencies, q [B, H, T, h].
Parameters are those of transformers 5 `rope_parameters`: rope_type, rope_theta, factor and so on; beside
them `max_position_embeddings`, which the dynamic and long forms need. Angles are computed in float32.
Formulas: linear (arXiv 2306.15595), dynamic (NTK), yarn (arXiv 2309.00071), longrope (arXiv 2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effc.compiler.step import Step

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}


def checked(rope: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The parameters as a plain dict, keys in order.

    Raises:
        ValueError: an unknown rope_type, a key that the type needs is absent, or numbers without frequencies.
    """
    form = rope.get("rope_type", "default")
    if form not in TYPES:
        raise ValueError(f"rope_type is one of {', '.join(TYPES)}, not {form!r}")
    for key in ("rope_theta", *_NEEDS.get(form, ())):
        if rope.get(key) is None:
            raise ValueError(f"rope_type {form!r} needs {key}")
    for key, value in rope.items():
        numbers = value if key in ("short_factor", "long_factor") else [value]
        if key != "rope_type" and not all(n is None or isinstance(n, int | float) for n in numbers):
            raise ValueError(f"{key} must be a number, not {str(value)[:40]!r}")
    if not rope["rope_theta"] > 0:
        raise ValueError(f"rope_theta must be above 0, not {rope['rope_theta']}")
    try:
        found, _ = frequencies(rope, head_dim, torch.ones(1, 1))
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"rope_parameters give no frequencies: {error}") from None
    if not 0 < 2 * found.shape[-1] <= head_dim or not bool(found.isfinite().all()):
        raise ValueError(f"rope_parameters give no frequencies for heads of {head_dim}")
    return {key: list(v) if isinstance(v, tuple) else v for key, v in sorted(rope.items())}


def rotated(rope: Mapping[str, Any], head_dim: int) -> int:
    """How many of a head's dimensions rotate: 25 % of 12 is 3, and pairs make it 4."""
    width = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return 2 * math.ceil(width / 2)


def frequencies(rope: Mapping[str, Any], head_dim: int, lengths: Tensor) -> tuple[Tensor, float]:
    """Inverse frequencies [1 or B, F] float32 and the factor on cos and sin. `lengths`: [B, 1]."""
    form = rope.get("rope_type", "default")
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    base = float(rope["rope_theta"])
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=lengths.device) / dim
    plain = (1.0 / base**exponent)[None]
    if form == "linear":
        return plain / rope["factor"], 1.0
    if form == "dynamic":
        limit = rope["max_position_embeddings"]
        reach = lengths.clamp(min=limit).float()
        stretch = (rope["factor"] * reach / limit - (rope["factor"] - 1)) ** (dim / (dim - 2))
        stretched: Tensor = 1.0 / (base * stretch) ** exponent
        return stretched, 1.0
    if form == "llama3":
        return _llama3(rope, plain), 1.0
    if form == "yarn":
        return _yarn(rope, plain, base, dim)
    if form == "longrope":
        return _longrope(rope, base, exponent, lengths)
    return plain, 1.0


def changes(rope: Mapping[str, Any] | None, length: int) -> bool:
    """Does a row that grows from `length` tokens to one more get other frequencies, also for its past?"""
    form = rope.get("rope_type") if rope is not None else None
    if rope is None or form not in ("dynamic", "longrope"):
        return False
    if form == "dynamic":
        return bool(length >= rope["max_position_embeddings"])
    return bool(length == rope["original_max_position_embeddings"])


def _llama3(rope: Mapping[str, Any], plain: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    blend = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    mixed: Tensor = (1 - blend) * plain / factor + blend * plain
    return mixed


def _yarn(rope: Mapping[str, Any], plain: Tensor, base: float, dim: int) -> tuple[Tensor, float]:
    """Per dimension between keeping (fast) and interpolating (slow); cos and sin grow with log(factor)."""
    old = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or rope["max_position_embeddings"] / old

    def place(turns: float) -> float:
        return dim * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = place(rope.get("beta_fast") or 32), place(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=plain.device) - low) / (high - low)).clamp(
        0, 1
    )
    scaled = plain / factor * ramp + plain * (1 - ramp)
    attention = rope.get("attention_factor")
    if attention is None:
        m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
        attention = _grow(factor, m) / _grow(factor, m_all) if m and m_all else _grow(factor, 1.0)
    return scaled, float(attention)


def _grow(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(
    rope: Mapping[str, Any], base: float, exponent: Tensor, lengths: Tensor
) -> tuple[Tensor, float]:
    """A factor per frequency, one list for short rows and one for long ones."""
    old = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or rope.get("max_position_embeddings", old) / old
    short = torch.tensor(rope["short_factor"], dtype=torch.float32, device=exponent.device)
    long = torch.tensor(rope["long_factor"], dtype=torch.float32, device=exponent.device)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    return 1.0 / (torch.where(lengths > old, long, short) * base**exponent), float(attention)


def tables(rope: Mapping[str, Any], head_dim: int, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, T, r], made once a step."""
    key = ("rope", str(rope), head_dim, dtype)
    if key not in step.memo:
        inverse, factor = frequencies(rope, head_dim, step.lengths())
        angles = step.positions[:, None, :, None].float() * inverse[:, None, None, :]
        both = torch.cat((angles, angles), -1)
        step.memo[key] = ((both.cos() * factor).to(dtype), (both.sin() * factor).to(dtype))
    found: tuple[Tensor, Tensor] = step.memo[key]
    return found


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, h]: the first r dimensions turn, in halves (x1, x2) -> (x1 c - x2 s, x2 c + x1 s)."""
    r = cos.shape[-1]
    turning, rest = (x, None) if r == x.shape[-1] else (x[..., :r], x[..., r:])
    first, second = turning.chunk(2, -1)
    turned = turning * cos + torch.cat((-second, first), -1) * sin
    return turned if rest is None else torch.cat((turned, rest), -1)
