"""Patterns: the grammar, what it refuses, and which places of real graphs it means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from effc.compiler import match
from effc.compiler.match import find
from effc.compiler.model import Model
from effc.compiler.pattern import Condition, Element, pattern
from effc.compiler.step import Step
from effc.compiler.trace import trace
from effc.compiler.view import SHAPE_ALONE, view
from effc.specs.diagnostic import EffcError


def test_words_captures_conditions_and_edges() -> None:
    read = pattern("n: norm[users=1, eps<=1e-5] -> linear|conv -> linear[dtype=bfloat16, bias!=true]")
    assert read.elements == (
        Element("n", ("norm",), (Condition("users", "=", 1), Condition("eps", "<=", 1e-5))),
        Element("linear", ("linear", "conv")),
        Element("linear2", ("linear",), (Condition("dtype", "=", "bfloat16"), Condition("bias", "!=", True))),
    )
    assert read.edges == ((0, 1), (1, 2))


def test_branches_joins_and_nodes_met_again() -> None:
    read = pattern("norm -> {q: linear, k: linear -> rope} -> attend; $norm -> $attend")
    assert [e.capture for e in read.elements] == ["norm", "q", "k", "rope", "attend"]
    assert set(read.edges) == {(0, 1), (0, 2), (2, 3), (1, 4), (3, 4), (0, 4)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "ends too early"),
        ("norm -> 2x", "`2x` is no element"),
        ("norm -> ", "ends too early"),
        ("norm linear", "`linear` is no element"),
        ("norm -> {linear, linear", "close the branches"),
        ("norm[users=1 -> linear", "close the conditions"),
        ("norm[users]", "`]` does not compare"),
        ("norm[=1]", "write a field and a value"),
        ("linear[dtype<bfloat16]", "`bfloat16` is no number"),
        ("linear[in=]", "write a number or a word"),
        ("a: norm -> a: linear", "`a` is captured twice"),
        ("norm -> $x", r"`\$x` is captured nowhere"),
        ("a: norm -> linear -> $a", "reads itself"),
        ("norm -> linear; add -> mlp", "hangs together with nothing"),
        (" -> ".join(["*"] * 33), "more than 32 elements"),
        ("x" * 2001, "at most 2000 fit"),
    ],
)
def test_bad_text_is_refused_with_its_place_and_a_remedy(text: str, words: str) -> None:
    with pytest.raises(EffcError, match=words) as caught:
        pattern(text)
    (problem,) = caught.value.diagnostics
    assert problem.code == "E404"
    assert problem.labels
    assert problem.help


def test_a_pattern_is_over_blocks_or_ops() -> None:
    with pytest.raises(EffcError, match="over blocks or over ops, not 'nodes'"):
        pattern("norm", over="nodes")


WORDS = st.sampled_from(["norm", "linear", "attention.q", "MLP", "add", "*"])
VALUES = st.one_of(
    st.integers(-9, 9999),
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: float(f"{x:.3e}")),
    st.sampled_from([True, False, None, "silu", "bfloat16"]),
)


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    value = draw(VALUES)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    sign = draw(st.sampled_from(["=", "!=", "<", "<=", ">", ">="] if number else ["=", "!="]))
    return Condition(draw(st.sampled_from(["users", "in", "dtype"])), sign, value)


@st.composite
def elements(draw: st.DrawFn) -> Element:
    name = draw(st.from_regex(r"[a-z]{1,4}[0-9]?", fullmatch=True))
    words = tuple(draw(st.lists(WORDS, min_size=1, max_size=3)))
    return Element(name, words, tuple(draw(st.lists(conditions(), max_size=3))))


def spelt(element: Element, space: str) -> str:
    def value(v: object) -> str:
        return {True: "true", False: "false", None: "none"}.get(v, str(v)) if not _number(v) else repr(v)

    inside = f",{space}".join(f"{c.field}{space}{c.sign}{space}{value(c.value)}" for c in element.conditions)
    head = f"{element.capture}{space}:{space}{f'{space}|{space}'.join(element.words)}"
    return f"{head}{space}[{inside}]" if element.conditions else head


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@given(
    st.lists(elements(), min_size=1, max_size=6, unique_by=lambda e: e.capture),
    st.sampled_from(["", " ", "\n\t"]),
    st.booleans(),
)
def test_what_is_written_is_read(made: list[Element], space: str, branched: bool) -> None:
    texts = [spelt(e, space) for e in made]
    if branched and len(made) > 1:
        text = f"{texts[0]}{space}->{space}{{{','.join(texts[1:])}}}"
        edges = tuple((0, i) for i in range(1, len(made)))
    else:
        text = f"{space}->{space}".join(texts)
        edges = tuple((i, i + 1) for i in range(len(made) - 1))
    read = pattern(text)
    assert read.elements == tuple(made)
    assert read.edges == edges


@given(st.text(alphabet='norm lia->{}[]$:;,|=<>!*019.e-"\\', max_size=40))
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    try:
        read = pattern(text)
    except EffcError as problem:
        codes = [d.code for d in problem.diagnostics]
    else:
        codes = ["E404"] if read.elements else []
    assert codes == ["E404"]


# -- places


def paths(model: Model, text: str, over: str = "blocks") -> list[tuple[str, ...]]:
    return [tuple(hit.paths.values()) for hit in find(model, pattern(text, over=over))]


def test_a_residual_is_found_by_meeting_its_node_again(tiny: Model) -> None:
    found = paths(tiny, "x: * -> norm -> mlp -> y: add; $x -> $y")
    assert [hit[1:3] for hit in found] == [(f"layers.{i}.norm2", f"layers.{i}.mlp") for i in range(3)]
    assert paths(tiny, "x: * -> norm -> mlp -> y: add; $norm -> $y") == []


def test_conditions_ask_blocks(made: Callable[[str], Model]) -> None:
    model = made("gemma2")
    even = [("layers.0.attention",), ("layers.2.attention",)]
    assert paths(model, "attention[window=4]") == even
    assert paths(model, "attention[window!=none, kv_heads<4]") == even
    assert paths(model, "attention[layer>=3]") == [("layers.3.attention",)]
    assert paths(model, "norm[offset=1, users=1] -> linear[in=32, out=61, bias=false]") == [("norm", "head")]
    assert paths(model, "linear[tied=true]") == []
    assert paths(made("llama"), "linear[tied=true, dtype=float32, params=1952]") == [("head",)]
    assert paths(made("llama"), "embedding[inputs=1, role=embedding] -> {norm, add}") == [
        ("embedding", "layers.0.norm1", "add")
    ]


def test_branches_are_readers_of_one_node_in_one_order(tiny: Model) -> None:
    text = "n: rms_norm[users=3] -> {q: linear, k: linear, v: linear}"
    assert paths(tiny, text, "ops") == [
        (f"layers.{i}.norm1", *(f"layers.{i}.attention.{p}" for p in "qkv")) for i in range(3)
    ]
    assert paths(tiny, "rms_norm[users=3] -> {v: attention.v, q: attention.q}", "ops") == [
        (f"layers.{i}.norm1", f"layers.{i}.attention.v", f"layers.{i}.attention.q") for i in range(3)
    ]


def test_operators_inside_blocks_and_across_them(tiny: Model) -> None:
    gated = "{a: linear -> activate[form=silu], b: linear} -> gate -> d: linear[out=32]"
    (first, *rest) = find(tiny, pattern(gated, over="ops"))
    assert [first["a"], first["b"], first["d"]] == [f"layers.0.mlp.{p}" for p in ("gate", "up", "down")]
    assert set(first.blocks.values()) == {"layers.0.mlp"}
    assert len(rest) == 2
    assert paths(tiny, "attend[cap=none, scale>0.3] -> join_heads -> attention.o -> add", "ops")[1][2:] == (
        "layers.1.attention.o",
        "add_2",
    )
    assert paths(tiny, "linear[block=MLP, in=48]", "ops") == [(f"layers.{i}.mlp.down",) for i in range(3)]


def test_a_callable_judges_a_hit_as_a_whole(tiny: Model) -> None:
    def heavy(model: Model, hit: object) -> bool:
        return bool(model.module(hit["mlp"]).up.weight.abs().max() > 1e9)

    assert find(tiny, pattern("norm -> mlp", where=heavy)) == []
    assert len(find(tiny, pattern("norm -> mlp", where=lambda model, hit: "1" in hit["mlp"]))) == 1


def test_functions_and_methods_of_traced_modules_are_words() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, groups=1)
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.conv(x)).mean((2, 3)))

    model = trace(Net(), torch.randn(2, 3, 8, 8))
    text = "input -> c: conv[in=3, out=4, kernel_size=3, groups=1] -> relu -> mean -> head: linear"
    for over in ("blocks", "ops"):
        (hit,) = find(model, pattern(text, over=over))
        assert (hit["c"], hit["head"]) == ("conv", "head")
    assert find(model, pattern("conv[kernel_size=5]")) == []


def test_a_field_that_nothing_has_is_refused(tiny: Model) -> None:
    with pytest.raises(EffcError, match="did you mean `users`") as caught:
        find(tiny, pattern("norm[usrs=1]"))
    assert caught.value.diagnostics[0].code == "E408"


def test_a_search_without_end_is_refused(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "MOST", 50)
    with pytest.raises(EffcError, match="fits more than 50 ways"):
        find(tiny, pattern(" -> ".join(["*"] * 8)))


def test_arguments_read_for_their_shape_alone_count_as_no_reader(family: Model) -> None:
    """The list of such arguments is true: other numbers of the same shape change nothing."""
    from effc.compiler.ops import OPS

    x = torch.randn(2, 5, 8)
    step = Step(torch.arange(5).expand(2, 5), token_types=torch.ones(2, 5, dtype=torch.long))
    calls = {
        "visible": ((step, x), {"causal": True, "window": 2}),
        "token_types": ((step, torch.zeros(2, 5, dtype=torch.long)), {}),
        "shape_like": ((x.flatten(), x), {}),
        "route": ((torch.randn(6, 4), x), {"active": 2, "renormalize": True}),
        "cast_like": ((x.double(), x), {}),
    }
    assert {name for name, _ in SHAPE_ALONE} == calls.keys()
    for name, place in SHAPE_ALONE:
        args, settings_ = calls[name]
        other = [a + 1 if i == place else a for i, a in enumerate(args)]
        one, two = OPS[name].run(*args, **settings_), OPS[name].run(*other, **settings_)
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (one, two)), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    for norm in (v for v in view(family, "ops") if v.op is not None and v.op.name.endswith("_norm")):
        assert all(user.op is None or user.op.name != "visible" for user in norm.users)


@settings(max_examples=30, deadline=None)
@given(st.permutations(["q: linear", "k: linear", "v: linear"]))
def test_the_order_of_branches_changes_no_place(order: list[str]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.q(y) + self.k(y) * self.v(y)

    model = trace(Net(), torch.randn(2, 4))
    (hit,) = find(model, pattern(f"norm -> {{{', '.join(order)}}}"))
    assert {hit[name] for name in "qkv"} == {"q", "k", "v"}
