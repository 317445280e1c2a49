"""The contract of the extension point, held by every method, by its examples, without naming any.

The checks are public (`effc.testing`), so that methods of other packages are held to the very same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from effc import passes
from effc.testing import OF_AN_EXAMPLE, OF_THE_CLASS, Trial

Example = tuple[str, str]


@cache
def trial(kind: str) -> Trial:
    return Trial(passes.resolve(kind))


def name(check: Callable[..., None]) -> str:
    return check.__name__


def test_is_named_by_its_path(kind: str) -> None:
    assert passes.resolve(kind).kind == kind


@pytest.mark.parametrize("check", OF_THE_CLASS, ids=name)
def test_method(kind: str, check: Callable[[Trial], None]) -> None:
    held(kind, check)
    check(trial(kind))


@pytest.mark.parametrize("check", OF_AN_EXAMPLE, ids=name)
def test_example(example: Example, check: Callable[[Trial, str], None]) -> None:
    held(example[0], check)
    check(trial(example[0]), example[1])


def held(kind: str, check: Callable[..., None]) -> None:
    """Skips a check that the method waives, with its reason."""
    if reason := passes.resolve(kind).waives.get(check.__name__):
        pytest.skip(reason)
