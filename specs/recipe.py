"""Recipe: the checked tree. What `dsl` produces and every floor above consumes.

Numbers are in base units, names are resolved, parts have their canonical names. Everything here is a frozen
value without behavior, except the small pure evaluator of `expect` at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from effc.specs.source import Source, Span
from effc.specs.units import fmt_bytes, fmt_count, fmt_seconds

Kind = Literal["model", "data", "report"]
Keyword = Literal["model", "data", "stage"]


@dataclass(frozen=True, slots=True)
class Ref:
    """Another binding by name; for data also the split that is meant (None: the place decides)."""

    name: str
    split: str | None = None

    def __str__(self) -> str:
        return f"{self.name}.{self.split}" if self.split else self.name


@dataclass(frozen=True, slots=True)
class Call:
    """A method, part, source or export with what was written in its parentheses.

    `kind` is canonical: "quantize.gptq", "train.optimizer.adamw", "corpus", "load", "hf". `models` are the
    positional models in order; `arguments` holds what is given by name, a positional path included.
    """

    kind: str
    arguments: Mapping[str, Value]
    models: tuple[Ref, ...] = ()
    span: Span | None = field(default=None, compare=False, repr=False)
    spans: Mapping[str, Span] = field(default_factory=dict, compare=False, repr=False)
    """Where each argument was written, name and value; also "select[0]", "rules[1].on" and "models[0]"."""


Value = None | bool | int | float | str | tuple["Value", ...] | Mapping[str, "Value"] | Ref | Call
"""A gradient over the layers, `depth(0.3, 0.7)`, is a Call of kind "depth" with arguments `first`, `last`."""


@dataclass(frozen=True, slots=True)
class Binding:
    """`name = call(...)`: one value of the recipe. Names from `use ... as c` start with `c.`."""

    name: str
    keyword: Keyword
    value: Kind
    call: Call
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Metric:
    """`heal.loss(code)`, `small.bytes`, `small.kv_bytes(4096)`. `data.split` None means `heldout`."""

    model: str
    metric: str
    data: Ref | None = None
    arguments: tuple[Value, ...] = ()

    def __str__(self) -> str:
        inside = [str(self.data)] if self.data else [str(a) for a in self.arguments]
        return f"{self.model}.{self.metric}" + (f"({', '.join(inside)})" if inside else "")


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: a metric or a number, moved by some share of itself or by an amount."""

    base: Metric | float
    change: float = 0.0
    relative: bool = False
    """True: base * (1 + change), written `+ 3%`; false: base + change."""

    def value(self, measured: float) -> float:
        return measured * (1 + self.change) if self.relative else measured + self.change


@dataclass(frozen=True, slots=True)
class Expect:
    """`left op right`, as data; `judge` evaluates it."""

    text: str
    left: Side
    op: Literal["<=", ">=", "<", ">", "=="]
    right: Side
    span: Span | None = field(default=None, compare=False, repr=False)

    def metrics(self) -> tuple[Metric, ...]:
        return tuple(side.base for side in (self.left, self.right) if isinstance(side.base, Metric))


@dataclass(frozen=True, slots=True)
class Export:
    """`export model as format(...)`; one for each format."""

    model: str
    call: Call
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe. Bindings stand so that each comes after those it names (stable otherwise)."""

    name: str
    title: str
    version: int
    params: Mapping[str, Value]
    bindings: tuple[Binding, ...]
    expects: tuple[Expect, ...]
    exports: tuple[Export, ...]
    source: Source | None = field(default=None, compare=False, repr=False)

    def stage(self, name: str) -> Binding:
        """The binding of this name. Raises KeyError."""
        for binding in self.bindings:
            if binding.name == name:
                return binding
        raise KeyError(name)

    def inputs_of(self, binding: Binding) -> list[Ref]:
        """Everything the binding names, in order: models first, then arguments as written; once each."""
        return list(dict.fromkeys((*binding.call.models, *refs(binding.call.arguments))))

    def ancestors(self, name: str) -> set[str]:
        """Names of all bindings that this one is made from, itself left out."""
        found: set[str] = set()
        todo = [name]
        while todo:
            for ref in self.inputs_of(self.stage(todo.pop())):
                if ref.name not in found:
                    found.add(ref.name)
                    todo.append(ref.name)
        return found


def refs(value: Value) -> Iterator[Ref]:
    """Every name inside a value, in order."""
    match value:
        case Ref():
            yield value
        case Call():
            yield from value.models
            yield from refs(value.arguments)
        case tuple():
            for item in value:
                yield from refs(item)
        case Mapping():
            for item in value.values():
                yield from refs(item)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of one `expect`: both sides as compared, and a line to print."""

    holds: bool
    left: float
    right: float
    text: str


def judge(expect: Expect, measured: Callable[[Metric], float]) -> Judgement:
    """Compare the two sides of an `expect` with a lookup of measured values. NaN never holds."""
    values = [_side(side, measured) for side in (expect.left, expect.right)]
    left, right = values
    holds = {
        "<=": left <= right, ">=": left >= right, "<": left < right, ">": left > right, "==": left == right
    }[expect.op]  # fmt: skip
    verdict = "holds" if holds else "fails"
    margin = f", {abs(left - right) / abs(right):.1%} {_apart(left, right)}" if right else ""
    shown = _printed(next((metric.metric for metric in expect.metrics()), ""))
    words = f"{expect.text}: {shown(left)} {expect.op} {shown(right)} {verdict}{margin}"
    return Judgement(holds, left, right, words)


def _printed(metric: str) -> Callable[[float], str]:
    """How numbers of this metric are printed: 3.91 MB rather than 3.9081e+06."""
    known: dict[str, Callable[[float], str]] = {
        "bytes": fmt_bytes, "kv_bytes": fmt_bytes, "params": fmt_count, "flops": fmt_count,
        "latency": fmt_seconds,
    }  # fmt: skip
    return known.get(metric, lambda number: f"{number:.6g}")


def _side(side: Side, measured: Callable[[Metric], float]) -> float:
    return side.value(measured(side.base) if isinstance(side.base, Metric) else side.base)


def _apart(left: float, right: float) -> str:
    return "below" if left < right else "above" if left > right else "apart"
