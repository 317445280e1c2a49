"""KernelSpec: the frozen description of one kernel, with everything that changes its text or its sums."""

from __future__ import annotations

import hashlib
import json
from typing import ClassVar

from pydantic import BaseModel


class KernelSpec(BaseModel, frozen=True, extra="forbid", validate_default=True):
    """What an emitter is given. Two equal specs give equal text; a spec names no pointer and no device.

    What changes the order of a sum (splits of K, tiles of K) is a field; what is proved bit-equal (the number
    of threads, rows computed at once) is not.
    """

    op: ClassVar[str]
    version: ClassVar[int]
    """Raised when the emitted text changes, so that no key stands for two texts."""

    @property
    def key(self) -> str:
        """Name of the kernel: 16 hex digits over op, version and fields."""
        words = json.dumps([self.op, self.version, self.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """The fields as JSON on one line, for the head of the emitted file."""
        return json.dumps({"op": self.op} | self.model_dump(mode="json"))
