"""Where generated code lies: a folder of the user's cache that belongs to the user and nobody else can write.

What it holds runs in this process, so a folder that others could have filled is not used.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from effc.specs import user_cache


@cache
def folder() -> Path:
    """The cache of code, or a folder of this process when the user's cannot be trusted or written."""
    found = user_cache.folder() / "kernels"
    try:
        found.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = found.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(found, os.W_OK):
            return found
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="effc-kernels-"))
