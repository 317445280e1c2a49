"""What a method says about itself, as a page of Markdown made only of what its own file states."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import cleandoc
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from effc.compiler.contract import Contract, Fact
from effc.compiler.method import Method, Part, Slot, Takes
from effc.specs.units import Unit


def page(cls: type[Method] | type[Part]) -> str:
    """The documentation page of a method or part."""
    parts = [f"# `{cls.kind}`", *_prose(cleandoc(cls.__doc__ or "")), _arguments(cls)]
    if issubclass(cls, Method):
        parts.append(_contract(cls.contract))
        if cls.waives:
            rows = [f"- {check}: {reason}" for check, reason in cls.waives.items()]
            parts.append("\n".join(["Common checks that do not apply:", "", *rows]))
    parts.append("\n".join(["```effc", *cls.examples, "```"]))
    paper = cls.paper
    cite = f"*{paper.title}*" + (f", {paper.year}" if paper.year else "")
    cite += f", section {paper.section}" if paper.section else ""
    parts.append(f"{cite}. {paper.url}" if paper.url else f"{cite}.")
    return "\n\n".join(parts) + "\n"


def _prose(doc: str) -> list[str]:
    """Paragraphs of a docstring; formulas that stand in columns keep them, headings become bold."""
    out = []
    for paragraph in doc.split("\n\n"):
        if paragraph.startswith("Use when:"):
            use, _, costs = paragraph.partition("\nCosts:")
            out += [
                f"**Use when:** {' '.join(use.removeprefix('Use when:').split())}",
                f"**Costs:** {' '.join(costs.split())}",
            ]
        elif any("   " in line.strip() or " = " in line for line in paragraph.splitlines()[1:]):
            out.append("\n".join(["```text", paragraph, "```"]))
        else:
            out.append(" ".join(paragraph.split()))
    return out


def _arguments(cls: type[Method] | type[Part]) -> str:
    if not cls.model_fields:
        return "No arguments."
    rows = [
        f"| `{info.alias or name}` | {_cell(type_words(info))} | {_default(info)} | "
        f"{_cell(info.description or '')} |"
        for name, info in cls.model_fields.items()
    ]
    return "\n".join(["| argument | takes | default | meaning |", "|---|---|---|---|", *rows])


def _contract(contract: Contract) -> str:
    def line(word: str, facts: Iterable[Fact]) -> list[str]:
        named = ", ".join(f"`{fact}`" for fact in facts)
        return [f"- {word}: {named}"] if named else []

    return "\n".join(
        [
            f"- contract: {contract.fidelity}",
            *line("needs", contract.needs),
            *line("gives", contract.gives),
            *line("breaks", contract.breaks),
            *line("keeps", contract.keeps),
        ]
    )


def type_words(info: FieldInfo) -> str:
    """What a field takes, in the words of a recipe: `share or count`, `symmetric | asymmetric`."""
    return _words(info.annotation, info.metadata)


def _words(hint: Any, metadata: Iterable[Any] = ()) -> str:
    for mark in metadata:
        if isinstance(mark, Unit):
            return mark.dimension
        if isinstance(mark, Takes):
            return mark.value
        if isinstance(mark, Slot):
            return f"part of {mark.folder}"
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(args[0], args[1:])
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin is tuple:
        inside = _words(args[0])
        return f"list of {inside}" + ("" if inside == "data" else "s")
    if origin is Union or origin is type(int | str):
        return " or ".join(_words(a) for a in args if a is not type(None))
    plain = {int: "whole number", float: "number", str: "string", bool: "true or false"}
    return plain.get(hint, getattr(hint, "__name__", "value").lower())


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    slot = next((m for m in info.metadata if isinstance(m, Slot)), None)
    value = f"{slot.default}()" if slot and slot.default and info.default is None else info.default
    if value is None or value == ():
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
