"""What was read from source files in earlier runs: hashes of their trees, names that they import.

Parsing what a method's result depends on takes a second, so what came out is kept in the user's cache, by the
path, size and time of change of each file. A file that was changed within the last seconds could change again
within the same tick of the clock; nothing is kept of it.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from hashlib import blake2b
from typing import Any

from effc import HOMES
from effc.specs import user_cache

Stamp = tuple[str, int, int]
"""Path, time of change in ns, size."""

SETTLED = 2_000_000_000
"""Nanoseconds after which a file that changes again also shows another time of change."""


class ReadSources:
    """Facts of source files by name, each true as long as the file's stamp is."""

    def __init__(self, reader: Stamp) -> None:
        """`reader` is the file whose code derives the facts; another reader finds nothing."""
        where = blake2b(reader[0].encode(), digest_size=4).hexdigest()
        self._name = f"sources-{where}.json"
        homes = blake2b(repr(sorted(HOMES.items())).encode(), digest_size=8).hexdigest()
        self._key = f"py{sys.version_info[0]}.{sys.version_info[1]} {reader[1]} {reader[2]} {homes}"
        self._held: dict[str, dict[str, Any]] | None = None
        self._new = False

    def get(self, stamp: Stamp, what: str) -> Any:
        """A fact of a file; None when it is not known of the file as it is now."""
        found = self._all().get(stamp[0])
        return found.get(what) if found is not None and found["stamp"] == [stamp[1], stamp[2]] else None

    def put(self, stamp: Stamp, what: str, fact: Any) -> None:
        """Take in a fact, plain JSON that is not None."""
        if time.time_ns() - stamp[1] < SETTLED:
            return
        held, now = self._all(), [stamp[1], stamp[2]]
        if stamp[0] not in held or held[stamp[0]]["stamp"] != now:
            held[stamp[0]] = {"stamp": now}
        held[stamp[0]][what] = fact
        self._new = True

    def keep(self) -> None:
        """Write what is new to the cache, without files that are gone or were changed since."""
        if self._new:
            held = {path: facts for path, facts in self._all().items() if _stands(path, facts["stamp"])}
            user_cache.write(self._name, self._key, held)
            self._new = False

    def _all(self) -> dict[str, dict[str, Any]]:
        if self._held is not None:
            return self._held
        found: dict[str, dict[str, Any]] = user_cache.read(self._name, self._key) or {}
        self._held = found
        return found


def _stands(path: str, stamp: list[int]) -> bool:
    with suppress(OSError):
        stat = os.stat(path)
        return [stat.st_mtime_ns, stat.st_size] == stamp
    return False
