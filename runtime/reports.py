"""Reports in the store: manifests without a model, under the key of their analysis."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from effc.runtime.store import Store


def keep_report(store: Store, key: str, report: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Keep what an analysis said.

    Raises:
        EffcError: E601 when the disk is full, E602 when it cannot be written.
    """
    said = json.loads(json.dumps(report))  # what is published equals what is read
    store.keep(key, {"report": said, "tensors": {}, "tokenizer": None, "about": dict(about)})


def kept_report(store: Store, key: str) -> dict[str, Any] | None:
    """What an analysis said under a key; None when it never ran."""
    record = store.record(key)
    if record is None or not isinstance(report := record.get("report"), dict):
        return None
    with suppress(OSError):
        os.utime(store.results / f"{key}.json")  # last use, for gc
    return report
