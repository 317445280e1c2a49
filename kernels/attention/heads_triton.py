"""What attention kernels share as text of Triton: heads of any width, and scores that are capped.

A range of Triton has a power of two of lanes. Heads of another width take the next one, and what lies behind
them is neither read nor written.
"""

from __future__ import annotations

import math

LOG2E = math.log2(math.e)


def lanes(width: int) -> int:
    """The least power of two that is `width` at least."""
    return 1 << (width - 1).bit_length()


def rows_of(width: int, live: str, channels: str = "d") -> str:
    """The mask of [n, lanes] numbers, `live` [n] being that of rows."""
    return f"{live}[:, None]" + ("" if lanes(width) == width else f" & ({channels} < {width})[None, :]")


def columns_of(width: int, live: str, channels: str = "d") -> str:
    """The mask of [lanes, n] numbers, `live` [n] being that of columns."""
    return f"{live}[None, :]" + ("" if lanes(width) == width else f" & ({channels} < {width})[:, None]")


def scored(product: str, scale: float, cap: float | None) -> str:
    """Scores in base 2: scale times a product, brought between -cap and cap by a hyperbolic tangent."""
    if cap is None:
        return f"{product} * {scale * LOG2E!r}"
    return f"(tl.sigmoid({product} * {2 * scale / cap!r}) - 0.5) * {2 * cap * LOG2E!r}"


def bent(cap: float | None) -> str:
    """The factor of a slope that the cap makes of scores `s` in base 2; "" without one."""
    return "" if cap is None else f" * (1.0 - s * s * {(1 / (cap * LOG2E)) ** 2!r})"
