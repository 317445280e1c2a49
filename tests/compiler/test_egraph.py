"""Equality saturation: what is extracted equals what went in, costs no more, and is the same every time."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effc.compiler.egraph import EGraph, Node, Rule, Shape, Term, Var
from effc.compiler.extract import extract
from effc.compiler.linear_terms import RULES, STARTED, computed, joined, known_by, price_of
from effc.specs.target import named_target

ALL = [rule for group in RULES.values() for rule in group]


def leaf(op: str, name: str) -> Term:
    return Term(op, (), name)


def apply(a: Term, v: Term) -> Term:
    return Term("apply", (a, v))


def add(u: Term, v: Term) -> Term:
    return Term("add", (u, v))


X = leaf("value", "x")


def simplified(
    term: Term, sizes: Any, cost: str = "flops", concat: bool = False, **limits: int
) -> tuple[Term, float, float]:
    """The cheapest form, its price, and that of the term itself."""
    graph = EGraph(known_by(sizes))
    root = graph.add(term)
    before = extract(graph, [root], price_of(cost))[1]
    graph.saturate(ALL, **limits, more=joined if concat else None)
    (found,), after = extract(graph, [root], price_of(cost))
    return found, after, before


# ---- the engine

A, B, C = (Var(n) for n in "abc")
COMMUTE = Rule("commute", Shape("+", (A, B)), Shape("+", (B, A)))
ASSOCIATE = Rule("associate", Shape("+", (Shape("+", (A, B)), C)), Shape("+", (A, Shape("+", (B, C)))))


def number(n: int) -> Term:
    return Term("n", (), n)


def plus(*terms: Term) -> Term:
    left, *rest = terms
    return Term("+", (left, plus(*rest))) if rest else left


def test_equal_terms_are_one_class() -> None:
    graph = EGraph()
    a, b = graph.add(plus(number(1), number(2))), graph.add(plus(number(2), number(1)))
    assert graph.find(a) != graph.find(b)
    assert graph.saturate([COMMUTE]).done
    assert graph.find(a) == graph.find(b)


def test_congruence_goes_upwards() -> None:
    """f(a) and f(b) are one as soon as a and b are, and so are g(f(a)) and g(f(b))."""
    graph = EGraph()
    a, b = graph.add(Term("a")), graph.add(Term("b"))
    fa, fb = graph.put("f", a), graph.put("f", b)
    ga, gb = graph.put("g", fa), graph.put("g", fb)
    graph.unite(a, b)
    graph.rebuild()
    assert graph.find(fa) == graph.find(fb)
    assert graph.find(ga) == graph.find(gb)
    assert graph.put("g", graph.put("f", b)) == graph.find(ga)


def test_sums_of_one_set_are_one_class() -> None:
    graph = EGraph()
    first = graph.add(plus(*map(number, (1, 2, 3, 4))))
    second = graph.add(plus(*map(number, (4, 2, 1, 3))))
    end = graph.saturate([COMMUTE, ASSOCIATE])
    assert end.done
    assert graph.find(first) == graph.find(second)
    assert end.applied["commute"] > 0
    assert end.applied["associate"] > 0


def test_limits_stop_what_would_not_end() -> None:
    grow = Rule("grow", A, Shape("f", (A,)))
    few = Rule("grow", Shape("f", (A,)), Shape("f", (Shape("g", (A,)),)))
    graph = EGraph()
    graph.add(Term("f", (Term("a"),)))
    assert not graph.saturate([few], rounds=5).done
    assert graph.size < 50
    graph = EGraph()
    graph.add(Term("a"))
    end = graph.saturate([grow], rounds=1000, nodes=100)
    assert graph.size <= 101
    assert end.nodes == graph.size


def test_what_is_known_must_agree() -> None:
    graph = EGraph(lambda node, args: node.data)
    a, b = graph.put("n", data=1), graph.put("n", data=2)
    with pytest.raises(ValueError, match="cannot be equal"):
        graph.unite(a, b)


def chain_price(node: Node, made: Any, args: Any) -> float:
    return args[0].rows * args[0].columns * args[1].columns if node.op == "product" else 1e-6


def chained(sides: list[int]) -> tuple[int, int]:
    """Multiplications of the cheapest order of a chain of matrices, extracted and by dynamic programming."""
    count = len(sides) - 1
    sizes = {("matrix", str(i)): (sides[i], sides[i + 1]) for i in range(count)}
    term = leaf("matrix", "0")
    for i in range(1, count):
        term = Term("product", (term, leaf("matrix", str(i))))
    a, b, c = Var("a"), Var("b"), Var("c")
    left, right = (
        Shape("product", (Shape("product", (a, b)), c)),
        Shape("product", (a, Shape("product", (b, c)))),
    )
    graph = EGraph(known_by(sizes))
    root = graph.add(term)
    assert graph.saturate([Rule("l", left, right), Rule("r", right, left)]).done

    @cache
    def best(i: int, j: int) -> int:
        if i == j:
            return 0
        return min(best(i, k) + best(k + 1, j) + sides[i] * sides[k + 1] * sides[j + 1] for k in range(i, j))

    return round(extract(graph, [root], chain_price)[1]), best(0, count - 1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=3, max_size=7))
def test_the_order_of_a_chain_is_that_of_dynamic_programming(sides: list[int]) -> None:
    found, best = chained(sides)
    assert found == best


def test_the_card_s_chain() -> None:
    """A(B(Cx)) with A 8 x 64, B 64 x 64, C 64 x 8 is one matrix of 8 x 8."""
    sizes = {
        ("matrix", "A"): (8, 64),
        ("matrix", "B"): (64, 64),
        ("matrix", "C"): (64, 8),
        ("value", "x"): (8,),
    }
    term = apply(leaf("matrix", "A"), apply(leaf("matrix", "B"), apply(leaf("matrix", "C"), X)))
    found, after, before = simplified(term, sizes)
    assert (round(after), round(before)) == (2 * 64, 2 * (512 + 4096 + 512))
    assert found.op == "apply"
    assert found.args[1] == X


# ---- linear algebra


def leaves_of(sizes: Any, seed: int = 0) -> dict[tuple[str, str], Tensor]:
    dice = torch.Generator().manual_seed(seed)
    made = {}
    for (op, name), shape in sizes.items():
        size = (3, *shape) if op == "value" else shape
        made[op, name] = torch.randn(size, generator=dice, dtype=torch.float64)
    return made


WIDTHS = (2, 3, 5)


def matrices() -> dict[tuple[str, str], tuple[int, ...]]:
    found: dict[tuple[str, str], tuple[int, ...]] = {
        ("matrix", f"m{o}{i}{k}"): (o, i) for o in WIDTHS for i in WIDTHS for k in (0, 1)
    }
    for n in WIDTHS:
        found |= {("value", f"x{n}"): (n,), ("vector", f"c{n}"): (n,), ("diag", f"d{n}"): (n,)}
    return found


SIZES = matrices()


def values(width: int, depth: int) -> st.SearchStrategy[Term]:
    """Random terms that give so many channels."""
    known = st.sampled_from([leaf("value", f"x{width}"), leaf("vector", f"c{width}")])
    if depth == 0:
        return known
    inner = values(width, depth - 1)
    applied = st.sampled_from(WIDTHS).flatmap(
        lambda i: st.builds(
            lambda k, v: apply(leaf("matrix", f"m{width}{i}{k}"), v), st.integers(0, 1), values(i, depth - 1)
        )
    )
    gained = inner.map(lambda v: apply(leaf("diag", f"d{width}"), v))
    scaled = st.builds(lambda s, v: Term("scale", (v,), s), st.sampled_from([0.5, -2.0, 3.0]), inner)
    return st.one_of(known, applied, applied, gained, scaled, st.builds(add, inner, inner))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(WIDTHS).flatmap(lambda n: values(n, 4)), st.sampled_from(["flops", "bytes", "latency"])
)
def test_an_extracted_term_equals_the_one_that_went_in(term: Term, cost: str) -> None:
    found, after, before = simplified(term, SIZES, cost, concat=True, rounds=6, nodes=1500)
    held = leaves_of(SIZES)
    want, got = computed(term, held), computed(found, held)
    assert got.shape == want.shape or got.expand(want.shape).shape == want.shape
    scale = 1 + float(want.abs().max())
    assert float((got - want).abs().max()) < 1e-9 * scale
    assert after <= before + 1e-9


def test_an_adapter_goes_into_its_weight() -> None:
    sizes = {("matrix", "W"): (8, 8), ("matrix", "A"): (2, 8), ("matrix", "B"): (8, 2), ("value", "x"): (8,)}
    change = apply(leaf("matrix", "B"), Term("scale", (apply(leaf("matrix", "A"), X),), 0.5))
    found, after, _ = simplified(add(apply(leaf("matrix", "W"), X), change), sizes)
    assert round(after) == 2 * 64
    assert (found.op, found.args[1]) == ("apply", X)


def test_a_gain_goes_into_all_that_read_it_or_stays() -> None:
    sizes = {("matrix", "P"): (6, 4), ("matrix", "Q"): (6, 4), ("diag", "g"): (4,), ("value", "x"): (4,)}
    normed = apply(leaf("diag", "g"), X)
    p, q = (apply(leaf("matrix", n), normed) for n in "PQ")
    for roots, gained in (([p, q], False), ([p, q, normed], True)):
        graph = EGraph(known_by(sizes))
        numbers = [graph.add(root) for root in roots]
        graph.saturate(ALL)
        terms, total = extract(graph, numbers, price_of("flops"))
        assert round(total) == 2 * 2 * 24 + 4 * gained
        assert (
            any(part.op == "apply" and part.args[0].op == "diag" for t in terms for part in t.parts())
            == gained
        )


def test_layers_of_one_input_become_one_where_starting_costs() -> None:
    sizes = {("matrix", "P"): (6, 4), ("matrix", "Q"): (2, 4), ("value", "x"): (4,)}
    term = add(apply(leaf("matrix", "Q"), X), Term("take", (apply(leaf("matrix", "P"), X),), (1, 2)))
    found, after, before = simplified(term, sizes, "latency", concat=True)
    assert after < before
    assert any(part.op == "rows" for part in found.parts())
    held = leaves_of(sizes)
    assert torch.allclose(computed(term, held), computed(found, held))


def test_shapes_that_do_not_fit_are_refused() -> None:
    graph = EGraph(known_by({("matrix", "A"): (2, 3), ("value", "x"): (4,)}))
    with pytest.raises(ValueError, match="apply does not take"):
        graph.add(apply(leaf("matrix", "A"), X))


def test_the_start_of_an_operation_is_that_of_the_target() -> None:
    target = named_target("cpu-2core")
    assert pytest.approx(target.overhead * target.bandwidth) == STARTED


def test_two_runs_give_the_same_term_whatever_the_hashes() -> None:
    code = "\n".join(
        [
            "import sys; sys.path.insert(0, '.')",
            "from tests.compiler.test_egraph import *",
            "x3, x2, c2 = leaf('value', 'x3'), leaf('value', 'x2'), leaf('vector', 'c2')",
            "t = add(apply(leaf('matrix', 'm230'), x3), apply(leaf('matrix', 'm231'), x3))",
            "t = add(Term('scale', (t,), 0.5), apply(leaf('matrix', 'm220'), add(x2, c2)))",
            "print(simplified(t, SIZES, 'latency', concat=True))",
        ]
    )
    said = set()
    for seed in ("0", "1", "77"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed},
        )
        said.add(done.stdout)
    assert len(said) == 1
    assert "apply" in said.pop()
