"""Laws of the two surfaces: printing and parsing are inverse, and printing twice is printing once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effc.dsl import text, tree, yaml_twin
from effc.dsl.read import parse, read, read_file
from effc.dsl.resolved import text_of
from effc.dsl.to_yaml import canonical, to_yaml
from effc.dsl.tree import Document
from effc.dsl.unparse import unparse
from effc.runtime.catalogue import catalogue
from effc.specs.source import Source, Span

HERE = Span(Source("", ""), 0, 0)
WORDS = (
    "a",
    "b2",
    "thin",
    "heal_1",
    "base",
    "x",
    "keep",
    "seq",
    "_q",
    "Head",
    "prune",
    "depth",
    "adamw",
    "e5",
    "tokens",
)
words = st.sampled_from(WORDS)
keys = st.sampled_from((*WORDS, "data", "model", "as", "on", "yes"))
paths = st.lists(words, min_size=1, max_size=3).map(".".join)
units = st.sampled_from(
    [None, "%", "MB", "GiB", "M", "K", "M tokens", "tokens", "bits", "h", "ms", "points", "B"]
)
digits = st.one_of(
    st.integers(0, 10**12).map(str),
    st.floats(0, 1e12, allow_nan=False).map(repr),
    st.sampled_from(["1e-4", "3.5", ".5", "1.", "2E+3", "-7", "-0.25"]),
)
numbers = st.builds(lambda text, unit: tree.Number(text, unit, HERE), digits, units)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda text: tree.Text(text, HERE))
names = paths.map(lambda text: tree.Name(text, HERE))
patterns = st.builds(lambda a, b: tree.Pattern(f"{a}:{b}", HERE), st.integers(0, 99), st.integers(0, 99))
constants = st.sampled_from([True, False, None]).map(lambda value: tree.Constant(value, HERE))


def entries(values: st.SearchStrategy[tree.Value]) -> st.SearchStrategy[tuple[tree.Entry, ...]]:
    made = st.dictionaries(keys, values, max_size=3)
    return made.map(lambda d: tuple(tree.Entry(tree.Word(k, HERE), v) for k, v in d.items()))


def calls(values: st.SearchStrategy[tree.Value]) -> st.SearchStrategy[tree.Call]:
    """Calls; several bare names side by side are left out, because YAML writes them as one list."""
    return st.builds(
        lambda name, given, named: tree.Call(tree.Word(name, HERE), tuple(given), named, HERE),
        paths,
        st.lists(values, max_size=2).filter(
            lambda g: len(g) < 2 or not all(isinstance(v, tree.Name) for v in g)
        ),
        entries(values),
    ).filter(lambda call: call.name.text not in {entry.key.text for entry in call.named})


def _grown(values: st.SearchStrategy[tree.Value]) -> st.SearchStrategy[tree.Value]:
    lists = st.lists(values, max_size=3).map(lambda items: tree.List(tuple(items), HERE))
    tables = entries(values).map(lambda made: tree.Table(made, HERE))
    return st.one_of(lists, tables, calls(values))


values = st.recursive(st.one_of(numbers, texts, names, patterns, constants), _grown, max_leaves=5)


def _word(text: str) -> tree.Word:
    return tree.Word(text, HERE)


@st.composite
def documents(draw: st.DrawFn) -> tree.Document:
    """A document in which every name is bound once, in any order of statements."""
    bound = draw(st.lists(words, min_size=1, max_size=6, unique=True))
    statements: list[tree.Statement] = []
    for name in bound:
        kind = draw(st.sampled_from(["let", "param", "model", "data", "stage", "use"]))
        if kind in ("let", "param"):
            statements.append(tree.Let(kind, _word(name), draw(values), HERE))
        elif kind == "use":
            statements.append(tree.Use(draw(texts), _word(name), HERE))
        else:
            statements.append(tree.Bind(kind, _word(name), draw(calls(values)), HERE))
    for _ in range(draw(st.integers(0, 2))):
        op = draw(st.sampled_from(["<=", ">=", "<", ">", "=="]))
        statements.append(tree.Expect(draw(_sides()), op, draw(_sides()), HERE))
    for name in draw(st.lists(words, max_size=2, unique=True)):
        formats = tuple(draw(st.lists(calls(values), min_size=1, max_size=2)))
        statements.append(tree.Export(_word(name), formats, HERE))
    title = draw(st.none() | texts)
    head = (tree.Version(tree.Number("1", None, HERE), HERE), tree.Title(_word(draw(words)), title, HERE))
    return tree.Document((*head, *statements), HERE.source)


@st.composite
def _sides(draw: st.DrawFn) -> tree.Side:
    base = draw(st.one_of(names, numbers, calls(names)))
    if draw(st.booleans()):
        return tree.Side(base, None, None, HERE)
    amount = draw(numbers.filter(lambda n: not n.text.startswith("-")))
    return tree.Side(base, draw(st.sampled_from(["+", "-"])), amount, HERE)


RECIPES = sorted((Path(__file__).parents[2] / "specs" / "recipes").glob("*.effc"))


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents())
def test_text_comes_back(document: Document) -> None:
    again, problems = text.parse(Source("again.effc", unparse(document)))
    assert problems == []
    assert again == document


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents())
def test_yaml_comes_back(document: Document) -> None:
    again, problems = yaml_twin.parse(Source("again.yaml", to_yaml(document)))
    assert problems == []
    assert again.statements == canonical(document)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(documents())
def test_formatting_twice_is_formatting_once(document: Document) -> None:
    once = unparse(text.parse(Source("once.effc", unparse(document)))[0])
    assert unparse(text.parse(Source("twice.effc", once))[0]) == once


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_are_canonical(path: Path) -> None:
    written = path.read_text(encoding="utf-8")
    assert unparse(parse(Source(path.name, written))[0]) == written


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_both_surfaces_mean_the_same(path: Path) -> None:
    source = Source(path.name, path.read_text(encoding="utf-8"))
    twin = Source("twin.yaml", to_yaml(parse(source)[0]))
    one, other = read(source, catalogue()).recipe, read(twin, catalogue()).recipe
    assert {b.name: b for b in one.bindings} == {b.name: b for b in other.bindings}
    assert one.expects == other.expects
    assert set(map(repr, one.exports)) == set(map(repr, other.exports))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_a_resolved_recipe_reads_as_itself(path: Path) -> None:
    one = read(Source(path.name, path.read_text(encoding="utf-8")), catalogue()).recipe
    other = read(Source("resolved.effc", text_of(one, catalogue())), catalogue()).recipe
    assert other.bindings == one.bindings
    assert [(e.left, e.op) for e in other.expects] == [(e.left, e.op) for e in one.expects]
    for mine, yours in zip(one.expects, other.expects, strict=True):
        assert yours.right.base == mine.right.base
        assert yours.right.change == pytest.approx(mine.right.change)
    assert other.exports == one.exports


def test_names_of_used_files_stay_apart_when_resolved(tmp_path: Path) -> None:
    used = 'effc 1\nmodel base = load("a")\nmodel base_2 = load("b")\n'
    (tmp_path / "common.effc").write_text(used)
    main = tmp_path / "main.effc"
    main.write_text(
        'effc 1\nuse "common.effc" as c\nmodel c_base = load("d")\n'
        "one = quantize.rtn(c.base)\ntwo = quantize.rtn(c_base)\nthree = quantize.rtn(c.base_2)\n"
        "expect one.bytes <= c.base.bytes\n"
        'export one as artifact("1")\nexport two as artifact("2")\nexport three as artifact("3")\n'
    )
    other = read(Source("r.effc", text_of(read_file(main, catalogue())[0].recipe, catalogue())), catalogue())
    loaded = {b.name: b.call.arguments["path"] for b in other.recipe.bindings if b.keyword == "model"}
    taken = {b.name: loaded[b.call.models[0].name] for b in other.recipe.bindings if b.keyword == "stage"}
    assert taken == {"one": "a", "two": "d", "three": "b"}
    (expect,) = other.recipe.expects
    assert [loaded.get(m.model, m.model) for m in expect.metrics()] == ["one", "a"]
