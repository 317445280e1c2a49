"""The verbs about the language: check, fmt, schema, methods. None of them imports torch."""

from __future__ import annotations

import argparse
import json
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from effc.specs.catalogue import Entry, Parameter
from effc.specs.diagnostic import Diagnostic, EffcError


def check(options: argparse.Namespace) -> int:
    """Levels 0 to 2, and whether the arguments of each call fit each other. Warnings do not fail."""
    from effc.dsl.read import read_file
    from effc.runtime.agreeing import disagreements
    from effc.runtime.catalogue import catalogue

    found = read_file(recipe_in(options.recipe), catalogue(), options.params, str(options.recipe))
    if problems := disagreements([c.recipe for c in found], catalogue()):
        raise EffcError(*problems)
    warnings = list(dict.fromkeys(d.render() for c in found for d in c.warnings))
    if options.json:
        unique = {d.render(): d.as_json() for c in found for d in c.warnings}
        answer = {"recipe": found[0].recipe.name, "recipes": len(found), "diagnostics": list(unique.values())}
        print(json.dumps(answer, indent=2))
        return 0
    if warnings:
        print("\n\n".join(warnings), file=sys.stderr)
    recipe = found[0].recipe
    stages = sum(b.keyword == "stage" for b in recipe.bindings)
    counts = {"stage": stages, "expect": len(recipe.expects), "export": len(recipe.exports)}
    parts = [f"{n} {word}{'s' * (n != 1)}" for word, n in counts.items()]
    times = f", {len(found)} combinations of params" if len(found) > 1 else ""
    print(f"{recipe.name}: {', '.join(parts)}{times}: no problem found")
    return 0


def recipe_in(path: Path) -> Path:
    """A recipe file, or the recipe inside an artefact."""
    inside = path / "recipe.effc"
    return inside if path.is_dir() and inside.is_file() else path


def fmt(options: argparse.Namespace) -> int:
    """The canonical form, printed, written, or compared; refuses a file that does not parse."""
    from effc.dsl.files import read_source
    from effc.dsl.read import parse
    from effc.dsl.to_yaml import to_yaml
    from effc.dsl.unparse import unparse

    source = read_source(options.recipe)
    document, problems = parse(source)
    if problems:
        raise EffcError(*problems)
    to = options.to or ("yaml" if document.yaml else "text")
    printed = to_yaml(document) if to == "yaml" else unparse(document)
    if to == "yaml" and document.comments and not options.json:
        print(
            f"effc: {len(document.comments)} comments are left out; only the text form keeps them",
            file=sys.stderr,
        )
    if options.check:
        same = printed == source.text
        if not same:
            print(
                f"effc: {options.recipe} is not in canonical form; `effc fmt --write` rewrites it",
                file=sys.stderr,
            )
        return 0 if same else 1
    if options.write:
        place = options.recipe.with_suffix(".yaml" if to == "yaml" else ".effc")
        place.write_text(printed, encoding="utf-8")
        return 0
    print(
        json.dumps({"text": printed}, indent=2) if options.json else printed, end="\n" if options.json else ""
    )
    return 0


def schema(options: argparse.Namespace) -> int:
    """JSON schema of the YAML form, for editors."""
    from effc.runtime.catalogue import catalogue
    from effc.runtime.recipe_schema import call_schema, recipe_schema

    found = catalogue()
    made = recipe_schema(found) if options.kind is None else call_schema(_entry(options.kind), found)
    print(json.dumps(made, indent=2))
    return 0


def methods(options: argparse.Namespace) -> int:
    """Methods and parts, all or one, for people or as JSON."""
    from effc.runtime.catalogue import catalogue

    listed = [e for e in catalogue().entries if e.role in ("method", "part")]
    broken = catalogue().broken if options.kind is None else {}
    if options.kind is not None:
        one = [e for e in catalogue().entries if e.kind == options.kind or e.family == options.kind]
        if len(one) == 1 and not options.json:
            print(page(one[0]))
            return 0
        listed = one or [_entry(options.kind)]
    if options.json:
        unusable = [_unlisted(kind, reason) for kind, reason in sorted(broken.items())]
        print(json.dumps([as_listed(e) for e in listed] + unusable, indent=2))
        return 0
    width = max(len(kind) for kind in (*(e.kind for e in listed), *broken))
    for entry in listed:
        print(f"{entry.kind:<{width}}  {entry.summary.partition(': ')[0].rstrip('.')}")
    for kind, reason in sorted(broken.items()):
        print(f"{kind:<{width}}  broken: {reason}")
    return 0


def _entry(kind: str) -> Entry:
    """One entry by full or short name. Raises EffcError E201."""
    from effc.runtime.catalogue import catalogue

    found = catalogue().find(kind) or next((e for e in catalogue().entries if e.short == kind), None)
    if found is not None:
        return found
    if reason := catalogue().broken.get(kind):
        help_ = "remove or repair the package; `effc methods` lists what is broken"
        raise EffcError(Diagnostic("E235", f"`{kind}` cannot be used", notes=(reason,), help=help_))
    near = catalogue().near(kind) or get_close_matches(kind, {e.family for e in catalogue().entries})
    help_ = f"did you mean `{near[0]}`?" if near else "`effc methods` lists them"
    raise EffcError(Diagnostic("E201", f"no method or part is called `{kind}`", help=help_))


def as_listed(entry: Entry) -> dict[str, Any]:
    """The shape that scripts rely on."""
    return {
        "name": entry.kind,
        "family": entry.family,
        "summary": entry.summary,
        "paper": entry.paper,
        "contract": _contract(entry),
        "parameters": [_listed(p) for p in entry.parameters],
        **({"package": entry.package} if entry.package else {}),
    }


def _unlisted(kind: str, reason: str) -> dict[str, Any]:
    """What cannot be used, in the same shape, with the reason."""
    empty: dict[str, Any] = {"summary": "", "paper": "", "contract": None, "parameters": []}
    return {"name": kind, "family": kind.rpartition(".")[0], **empty, "broken": reason}


def _contract(entry: Entry) -> dict[str, Any] | None:
    if entry.role != "method":
        return None
    facts = {key: list(getattr(entry, key)) for key in ("needs", "gives", "breaks", "keeps")}
    return {"fidelity": entry.contract, **facts}


def _listed(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "type": parameter.type,
        "unit": parameter.unit,
        "default": parameter.default,
        "range": parameter.range,
        "description": parameter.description,
    }


def page(entry: Entry) -> str:
    """A method's page as plain text: what its file says, and nothing else."""
    lines = [entry.kind, "", entry.doc, ""]
    if entry.contract:
        lines.append(f"contract: {entry.contract}")
    lines += [f"{key}: {', '.join(getattr(entry, key))}" for key in ("needs", "gives", "breaks", "keeps")
              if getattr(entry, key)]  # fmt: skip
    rows = [(p.name, p.type, _default(p), p.description) for p in entry.parameters]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    lines += ["", "arguments:" if rows else "no arguments"]
    lines += [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    lines += ["", "examples:", *(f"  {example}" for example in entry.examples), "", f"source: {entry.paper}"]
    lines += [f"package: {entry.package}"] if entry.package else []
    return "\n".join(lines)


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, ()) else f"= {_spelt(parameter.default)}"


def _spelt(value: object) -> str:
    """A default as a recipe would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_spelt, value))}]"
    return str(value)


def explain(options: argparse.Namespace) -> int:
    """What a code of a diagnostic is about, or a method's page."""
    from effc.specs.codes import CODES

    what = str(options.what)
    code = what.upper()
    if code in CODES:
        if options.json:
            print(json.dumps({"code": code, "summary": CODES[code]}, indent=2))
        else:
            print(f"{code}: {CODES[code]}")
        return 0
    if code[:1] in ("E", "W") and code[1:].isdigit():
        near = get_close_matches(code, CODES, n=3)
        raise EffcError(Diagnostic("E201", f"there is no code `{what}`", help=f"near it: {', '.join(near)}"))
    entry = _entry(what)
    print(json.dumps(as_listed(entry), indent=2) if options.json else page(entry))
    return 0
