"""The front door of the language: text or YAML in, checked recipe out, every problem at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from effc.dsl import text, tree
from effc.dsl.check import check
from effc.dsl.files import Reader, read_source
from effc.dsl.lexer import chunks
from effc.dsl.order import check_order
from effc.dsl.scope import build
from effc.specs.catalogue import Catalogue
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.recipe import Recipe
from effc.specs.source import Source, Span

VERSION = 1
MOST_RECIPES = 256
MOST_REPORTED = 200


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe that passed levels 0 to 2, and what it is warned about."""

    recipe: Recipe
    warnings: tuple[Diagnostic, ...]
    settings: Mapping[str, str]
    """What `-p` gave, as written; empty outside a sweep."""


def read_file(
    path: Path, catalogue: Catalogue, settings: Sequence[str] = (), name: str | None = None
) -> list[Checked]:
    """Check a file, once for every combination of the settings `name=value,value`.

    Raises: EffcError with everything that is wrong.
    """
    return sweep(read_source(path, name or str(path)), catalogue, settings)


def read(source: Source, catalogue: Catalogue, settings: Sequence[str] = ()) -> Checked:
    """Check one recipe. Raises EffcError with everything that is wrong; E233 if settings make several."""
    found = sweep(source, catalogue, settings)
    if len(found) > 1:
        title = f"the settings make {len(found)} recipes, where one is due"
        raise EffcError(Diagnostic("E233", title, help="give one value to each param"))
    return found[0]


def sweep(source: Source, catalogue: Catalogue, settings: Sequence[str] = ()) -> list[Checked]:
    """Check a recipe for every combination of settings. Raises EffcError with everything that is wrong."""
    combinations = _combinations(settings)
    document, problems = parse(source)
    if any(d.code == "E107" for d in problems):
        raise EffcError(*problems)
    done: list[Checked] = []
    for combination in combinations:
        found = list(problems)
        scope = build(document, combination, found, Reader(parse))
        recipe = check(scope, catalogue, found)
        found += check_order(recipe, catalogue)
        errors = sorted((d for d in found if d.severity == "error"), key=Diagnostic.sort_key)
        if errors:  # what looks unused or not healed may be what the error is about
            found = [d for d in found if d.code not in ("W201", "W202", "W203", "W204")]
        warnings = sorted((d for d in found if d.severity == "warning"), key=Diagnostic.sort_key)
        if errors:
            raise EffcError(*_bounded([*errors, *warnings]))
        written = {name: value.span.text for name, value in combination.items()}
        done.append(Checked(recipe, tuple(warnings), written))
    return done


def parse(source: Source) -> tuple[tree.Document, list[Diagnostic]]:
    """The tree of a text or YAML source, told apart by what it holds: only YAML begins with `effc:`."""
    from effc.dsl import yaml_twin

    if yaml_twin.is_yaml(source):
        document, problems = yaml_twin.parse(source)
    else:
        document, problems = text.parse(source)
    return document, [*_version(document, bool(problems)), *problems, *_heads(document)]


def _version(document: tree.Document, broken: bool) -> list[Diagnostic]:
    first = document.statements[0] if document.statements else None
    if isinstance(first, tree.Version):
        if first.number.text == str(VERSION) and first.number.unit is None:
            return []
        title = f"this effc reads version {VERSION} of the language, not {first.number.span.text}"
        return [Diagnostic("E107", title, [Label(first.number.span)], help=f"write `effc {VERSION}`")]
    if broken and re.search(r"^[\"']?effc\b", document.source.text, re.MULTILINE):
        return []  # the first line is there, and what is wrong with it was said
    span = first.span if first else Span(document.source, 0, 1)
    span = Span(document.source, span.start, min(span.end, span.start + 1))
    title = "the first line does not say the version of the language"
    form = f"effc: {VERSION}" if document.yaml else f"effc {VERSION}"
    return [Diagnostic("E107", title, [Label(span)], help=f"begin the file with `{form}`")] + [
        Diagnostic("E107", "the version stands on the first line", [Label(s.span)], help="move it to the top")
        for s in document.statements
        if isinstance(s, tree.Version)
    ]


def _heads(document: tree.Document) -> list[Diagnostic]:
    """Version and title once, and at the top."""
    found: list[Diagnostic] = []
    for kind, word, code in ((tree.Version, "version", "E107"), (tree.Title, "title", "E115")):
        again = [s for s in document.statements if isinstance(s, kind)][1:]
        found += [
            Diagnostic(code, f"the {word} is given twice", [Label(s.span)], help="keep one of them")
            for s in again
        ]
    return found


def _combinations(settings: Sequence[str]) -> list[dict[str, tree.Value]]:
    """`-p a=1,2 -p b=3` to all choices of one value each. Raises EffcError E217 or E233."""
    problems: list[Diagnostic] = []
    choices: dict[str, list[tree.Value]] = {}
    for setting in settings:
        source = Source("-p", setting)
        name, equal, _ = setting.partition("=")
        if not equal or not name.strip().isidentifier() or len(setting) > 10_000:
            label = Label(Span(source, 0, len(setting)))
            problems.append(
                Diagnostic("E217", "a setting is written name=value", [label], help="as in -p steps=50")
            )
        elif name.strip() in choices:
            label = Label(Span(source, 0, len(name)))
            help_ = f"write all its values at once: -p {name.strip()}=1,2"
            problems.append(Diagnostic("E217", f"`{name.strip()}` is set twice", [label], help=help_))
        else:
            try:
                choices[name.strip()] = _values(source, len(name) + 1)
            except EffcError as problem:
                problems += problem.diagnostics
    if problems:
        raise EffcError(*problems)
    count = 1
    for values in choices.values():
        count *= len(values)
    if count > MOST_RECIPES:
        note = f"{' x '.join(str(len(v)) for v in choices.values())} = {count}"
        title = f"a sweep has at most {MOST_RECIPES} recipes, not {count}"
        raise EffcError(Diagnostic("E233", title, notes=(note,), help="sweep fewer values at once"))
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _values(source: Source, start: int) -> list[tree.Value]:
    """The values after `=`, split at commas outside brackets."""
    ends, depth = [], 0
    for chunk in chunks(source, start):
        for token in chunk.tokens:
            depth += (token.text in "([{") - (token.text in ")]}")
            if token.type == "COMMA" and not depth:
                ends.append(token.start)
    places = zip([start, *(end + 1 for end in ends)], [*ends, len(source.text)], strict=True)
    return [text.parse_part(source, first, last, "value") for first, last in places]


def _bounded(problems: Sequence[Diagnostic]) -> list[Diagnostic]:
    """The first problems; nobody reads more, and a damaged file may have thousands."""
    if len(problems) <= MOST_REPORTED:
        return list(problems)
    rest = Diagnostic("E101", f"{len(problems) - MOST_REPORTED} more problems are not shown")
    return [*problems[:MOST_REPORTED], rest]
