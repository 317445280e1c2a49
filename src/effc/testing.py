"""What a package of methods tests its methods with: the very checks that effc's own methods pass.

def test_gain() -> None:
    effc.testing.check_method(Gain)
"""

from __future__ import annotations

from effc.runtime.method_checks import OF_AN_EXAMPLE, OF_THE_CLASS, check_method
from effc.runtime.tiny_models import Sequences, blank, filled, on_meta
from effc.runtime.trial import Trial

__all__ = [
    "OF_AN_EXAMPLE",
    "OF_THE_CLASS",
    "Sequences",
    "Trial",
    "blank",
    "check_method",
    "filled",
    "on_meta",
]
