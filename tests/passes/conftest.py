"""Every example of every method; a test that asks for `kind` or `example` runs once for each."""

from __future__ import annotations

import pytest

from effc import passes
from effc.compiler.model import Model

from .tiny_models import blank, filled


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "example" in metafunc.fixturenames:
        cases = [(kind, text) for kind in passes.kinds() for text in passes.resolve(kind).examples]
        metafunc.parametrize("example", cases, ids=[text for _, text in cases])
    elif "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", passes.kinds())


@pytest.fixture
def tiny() -> Model:
    return filled(blank())


@pytest.fixture
def mixture() -> Model:
    return filled(blank(layers=2, experts=4))
