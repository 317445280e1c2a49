"""The contract of a method as checks that any method is held to, whoever wrote it, by its examples alone.

Each example runs once on a tiny random model; the checks look at what went in and what came out. Those that
take a trial look at the class, those that also take a text look at one example. A method leaves a check out
by `waives = {"name_of_the_check": "why"}`, which its page prints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import ValidationError

from effc.compiler import graph_json
from effc.compiler.cost import count
from effc.compiler.describe import page
from effc.compiler.facts import PREDICATES
from effc.compiler.method import Method
from effc.compiler.model import Model, roles_of
from effc.compiler.probe import probe
from effc.compiler.rewrite import Rewriter
from effc.runtime.tiny_models import blank, filled, on_meta, outputs
from effc.runtime.trial import Trial
from effc.specs.catalogue import Parameter
from effc.specs.codes import CODES
from effc.specs.diagnostic import EffcError

UNFIT = ("E202", "E204", "E209", "E210", "E215")
"""Codes of arguments that a method does not take."""


# -- checks of the class


def documents_itself(trial: Trial) -> None:
    cls, text = trial.cls, page(trial.cls)
    _true(text.startswith(f"# `{trial.kind}`\n"), "the page does not begin with the name")
    for heading in ("Use when:", "Costs:"):
        _true(f"**{heading}**" in text, f"the docstring lacks `{heading}`")
    _true(cls.paper.title in text, "the page does not cite the paper")
    _true(all(example in text for example in cls.examples), "an example is not on the page")
    bare = [name for name, info in cls.model_fields.items() if not info.description]
    _true(not bare, f"fields without a description: {', '.join(bare)}")


def hides_no_bound_behind_a_unit(trial: Trial) -> None:
    """Of two bounds of one kind pydantic heeds the last, which may be that of the unit."""
    for name, info in trial.cls.model_fields.items():
        for bound in ("ge", "le"):
            found = [value for m in info.metadata if (value := getattr(m, bound, None)) is not None]
            _true(len(set(found)) < 2, f"{name} has several bounds {bound}: {found}")


def speaks_of_facts_that_can_be_measured(trial: Trial) -> None:
    contract = trial.cls.contract
    named = {fact.name for part in ("needs", "gives", "breaks", "keeps") for fact in getattr(contract, part)}
    _true(named <= set(PREDICATES), f"no predicate measures {', '.join(sorted(named - set(PREDICATES)))}")


def refuses_an_argument_it_does_not_have(trial: Trial) -> None:
    try:
        trial.cls.model_validate({"surely_no_argument": 1})
    except ValidationError:
        return
    raise AssertionError("an argument that does not exist is taken in silence")


# -- checks of an example


def example_is_of_this_method(trial: Trial, text: str) -> None:
    method = trial.method(text)
    _true(text.partition("(")[0] == trial.kind, f"the example calls {text.partition('(')[0]}")
    _true(hash(method) == hash(trial.method(text)), "two readings of one example differ")


def refuses_bad_arguments_by_name(trial: Trial, text: str) -> None:
    """Arguments beyond their limits, of another type, or unknown: told at the argument, before a run."""
    head, _, rest = text.partition("(")
    given = {part.partition("=")[0].strip() for part in rest.replace("(", ",").split(",")}
    wrong: dict[str, tuple[str, tuple[str, ...]]] = {"surely_no_argument": ("1", ("E203",))}
    for parameter in trial.entry.parameters:
        if parameter.name not in given and (value := _beyond(parameter)) is not None:
            wrong[parameter.name] = (value, UNFIT)
    for name, (value, codes) in wrong.items():
        call = f"{head}({name} = {value}{', ' if rest != ')' else ''}{rest}"
        _, problems = trial.problems(call)
        told = [p for p in problems if p.code in codes and name in p.render()]
        said = "\n".join(p.render() for p in problems) or "nothing"
        _true(bool(told), f"{name} = {value} should be refused; said was {said}")


def says_why_it_refuses_a_model(trial: Trial, text: str) -> None:
    """Models it was not made for: either it takes them, or it says what is wrong and what to do instead."""
    method = trial.method(text)
    for model in _odd():
        try:
            found = method.refuses(model, [model] * trial.models)
        except EffcError as error:  # a selector that matches nothing
            found = error.diagnostics
        for problem in found:
            _true(problem.code in CODES, f"the code {problem.code} is not registered")
            _true(bool(problem.notes or problem.help), f"no note and no help: {problem.render()}")


def leaves_its_input_alone(trial: Trial, text: str) -> None:
    one = trial.ran(text)
    for model, before in zip(one.inputs, one.numbers, strict=True):
        after = model.tensors()
        _true(after.keys() == before.keys(), "a tensor of the input came or went")
        moved = [name for name in before if not torch.equal(after[name], before[name])]
        _true(not moved, f"tensors of the input were written: {', '.join(moved[:3])}")


def logs_what_it_did(trial: Trial, text: str) -> None:
    _true(bool(trial.ran(text).outcome.log), "a method that changes nothing must refuse instead")


def keeps_its_contract(trial: Trial, text: str) -> None:
    one = trial.ran(text)
    measured = probe(one.method, one.inputs[0], one.outcome.model)
    _true(measured.held, str(measured.as_json()))


def predicts_its_cost_exactly(trial: Trial, text: str) -> None:
    one = trial.ran(text)
    first, *others = (on_meta(model) for model in one.inputs)
    rw = Rewriter(first, one.method.kind)
    one.method.outline(rw, others)
    plan, run = count(rw.done(), 8), count(one.outcome.model, 8)
    if one.method.at_most:
        _true((plan.params, plan.bytes) >= (run.params, run.bytes), f"at most {plan}, and {run} came out")
        return
    _true(plan == run, f"the outline costs {plan}, the result {run}")


def estimates_its_work_without_weights(trial: Trial, text: str) -> None:
    one = trial.ran(text)
    work = one.method.work(on_meta(one.inputs[0]), seq=16)
    _true(min(work.flops, work.solve, work.disk, work.memory) >= 0, f"work is negative: {work}")


def roles_stay_true(trial: Trial, text: str) -> None:
    model = trial.ran(text).outcome.model
    _true(model.roles == roles_of(model.gm), "roles are not those that the paths imply")


def saved_model_loads_equal(trial: Trial, text: str) -> None:
    model = trial.ran(text).outcome.model
    back = graph_json.from_json(graph_json.to_json(model))
    _true(back.roles == model.roles, "roles differ after saving and loading")
    _true(back.ties() == model.ties(), "ties differ after saving and loading")
    for name, tensor in model.tensors().items():
        back.place(name, tensor.detach())
    ids = torch.arange(24).view(2, 12)
    _true(torch.equal(outputs(back, ids), outputs(model, ids)), "a loaded model gives other numbers")


def same_seed_gives_the_same_numbers(trial: Trial, text: str) -> None:
    one = trial.ran(text)
    first, again = one.outcome.model.tensors(), trial.run(one.method, one.inputs).model.tensors()
    _true(first.keys() == again.keys(), "two runs give tensors of other names")
    differ = [name for name in first if not torch.equal(first[name], again[name])]
    _true(not differ, f"two runs differ at {', '.join(differ[:3])}")


OF_THE_CLASS: tuple[Callable[[Trial], None], ...] = (
    documents_itself,
    hides_no_bound_behind_a_unit,
    speaks_of_facts_that_can_be_measured,
    refuses_an_argument_it_does_not_have,
)
OF_AN_EXAMPLE: tuple[Callable[[Trial, str], None], ...] = (
    example_is_of_this_method,
    refuses_bad_arguments_by_name,
    says_why_it_refuses_a_model,
    leaves_its_input_alone,
    logs_what_it_did,
    keeps_its_contract,
    predicts_its_cost_exactly,
    estimates_its_work_without_weights,
    roles_stay_true,
    saved_model_loads_equal,
    same_seed_gives_the_same_numbers,
)


def check_method(cls: type[Method], make: Callable[[int], Model] | None = None) -> list[str]:
    """Hold a method to its contract: every check on every example, in memory, in seconds.

    `make` gives the model of a seed to run on, where the tiny llama is not what the method is for. Returns
    the checks that were made, as `check: example`.

    Raises:
        AssertionError: every check that failed, by name, with what was found.
    """
    trial = Trial(cls, make)
    done: list[str] = []
    failed: list[str] = []

    def hold(label: str, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as problem:
            said = (
                str(problem)
                if isinstance(problem, AssertionError)
                else f"{type(problem).__name__}: {problem}"
            )
            failed.append(f"{label}\n    {said}")
        done.append(label)

    for check in OF_THE_CLASS:
        if check.__name__ not in cls.waives:
            hold(check.__name__, lambda check=check: check(trial))  # type: ignore[misc]
    for text in cls.examples:
        for one in OF_AN_EXAMPLE:
            if one.__name__ not in cls.waives:
                hold(f"{one.__name__}: {text}", lambda one=one, text=text: one(trial, text))  # type: ignore[misc]
    if failed:
        raise AssertionError(
            f"`{trial.kind}` fails {len(failed)} of {len(done)} checks\n" + "\n".join(failed)
        )
    return done


# -- small parts


def _true(found: bool, words: str) -> None:
    if not found:
        raise AssertionError(words)


def _beyond(parameter: Parameter) -> str | None:
    """A value that the argument does not take, as a recipe would write it."""
    for form in parameter.forms:
        if form.type in ("int", "float") and form.least is not None:
            return f"{form.least - 1:g}" if not form.open[0] else f"{form.least:g}"
        if form.type in ("int", "float") and form.greatest is not None:
            return f"{form.greatest + 1:g}"
        if form.type in ("word", "pattern"):
            return "surely_no_word"
        if form.type == "bool":
            return '"perhaps"'
    return None


def _odd() -> list[Model]:
    """One layer, a mixture of experts, packed weights, no weights at all."""
    from effc.passes.quantize.rtn import RTN

    rw = Rewriter(filled(blank(layers=2)))
    RTN(bits=8, group=16).rewrite(rw)
    one = filled(blank(layers=1, tied=False))
    return [one, filled(blank(layers=2, experts=4)), rw.done(), blank(layers=2)]
