"""zoo:pylm is small, models Python clearly better than counting does, and can be made again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from effc.compiler.cost import count
from effc.compiler.model import Model
from effc.runtime import zoo
from effc.runtime.data._packed import Packed
from effc.runtime.data.corpus import Corpus
from effc.runtime.evaluate import bits_per_byte, loss
from effc.runtime.load import load

FOLDER = Path(zoo.__file__).resolve().parents[1] / "specs" / "zoo" / "pylm"


@pytest.fixture(scope="module")
def pylm() -> Model:
    return load("zoo:pylm").materialize()


@pytest.fixture(scope="module")
def code(pylm: Model) -> Packed:
    assert pylm.tokenizer is not None
    return Corpus(name="python-stdlib", seq=256).open(pylm.tokenizer.files)


def test_it_is_small(pylm: Model) -> None:
    cost = count(pylm)
    assert 7e6 < cost.params < 9e6
    assert cost.bytes <= 20e6


def test_it_models_python(pylm: Model, code: Packed) -> None:
    bits = loss(pylm, code, limit=40) / math.log(2) / code.bytes_per_token
    assert bits < 1.45


def test_its_card_says_how_it_was_made() -> None:
    told = (FOLDER / "README.md").read_text()
    assert "5-gram over bytes" in told
    assert "make zoo" in told


@pytest.mark.claim
def test_it_beats_counting_by_a_clear_margin(pylm: Model, code: Packed) -> None:
    assert pylm.tokenizer is not None
    counted = zoo.baselines(dict(pylm.tokenizer.files))
    bits = bits_per_byte(pylm, code)
    assert bits < 0.75 * counted["5-gram over bytes"]
    assert bits < 0.9 * min(counted.values())


@pytest.mark.claim
def test_its_tokenizer_can_be_made_again(tmp_path: Path) -> None:
    zoo.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
