"""The contract of the extension point, held by every method, by its examples, without naming any.

Each example runs once on a tiny random model; the tests look at what went in and what came out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from effc import passes
from effc.compiler import graph_json
from effc.compiler.cost import count
from effc.compiler.describe import page
from effc.compiler.facts import PREDICATES
from effc.compiler.method import Context, Method, Outcome, Takes
from effc.compiler.model import Model, roles_of
from effc.compiler.probe import probe
from effc.compiler.rewrite import Rewriter
from effc.dsl import check, scope
from effc.dsl.files import Reader
from effc.dsl.text import parse
from effc.runtime.bind import method_of
from effc.runtime.catalogue import catalogue
from effc.runtime.stage import run_stage
from effc.specs.recipe import Binding
from effc.specs.source import Source

from .tiny_models import Sequences, blank, filled, on_meta, outputs

Example = tuple[str, str]

NEEDS = {"adapter": "adapt.lora(data = code, steps = 1, batch = 2)"}
"""Facts that a plain model lacks -> the stage that gives them."""


@dataclass(frozen=True)
class Ran:
    """One example: the method, what went in (with a copy of its numbers), and what came out."""

    method: Method
    inputs: list[Model]
    numbers: list[dict[str, Tensor]]
    outcome: Outcome


@cache
def bound(text: str, models: int) -> Binding:
    """The example as a stage of a checked recipe."""
    names = ", ".join(["base", *(f"other{i}" for i in range(1, models))])
    first = f"[{names}]" if models > 1 else names
    head, _, rest = text.partition("(")
    call = f"{head}({first}{', ' if rest != ')' else ''}{rest}"
    lines = ["effc 1", 'recipe example "one stage"', 'data code = corpus("python-stdlib", seq = 16)']
    lines += [f'model {name} = load("zoo:pylm")' for name in names.split(", ")]
    lines += [f"out = {call}", "expect out.bytes > 0"]
    document, problems = parse(Source("example", "\n".join(lines)))
    whole = scope.build(document, {}, problems, Reader(parse))
    recipe = check.check(whole, catalogue(), problems)
    wrong = [p.render() for p in problems if p.severity == "error"]
    assert not wrong, "\n".join(wrong)
    return recipe.stage("out")


def made(text: str) -> tuple[Method, int]:
    """The method of an example, and how many models it takes."""
    kind = text.partition("(")[0]
    fewest, most = passes.resolve(kind).models
    models = max(fewest, 2 if most is None or most > 1 else 1)
    return method_of(bound(text, models).call), models


@cache
def ran(text: str) -> Ran:
    method, models = made(text)
    inputs = [filled(blank(), seed) for seed in range(models)]
    for fact in method.contract.needs:
        if fact.name in NEEDS:
            first, _ = made(NEEDS[fact.name])
            inputs = [run_stage(first, [model], _context(first, model)).model for model in inputs]
    numbers = [{name: t.clone() for name, t in m.tensors().items()} for m in inputs]
    return Ran(method, inputs, numbers, run(method, inputs))


def run(method: Method, inputs: list[Model]) -> Outcome:
    """What a stage makes, its weights in memory."""
    outcome = run_stage(method, inputs, _context(method, inputs[0]))
    outcome.model.materialize()
    return outcome


def _context(method: Method, model: Model) -> Context:
    """Data and further models for every field that names some."""
    fields = type(method).model_fields.items()
    takes = {name: mark.value for name, info in fields for mark in info.metadata if isinstance(mark, Takes)}
    data = {name: Sequences(model) for name, value in takes.items() if value == "data"}
    models = {name: filled(blank(), 7) for name, value in takes.items() if value == "model"}
    data.setdefault("data", Sequences(model))
    return Context(seed=3, data=data, models=models)


def test_is_named_by_its_path(kind: str) -> None:
    assert passes.resolve(kind).kind == kind


def test_documents_itself(kind: str) -> None:
    cls = passes.resolve(kind)
    text = page(cls)
    assert text.startswith(f"# `{kind}`\n")
    assert "**Use when:**" in text
    assert "**Costs:**" in text
    assert cls.paper.title in text
    assert all(example in text for example in cls.examples)
    assert all(info.description for info in cls.model_fields.values())


def test_no_unit_hides_a_bound(kind: str) -> None:
    """Of two bounds of one kind pydantic heeds the last, which may be that of the unit."""
    for name, info in passes.resolve(kind).model_fields.items():
        for bound in ("ge", "le"):
            found = [value for m in info.metadata if (value := getattr(m, bound, None)) is not None]
            assert len(set(found)) < 2, f"{name}: {bound} {found}"


def test_speaks_of_facts_that_can_be_measured(kind: str) -> None:
    contract = passes.resolve(kind).contract
    named = {fact.name for part in ("needs", "gives", "breaks", "keeps") for fact in getattr(contract, part)}
    assert named <= set(PREDICATES)


def test_refuses_an_argument_it_does_not_have(kind: str) -> None:
    with pytest.raises(ValidationError):
        passes.resolve(kind).model_validate({"surely_no_argument": 1})


def test_example_is_of_this_method(example: Example) -> None:
    method, _ = made(example[1])
    assert method.kind == example[0]
    assert hash(method) == hash(method_of(bound(example[1], made(example[1])[1]).call))


def test_leaves_its_input_alone(example: Example) -> None:
    one = ran(example[1])
    for model, before in zip(one.inputs, one.numbers, strict=True):
        after = model.tensors()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_logs_what_it_did(example: Example) -> None:
    assert ran(example[1]).outcome.log, "a method that changes nothing must refuse instead"


def test_keeps_its_contract(example: Example) -> None:
    one = ran(example[1])
    measured = probe(one.method, one.inputs[0], one.outcome.model)
    assert measured.held, measured.as_json()


def test_predicts_its_cost_exactly(example: Example) -> None:
    one = ran(example[1])
    first, *others = (on_meta(model) for model in one.inputs)
    rw = Rewriter(first, one.method.kind)
    one.method.outline(rw, others)
    assert count(rw.done(), 8) == count(one.outcome.model, 8)


def test_estimates_its_work_without_weights(example: Example) -> None:
    one = ran(example[1])
    work = one.method.work(on_meta(one.inputs[0]), seq=16)
    assert min(work.flops, work.solve, work.disk, work.memory) >= 0


def test_roles_stay_true(example: Example) -> None:
    model = ran(example[1]).outcome.model
    assert model.roles == roles_of(model.gm)


def test_saved_model_loads_equal(example: Example) -> None:
    model = ran(example[1]).outcome.model
    back = graph_json.from_json(graph_json.to_json(model))
    assert back.roles == model.roles
    assert back.ties() == model.ties()
    for name, tensor in model.tensors().items():
        back.place(name, tensor.detach())
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(outputs(back, ids), outputs(model, ids))


def test_same_seed_gives_the_same_numbers(example: Example) -> None:
    one = ran(example[1])
    first, again = one.outcome.model.tensors(), run(one.method, one.inputs).model.tensors()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
