"""JSON with one spelling for one value, for hashes."""

from __future__ import annotations

import json
from typing import Any


def canonical(data: Any) -> str:
    """Keys in order, no space, ASCII alone.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
