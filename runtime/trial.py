"""Trial: the examples of a method, each run once on a tiny random model, for checks to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from effc.compiler.method import Context, Data, Method, Outcome, Takes
from effc.compiler.model import Model
from effc.dsl import check as checking
from effc.dsl import scope
from effc.dsl.files import Reader
from effc.dsl.text import parse
from effc.runtime.bind import made, method_of
from effc.runtime.catalogue import catalogue
from effc.runtime.data._several import Several
from effc.runtime.describe_fields import entry
from effc.runtime.stage import run_stage
from effc.runtime.tiny_models import Sequences, blank, filled
from effc.specs.catalogue import Catalogue, Entry
from effc.specs.diagnostic import Diagnostic
from effc.specs.recipe import Binding, Ref
from effc.specs.source import Source

NEEDS = {
    "adapter": "adapt.lora(data = code, steps = 1, batch = 2)",
    "carved": "moe.carve(data = [code, prose], keep = 50%, router_width = 16)",
    "ensemble": "moe.ewa(experts = 3, every = 2)",
    "formed": "reparam.low_rank(rank = 8)",
    "gated": "moe.phatgoose_gate(data = code, steps = 1, batch = 2)",
    "mixture": "moe.upcycle(experts = 4, every = 3, balance = 0)",
}
"""Facts that a plain model lacks -> the stage that gives them."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One example: the method, what went in (with a copy of its numbers), and what came out."""

    method: Method
    inputs: list[Model]
    numbers: list[dict[str, Tensor]]
    outcome: Outcome


class Trial:
    """A method class and its examples, each run once, when a check first asks."""

    def __init__(self, cls: type[Method], make: Callable[[int], Model] | None = None) -> None:
        """`make` gives the tiny model of a seed: by default a llama of six layers."""
        if not cls.examples:
            raise TypeError(
                f"{cls.__name__} has no examples; give at least one call, as a recipe would write it"
            )
        self.cls = cls
        self.kind: str = vars(cls).get("kind") or cls.examples[0].partition("(")[0]
        cls.kind = self.kind  # of a class in no package, as an entry point would do
        self.make = make or (lambda seed: filled(blank(), seed))
        self._ran: dict[str, Ran] = {}

    @property
    def entry(self) -> Entry:
        """What the catalogue says of it, or would say."""
        found = catalogue().find(self.kind)
        return found if found is not None else entry(self.cls, self.kind, "method", "", "model")

    @property
    def models(self) -> int:
        """How many models go in."""
        fewest, most = self.cls.models
        return max(fewest, 2 if most is None or most > 1 else 1)

    def problems(self, text: str) -> tuple[Binding | None, list[Diagnostic]]:
        """An example as a stage of a checked recipe, and what is wrong with it."""
        names = ", ".join(["base", *(f"other{i}" for i in range(1, self.models))])
        return _stage(text, names, self.models, Catalogue.of([*_others(self.kind), self.entry]))

    def method(self, text: str) -> Method:
        """The method of an example.

        Raises:
            AssertionError: the example does not parse, with what is wrong.
        """
        binding, wrong = self.problems(text)
        if binding is None or wrong:
            raise AssertionError("\n".join(p.render() for p in wrong))
        found = made(self.cls, binding.call)
        assert isinstance(found, Method)
        return found

    def ran(self, text: str) -> Ran:
        if text not in self._ran:
            method = self.method(text)
            same = getattr(self.cls, "same_base", False)
            inputs = [self.make(0 if same else seed) for seed in range(self.models)]
            for fact in method.contract.needs:
                if fact.name in NEEDS and fact.applies(method):
                    inputs = [_given(NEEDS[fact.name], model) for model in inputs]
            numbers = [{name: t.clone() for name, t in m.tensors().items()} for m in inputs]
            self._ran[text] = Ran(method, inputs, numbers, self.run(method, inputs))
        return self._ran[text]

    def run(self, method: Method, inputs: Sequence[Model]) -> Outcome:
        """What a stage makes, its weights in memory."""
        outcome = run_stage(method, inputs, self.context(method, inputs[0]))
        outcome.model.materialize()
        return outcome

    def context(self, method: Method, model: Model) -> Context:
        """Data and further models for every field that names some."""
        fields = type(method).model_fields.items()
        takes = {
            name: mark.value for name, info in fields for mark in info.metadata if isinstance(mark, Takes)
        }
        data: dict[str, Data] = {name: Sequences(model) for name, value in takes.items() if value == "data"}
        for name, value in method:
            refs = [item for item in value if isinstance(item, Ref)] if isinstance(value, tuple) else []
            if refs:
                parts = [Sequences(model, seed=seed) for seed in range(len(refs))]
                data[name] = Several([str(ref) for ref in refs], parts, [ref.split for ref in refs])
        models = {name: self.make(7) for name, value in takes.items() if value == "model"}
        data.setdefault("data", Sequences(model))
        return Context(seed=3, data=data, models=models)


def _others(kind: str) -> list[Entry]:
    return [known for known in catalogue().entries if known.kind != kind]


def _stage(text: str, names: str, models: int, known: Catalogue) -> tuple[Binding | None, list[Diagnostic]]:
    first = f"[{names}]" if models > 1 else names
    head, _, rest = text.partition("(")
    lines = ["effc 1", 'recipe example "one stage"']
    lines += [f'data {name} = corpus("python-stdlib", seq = 16)' for name in ("code", "prose")]
    lines += [f'model {name} = load("zoo:pylm")' for name in names.split(", ")]
    told = "findings" if head.startswith("analyze.") else "bytes"
    lines += [f"out = {head}({first}{', ' if rest != ')' else ''}{rest}", f"expect out.{told} >= 0"]
    document, problems = parse(Source("example", "\n".join(lines)))
    recipe = checking.check(scope.build(document, {}, problems, Reader(parse)), known, problems)
    binding = next((b for b in recipe.bindings if b.name == "out"), None)
    return binding, [p for p in problems if p.severity == "error"]


def _given(text: str, model: Model) -> Model:
    """The model after the stage of an example."""
    binding, _ = _stage(text, "base", 1, catalogue())
    if binding is None:
        raise TypeError(f"`{text}` is no stage")
    method = method_of(binding.call)
    for fact in method.contract.needs:
        if fact.name in NEEDS and fact.applies(method):
            model = _given(NEEDS[fact.name], model)
    return run_stage(method, [model], Trial(type(method)).context(method, model)).model
