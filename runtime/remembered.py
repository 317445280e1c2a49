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

from effc.runtime.durable import publish_json
from effc.runtime.key import canonical
from effc.specs.diagnostic import EffcError


class Remembered:
    """A folder of measured values."""

    def __init__(self, folder: Path, aside: Path) -> None:
        self.folder, self.aside = folder, aside

    def get(self, question: Any, measure: Callable[[], Any]) -> Any:
        """The answer to a question, which is plain JSON that names all it depends on."""
        text = canonical(question)
        path = self.folder / f"{sha256(text.encode()).hexdigest()}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.read_bytes())
            if found["question"] == json.loads(text):
                return found["answer"]
        answer = measure()
        with suppress(EffcError):
            publish_json(path, {"question": question, "answer": answer}, self.aside)
        return answer
