"""Peaks: those of one stage hide nothing short and nothing of the stage before."""

from __future__ import annotations

import pytest

from effc.runtime import peak

MB = 1_000_000


@pytest.mark.parametrize("sampled", [False, True])
def test_a_peak_is_that_of_its_block(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if sampled:
        monkeypatch.setattr(peak, "_set_back", lambda: False)
    with peak.Peak() as large:
        held = bytearray(b"x" * (300 * MB))
        large._end.wait(0.1)
        del held
    with peak.Peak() as small:
        held = bytearray(b"x" * (30 * MB))
        small._end.wait(0.1)
        del held
    assert large.bytes - small.bytes > 200 * MB
    assert peak.high_water() >= large.bytes - MB
    assert small.seconds > 0.05
    assert small.work < small.seconds
