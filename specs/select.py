"""Selection: `select`, `except` and `rules` over the modules of a model, to one resolved table.

Order of strength: `select` takes in, `except` takes out, then the rules in order; the last one that matches
a module decides about it alone. A rule may name a module that `select` left out, and so takes it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.selector import Name, Selector, SelectorError

__all__ = ["Name", "Rule", "Selector", "SelectorError", "Table", "resolve", "table_lines"]

Table = Mapping[str, Mapping[str, Any] | None]
"""Path -> arguments that a rule gives there ({}: none, as written in the call), None = left alone."""


class Rule(BaseModel):
    """One line of `rules`: which modules, and either `skip` or other arguments for them."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    on: str = Field(description="selector")
    skip: bool = False

    @field_validator("on")
    @classmethod
    def _parses(cls, text: str) -> str:
        Selector.parse(text)
        return text

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.skip == bool(self.given):
            raise ValueError("a rule either skips or sets arguments")
        return self

    @property
    def given(self) -> Mapping[str, Any]:
        """The arguments that this rule sets."""
        return self.model_extra or {}


def resolve(
    select: Sequence[str],
    except_: Sequence[str],
    rules: Sequence[Rule],
    names: Sequence[Name],
) -> dict[str, Mapping[str, Any] | None]:
    """What happens to every module of `names`, in their order.

    Problems say which selector they are about: "select[0]", "rules[1].on".

    Raises:
        EffcError: E226 a selector does not parse, E231 it matches nothing, E232 later rules shadow a rule.
    """
    problems: list[Diagnostic] = []
    matched = {
        key: [_matches(text, about.format(i), names, problems) for i, text in enumerate(texts)]
        for key, about, texts in (
            ("select", "select[{}]", select),
            ("except", "except[{}]", except_),
            ("rules", "rules[{}].on", [rule.on for rule in rules]),
        )
    }
    table: dict[str, Mapping[str, Any] | None] = dict.fromkeys((name.path for name in names), None)
    table.update({path: {} for paths in matched["select"] for path in paths})
    table.update({path: None for paths in matched["except"] for path in paths})
    winner: dict[str, int] = {}
    for place, (rule, paths) in enumerate(zip(rules, matched["rules"], strict=True)):
        for path in paths:
            table[path] = None if rule.skip else rule.given
            winner[path] = place
    for place, (rule, paths) in enumerate(zip(rules, matched["rules"], strict=True)):
        if paths and place not in {winner[path] for path in paths}:
            by = rules[max(winner[path] for path in paths)]
            problems.append(_shadowed(rule, by, len(paths), f"rules[{place}].on"))
    if problems:
        raise EffcError(*problems)
    return table


def table_lines(table: Table, names: Sequence[Name]) -> list[str]:
    """The table for people: modules of one role treated alike share a line, their layers as ranges."""
    groups: dict[tuple[str, str], list[int | None]] = {}
    for name in names:
        given = table.get(name.path)
        said = (
            "left alone"
            if given is None
            else ", ".join(f"{k} = {v}" for k, v in given.items()) or "as written"
        )
        groups.setdefault((name.role, said), []).append(name.layer)
    rows = [(_layers(layers) + role, said) for (role, said), layers in groups.items()]
    width = max((len(where) for where, _ in rows), default=0)
    return [f"{where:<{width}}  {said}" for where, said in rows]


def _matches(text: str, about: str, names: Sequence[Name], problems: list[Diagnostic]) -> list[str]:
    try:
        selector = Selector.parse(text)
    except SelectorError as problem:
        problems.append(Diagnostic("E226", f"the selector `{text}` {problem}", about=about))
        return []
    paths = selector.match(names)
    if not paths:
        layers = 1 + max((n.layer for n in names if n.layer is not None), default=-1)
        near = selector.near(names)
        roles = ", ".join(sorted({n.role for n in names}))
        problems.append(
            Diagnostic(
                "E231",
                f"the selector `{text}` matches no module",
                (),
                [f"the model has layers[0..{layers - 1}]" if layers else "the model has no layers"],
                "did you mean " + " or ".join(f"`{n}`" for n in near) + "?"
                if near
                else f"there are: {roles}",
                about=about,
            )
        )
    return paths


def _shadowed(rule: Rule, by: Rule, count: int, about: str) -> Diagnostic:
    return Diagnostic(
        "E232",
        f"the rule on `{rule.on}` never applies",
        (),
        [f"the last rule that matches a module wins, and later ones, such as that on `{by.on}`, "
         f"match all {count} of its modules"],
        f"put it after the rule on `{by.on}`, or take it out",
        about=about,
    )  # fmt: skip


def _layers(layers: Sequence[int | None]) -> str:
    """[0, 1, 2, 5] -> "layers[0..2,5]."; nothing outside the layers."""
    numbers = sorted({layer for layer in layers if layer is not None})
    if not numbers:
        return ""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"layers[{','.join(str(r[0]) if len(r) == 1 else f'{r[0]}..{r[-1]}' for r in runs)}]."
