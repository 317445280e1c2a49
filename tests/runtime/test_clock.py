"""Times beside the stages: what is timed inside something else counts once; lines come as in plans."""

from __future__ import annotations

import pytest

from effc.runtime import clock


def test_what_lies_inside_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 10.0, 20.0, 25.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    found = clock.Clock()
    with found.on("expect", "1 judged"), found.on("data", "code"):
        pass
    with found.on("expect", "1 judged"):
        pass
    assert [(row.name, row.what, row.seconds) for row in found.rows()] == [
        ("data", "code", 3.0),
        ("expect", "1 judged", 12.0),
    ]
