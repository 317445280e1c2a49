"""Expects: from `small.loss(code) <= base.loss(code) + 3%` to two sides in base units."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches

from effc.dsl import tree
from effc.dsl.names import Names
from effc.dsl.numbers import near_unit
from effc.dsl.place import Place, Unfit
from effc.dsl.scope import described
from effc.dsl.values import Values
from effc.specs.catalogue import Form
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.metrics import MEASURES
from effc.specs.quantity import EXAMPLES, dimensions_of, to_base
from effc.specs.recipe import Expect, Metric, Ref, Side
from effc.specs.source import Span

_ACCURACY = "points"


def expect(statement: tree.Expect, values: Values, data_kinds: dict[str, str]) -> Expect | None:
    """The checked comparison, None when something is wrong. `data_kinds`: data binding -> its source."""
    before = len(values.problems)
    statement = replace(statement, left=_plain(statement.left, values), right=_plain(statement.right, values))
    metrics = [_metric(side.base, values, data_kinds) for side in (statement.left, statement.right)]
    if len(values.problems) > before or any(
        metric is None and not isinstance(side.base, tree.Number)
        for side, metric in zip((statement.left, statement.right), metrics, strict=True)
    ):
        return None
    left, right = metrics
    if left is None and right is None:
        values.report(
            "E220",
            "an expect compares a metric of a model",
            statement.span,
            "two numbers are known already",
            "write expect MODEL.METRIC <= VALUE",
        )
        return None
    if left and right and _dimension(left) != _dimension(right):
        values.report(
            "E220",
            f"`{left.metric}` and `{right.metric}` cannot be compared",
            statement.span,
            f"{_dimension(left)} against {_dimension(right)}",
            "compare a metric with itself or a number",
        )
        return None
    known = left or right
    assert known is not None
    sides = [
        _side(side, metric, known, values)
        for side, metric in zip((statement.left, statement.right), metrics, strict=True)
    ]
    if sides[0] is None or sides[1] is None:
        return None
    text = " ".join(statement.span.text.removeprefix("expect").split())
    return Expect(text, sides[0], statement.op, sides[1], statement.span)  # type: ignore[arg-type]


def _plain(side: tree.Side, values: Values) -> tree.Side:
    """The side with the number that a constant stands for in its place; the span stays that of the name."""
    found = values.scope.constant(side.base.text) if isinstance(side.base, tree.Name) else None
    if found is None:
        return side
    owner, constant = found
    constant.used = True
    try:
        value = Names(owner, values.catalogue, values.problems, values.kinds, values.used).behind(
            constant.value
        )
    except Unfit:
        return side
    return replace(side, base=replace(value, span=side.base.span)) if isinstance(value, tree.Number) else side


def _metric(
    node: tree.Name | tree.Call | tree.Number, values: Values, data_kinds: dict[str, str]
) -> Metric | None:
    if isinstance(node, tree.Number):
        return None
    word = node.name if isinstance(node, tree.Call) else tree.Word(node.text, node.span)
    model, dot, metric = word.text.rpartition(".")
    if not dot or (metric not in MEASURES and values.scope.binding(word.text)):
        if isinstance(node, tree.Name) and (constant := values.scope.constant(word.text)):
            written = constant[1].value
            values.report(
                "E220",
                f"`{word.text}` is {described(written)}, and metrics are compared with numbers",
                word.span,
                help_=f"write let {word.text} = NUMBER",
            )
            return None
        values.report(
            "E219",
            f"`{word.text}` names no metric",
            word.span,
            help_=f"write {word.text}.METRIC with one of: {', '.join(MEASURES)}",
        )
        return None
    measure = MEASURES.get(metric)
    if measure is None:
        near = get_close_matches(metric, MEASURES, n=1, cutoff=0.6) or _SYNONYMS.get(metric.lower(), [])
        help_ = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(MEASURES)}"
        values.report("E219", f"there is no metric `{metric}`", word.span, help_=help_)
        return None
    kind = "report" if metric == "findings" else "model"
    ref = values.reference(tree.Name(model, word.span), kind, f"`{metric}`")
    if ref is None:
        return None
    return _with_arguments(node, ref, metric, values, data_kinds)


def _with_arguments(
    node: tree.Name | tree.Call, model: Ref, metric: str, values: Values, data_kinds: dict[str, str]
) -> Metric | None:
    takes = MEASURES[metric].takes
    given = node.values if isinstance(node, tree.Call) else ()
    named = node.named if isinstance(node, tree.Call) else ()
    wanted = 0 if takes == "nothing" else 1
    if len(given) != wanted or named:
        what = {"nothing": "nothing", "number": "a number of tokens"}.get(takes, "data")
        values.report(
            "E214",
            f"`{metric}` takes {what} in parentheses",
            node.span,
            help_=f"write it as in {MEASURES[metric].example}",
        )
        return None
    if not given:
        return Metric(model.name, metric)
    inner = given[0]
    if takes == "number":
        fits, number = values.argument(inner, Place("tokens", metric, (Form("int", "tokens", least=1),)))
        return Metric(model.name, metric, arguments=(number,)) if fits else None
    fits, data = values.argument(inner, Place("data", metric, (Form("data"),)))
    if not fits or not isinstance(data, Ref):
        return None
    if data.split == "train":
        values.report(
            "E221",
            f"`{metric}` is judged on data that training has seen",
            inner.span,
            "`train` is what stages read",
            f"write {metric}({data.name}): metrics read the held-out split",
        )
        return None
    questions = data_kinds.get(data.name) == "choices"
    if questions != (takes == "questions"):
        others = [name for name, kind in data_kinds.items() if (kind == "choices") == (takes == "questions")]
        wants = "multiple-choice questions" if takes == "questions" else "running text"
        help_ = (
            f"write {metric}({others[0]})"
            if others
            else (
                'bind some: data quiz = choices("quiz.jsonl")'
                if takes == "questions"
                else "measure acc instead"
            )
        )
        values.report("E208", f"`{metric}` takes {wants}", inner.span, f"`{data.name}` is not", help_)
        return None
    return Metric(model.name, metric, data)


def _side(side: tree.Side, metric: Metric | None, known: Metric, values: Values) -> Side | None:
    dimension = _dimension(known)
    base: Metric | float
    if metric is not None:
        base = metric
    else:
        assert isinstance(side.base, tree.Number)
        number = _amount(side.base, known, values, side.base.span)
        if number is None:
            return None
        base = number
    if side.amount is None:
        return Side(base)
    sign = -1 if side.sign == "-" else 1
    if side.amount.unit == "%":
        if dimension == _ACCURACY:
            values.report(
                "E220",
                "accuracies move in points, not in shares of themselves",
                side.amount.span,
                help_=f"write {side.sign} {side.amount.text} point",
            )
            return None
        return Side(base, sign * float(side.amount.text) / 100, relative=True)
    if side.amount.unit is None and dimension in ("bytes", "seconds"):
        example = EXAMPLES.get(dimension, "")
        values.report(
            "E209",
            f"an amount of {dimension} needs its unit",
            side.amount.span,
            help_=f"write {side.sign} {side.amount.text}% for a share, or an amount such as {example}",
        )
        return None
    amount = _amount(side.amount, known, values, side.amount.span)
    return None if amount is None else Side(base, sign * amount)


def _amount(number: tree.Number, known: Metric, values: Values, span: Span) -> float | None:
    """A written number in the unit of the metric."""
    dimension = _dimension(known)
    if number.unit == "%" and dimension == _ACCURACY:
        return float(number.text) / 100
    value = to_base(float(number.text), number.unit, dimension)
    if value is None and dimension == "flops":
        value = to_base(float(number.text), number.unit, "count")
    if value is not None:
        return float(value)
    measured = dimensions_of(number.unit or "")
    example = MEASURES[known.metric].example
    text = f"`{number.unit}` measures {measured[0]}" if measured else f"`{number.unit}` is no unit"
    near = None if measured else near_unit(number.unit or "", [dimension])
    values.problems.append(
        Diagnostic(
            "E209",
            f"`{known.metric}` is measured in {dimension}",
            [Label(span, text)],
            help=f"did you mean {number.text} {near}?" if near else f"write it as in {example}",
        )
    )
    return None


def _dimension(metric: Metric) -> str:
    return MEASURES[metric.metric].dimension


_SYNONYMS = {
    "size": ["bytes"], "accuracy": ["acc"], "parameters": ["params"], "ppl": ["loss"], "perplexity": ["loss"],
    "time": ["latency"], "speed": ["latency"], "memory": ["bytes"], "kv": ["kv_bytes"], "macs": ["flops"],
}  # fmt: skip
