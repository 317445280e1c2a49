"""Numbers that were measured once and stay true: losses, contracts, fingerprints of files.

Each is a small JSON file under the hash of what it depends on. What cannot be read is measured again; what
cannot be written is measured again next time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from effc.runtime.canonical import canonical
from effc.specs.diagnostic import EffcError


class Remembered:
    """A folder of measured values."""

    def __init__(self, folder: Path, aside: Path) -> None:
        self.folder, self.aside = folder, aside

    def get(self, question: Any, measure: Callable[[], Any]) -> Any:
        """The answer to a question, which is plain JSON that names all it depends on."""
        if (known := self.known(question)) is not None:
            return known
        answer = measure()
        from effc.runtime.durable import publish_json  # brings torch, which reading does without

        with suppress(EffcError):
            publish_json(self._path(question), {"question": question, "answer": answer}, self.aside)
        return answer

    def known(self, question: Any) -> Any:
        """The answer where it is remembered; None otherwise."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self._path(question).read_bytes())
            if found["question"] == json.loads(canonical(question)):
                return found["answer"]
        return None

    def _path(self, question: Any) -> Path:
        return self.folder / f"{sha256(canonical(question).encode()).hexdigest()}.json"
