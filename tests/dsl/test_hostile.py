"""Whatever a file holds, effc answers with diagnostics, soon, in little memory, and without torch."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from effc.dsl.files import read_source, source_of
from effc.dsl.read import sweep
from effc.dsl.to_yaml import to_yaml
from effc.dsl.unparse import unparse
from effc.runtime.catalogue import catalogue
from effc.specs.diagnostic import EffcError
from effc.specs.source import Source

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "specs" / "recipes" / "quickstart.effc"
GOLDEN = ROOT / "tests" / "golden" / "errors"


def problems(raw: bytes, name: str = "hostile.effc") -> str:
    """What is said about a file of these bytes; only diagnostics may come out."""
    try:
        sweep(source_of(raw, name), catalogue())
    except EffcError as problem:
        return str(problem)
    return ""


HOSTILE = {
    "nothing": b"",
    "NULs": b"\0" * 1000,
    "bytes that are no text": bytes(range(256)) * 40,
    "a line of 10 MB": b"effc 1\n" + b"a" * 10_000_000,
    "a line of 900 kB": b"effc 1\nx = " + b"a" * 900_000,
    "a number of 100,000 digits": b"effc 1\nlet x = 1" + b"0" * 100_000,
    "a number with a huge exponent": b"effc 1\nlet x = 1e999999",
    "a number with a long unit": b"effc 1\nlet x = 1" + b"k " * 100_000,
    "100,000 open brackets": b"effc 1\nlet x = " + b"[" * 100_000,
    "100,000 closed brackets": b"effc 1\nlet x = " + b"]" * 100_000,
    "100,000 quotes": b"effc 1\nlet x = " + b'"' * 100_001,
    "100,000 bad lines": b"effc 1\n" + b"?\n" * 100_000,
    "100,000 constants": b"effc 1\n" + b"".join(b"let x%d = %d\n" % (i, i) for i in range(40_000)) + b"?",
    "a chain of constants": b"effc 1\n"
    + b"".join(b"let x%d = x%d\n" % (i, i + 1) for i in range(20_000))
    + b"model m = load(x0)\n",
    "direction marks": "effc 1\nlet x = \u202e\u2066 abc".encode(),
    "carriage returns": b"effc 1\r\r\rlet x = 1\r",
    "tabs": b"effc 1\n\t\tlet\tx\t=\t?\n",
}
HOSTILE_YAML = {
    "billion laughs": b"effc: 1\nlet:\n  a: &a [x, x]\n"
    + b"".join(b"  a%d: &b%d [*a, *a, *a]\n" % (i, i) for i in range(50)),
    "100,000 open brackets": b"effc: 1\nlet: " + b"[" * 100_000,
    "deep blocks": b"effc: 1\n" + b"".join(b" " * i + b"a:\n" for i in range(900)),
    "a tag": b"effc: 1\nlet: {x: !!python/object/apply:os.system [ls]}",
    "a merge key": b"effc: 1\nlet: {<<: {a: 1}}",
    "two documents": b"effc: 1\n---\neffc: 1\n",
    "a key that is a list": b"effc: 1\n? [a, b]\n: 1\n",
    "NULs": b"effc: 1\n\0\0",
    "a huge number": b"effc: 1\nlet: {x: 1e999999}",
    "only a list": b"[effc, 1]",
    "nothing": b"",
}


LIMIT = 10
"""Seconds of this process's own time for the worst file: some 3 times what a slow machine takes."""


def own_time() -> float:
    """Seconds that this process computed; a loaded machine does not add to it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text(name: str) -> None:
    start = own_time()
    assert "[E" in problems(HOSTILE[name])
    assert own_time() - start < LIMIT


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml(name: str) -> None:
    start = own_time()
    assert "[E" in problems(HOSTILE_YAML[name], "hostile.yaml")
    assert own_time() - start < LIMIT


def test_what_is_printed_cannot_drive_a_terminal() -> None:
    said = problems("effc 1\nlet x = \x1b[31m\u202e ?".encode())
    assert all(c.isprintable() or c == "\n" for c in said)


def test_a_huge_line_is_clipped() -> None:
    said = problems(b"effc 1\nlet x = " + b"a " * 100_000)
    assert max(map(len, said.splitlines())) < 300


def test_a_missing_file() -> None:
    with pytest.raises(EffcError, match="E114"):
        read_source(Path("there is no such file.effc"))


def test_a_sweep_is_bounded() -> None:
    values = ",".join(map(str, range(1, 301)))
    with pytest.raises(EffcError, match="E233"):
        sweep(Source("x.effc", "effc 1\nparam a = 1\n"), catalogue(), [f"a={values}"])


def mutated(text: bytes, draw: random.Random) -> bytes:
    """A few random edits: pieces cut, doubled, swapped, bytes changed, tokens of recipes put in."""
    tokens = (b"(", b")", b"[", b"{", b"}", b'"', b"=", b",", b"%", b"\n", b"  ", b"data", b"1e9",
              b"-", b"$x", b": ", b"\xff", b"\0", b"2:4", b"effc", b"use", b"!t ", b"*a", b"&a ")  # fmt: skip
    for _ in range(draw.randint(1, 6)):
        a, b = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + draw.randint(0, 30))
        match draw.randrange(5):
            case 0:
                text = text[:a] + text[b:]
            case 1:
                text = text[:b] + text[a:b] + text[b:]
            case 2:
                text = text[:a] + draw.choice(tokens) + text[a:]
            case 3:
                text = text[:a] + bytes([draw.randrange(256)]) + text[a + 1 :]
            case 4:
                c = draw.randrange(len(text) + 1)
                text = text[:c] + text[a:b] + text[c:]
    return text


def survive(count: int, seed: int) -> int:
    """Check mutated recipes; returns how many were refused."""
    draw = random.Random(seed)
    seeds = [
        p.read_bytes() for p in (QUICKSTART, *sorted(GOLDEN.glob("*.effc")), *sorted(GOLDEN.glob("*.yaml")))
    ]
    from effc.dsl.read import parse

    seeds.append(to_yaml(parse(source_of(QUICKSTART.read_bytes(), "q.effc"))[0]).encode())
    refused = 0
    for _ in range(count):
        raw = mutated(draw.choice(seeds), draw)
        refused += bool(problems(raw))
        try:
            document, found = parse(source_of(raw, "x.effc"))
        except EffcError:
            continue
        if not found:  # what parses can be printed, and the print parses
            assert unparse(document)
            assert to_yaml(document)
    return refused


def test_mutated_recipes_give_diagnostics() -> None:
    assert survive(600, seed=1) > 300


@pytest.mark.claim
def test_twenty_thousand_mutated_recipes_give_diagnostics() -> None:
    assert survive(20_000, seed=2) > 10_000


def test_check_imports_neither_torch_nor_what_is_slow() -> None:
    code = (
        "import sys; from effc.runtime.cli import main; main(['check', sys.argv[1]]);"
        "slow = {'torch', 'pydantic', 'lark', 'networkx', 'numpy', 'typer', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    catalogue()
    done = subprocess.run(
        [sys.executable, "-c", code, str(QUICKSTART)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def long_recipe(stages: int) -> bytes:
    lines = ["effc 1", 'model m0 = load("zoo:pylm")', 'data code = corpus("python-stdlib")']
    lines += [f"m{i} = adapt.full(m{i - 1}, data = code, steps = {i})" for i in range(1, stages + 1)]
    return "\n".join([*lines, f"expect m{stages}.bytes <= 6 MB"]).encode()


def test_time_grows_with_length_alone() -> None:
    def seconds(stages: int) -> float:
        raw, best = long_recipe(stages), 1e9
        for _ in range(3):
            start = own_time()
            assert problems(raw) == ""
            best = min(best, own_time() - start)
        return best

    seconds(50)
    assert seconds(500) < 8 * seconds(125)


def test_check_costs_less_than_a_third_of_a_second_beyond_pythons_own_start() -> None:
    def seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    catalogue()
    start = min(seconds("-c", "pass") for _ in range(2))
    assert min(seconds("-m", "effc", "check", str(QUICKSTART)) for _ in range(3)) - start < 0.3
