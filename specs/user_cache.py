"""The user's cache: small JSON files that can be made again at any time, each under the key it was made for.

A file that is missing, damaged, of another key, or in a folder that cannot be written is simply not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def folder() -> Path:
    """`$XDG_CACHE_HOME/effc`, else `~/.cache/effc`."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return Path(given if Path(given).is_absolute() else Path.home() / ".cache") / "effc"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / "effc"


def read(name: str, key: str) -> Any:
    """What was kept under `name` for `key`; None when there is nothing to be trusted."""
    try:
        head, _, body = (folder() / name).read_text(encoding="utf-8").partition("\n")
        return json.loads(body) if head == _head(key, body) else None
    except (OSError, ValueError, RecursionError):
        return None


def write(name: str, key: str, data: Any) -> bool:
    """Keep `data` under `name` for `key`; false when the folder cannot be written."""
    body = json.dumps(data, separators=(",", ":"))
    place = folder() / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=place.parent, prefix=f".{name}.")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"{_head(key, body)}\n{body}")
        os.replace(aside, place)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        return False
    return True


def _head(key: str, body: str) -> str:
    return f"{key} {hashlib.blake2b(body.encode(), digest_size=16).hexdigest()}"
