"""Selectors and rules over the modules of a model of twelve layers."""

from __future__ import annotations

import pytest

from effc.specs.diagnostic import EffcError
from effc.specs.select import Name, Rule, Selector, SelectorError, resolve, table_lines

ROLES = ("attention.q", "attention.o", "mlp.up", "mlp.down")
NAMES = [
    Name("embedding", "embedding"),
    *(Name(f"layers.{i}.{role}", role, i) for i in range(12) for role in ROLES),
    Name("head", "head"),
]


def layers(selector: str) -> list[int]:
    found = Selector.parse(selector).match(NAMES)
    return sorted({int(path.split(".")[1]) for path in found if path.startswith("layers")})


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ("layers[4..11].mlp.*", [4, 5, 6, 7, 8, 9, 10, 11]),
        ("layers[-4..]", [8, 9, 10, 11]),
        ("layers[::4]", [0, 4, 8]),
        ("layers[1..7:3].mlp", [1, 4, 7]),
        ("layers[0,2,-1].mlp.up", [0, 2, 11]),
        ("layers[..1]", [0, 1]),
        ("layers[3]", [3]),
        ("mlp", list(range(12))),
        ("attention.q", list(range(12))),
        ("layers[40]", []),
    ],
)
def test_layers(selector: str, wanted: list[int]) -> None:
    assert layers(selector) == wanted


def test_a_role_means_what_lies_below_it() -> None:
    assert Selector.parse("head").match(NAMES) == ["head"]
    assert len(Selector.parse("mlp").match(NAMES)) == 24


@pytest.mark.parametrize(
    "text", ["", "layers[4-11]", "layers[a]", "mlp[3].up", "a..b", "layers[::0]", "x" * 500]
)
def test_what_does_not_parse(text: str) -> None:
    with pytest.raises(SelectorError):
        Selector.parse(text)


def test_the_last_rule_wins_and_may_take_a_module_in() -> None:
    rules = [Rule(on="layers[0]", bits=8), Rule(on="layers[0].mlp.up", skip=True), Rule(on="head", bits=6)]
    table = resolve(["mlp"], ["layers[11]"], rules, NAMES)
    assert table["layers.0.mlp.down"] == {"bits": 8}
    assert table["layers.0.mlp.up"] is None
    assert table["layers.0.attention.q"] == {"bits": 8}
    assert table["layers.11.mlp.up"] is None
    assert table["layers.5.mlp.up"] == {}
    assert table["head"] == {"bits": 6}
    assert table["embedding"] is None


def test_no_match_names_near_misses() -> None:
    with pytest.raises(EffcError, match=r"E231(.|\n)*did you mean `mlp.up`"):
        resolve(["mlp.upp"], [], [], NAMES)
    with pytest.raises(EffcError, match=r"layers\[0..11\]"):
        resolve(["layers[40]"], [], [], NAMES)


def test_a_shadowed_rule_is_refused() -> None:
    with pytest.raises(EffcError, match="E232"):
        resolve(["mlp"], [], [Rule(on="layers[3].mlp", bits=8), Rule(on="mlp", bits=3)], NAMES)


def test_the_table_is_printable() -> None:
    table = resolve(["mlp.up"], [], [Rule(on="layers[-2..].mlp.up", bits=8)], NAMES)
    lines = table_lines(table, NAMES)
    assert any(line.split() == ["layers[10..11].mlp.up", "bits", "=", "8"] for line in lines)
    assert any(line.split() == ["layers[0..9].mlp.up", "as", "written"] for line in lines)
