"""Arguments that do not fit each other, told when a recipe is checked, though only their class can tell.

Limits of single arguments are in the catalogue. What a class demands of several at once is code in its file,
which needs torch, and checking may not import that. So a child process makes the calls, once: its answers are
kept in the user's cache, each under the call and the sources that it depends on.

    python -m effc.runtime.agreeing < QUESTIONS     what the child does
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effc.specs import user_cache
from effc.specs.catalogue import Catalogue, Entry
from effc.specs.diagnostic import Diagnostic
from effc.specs.recipe import Call, Recipe, Ref, Value

_FILE, _FORMAT = "calls.json", "1"
MOST_KEPT = 2000
"""Answers in the cache; the oldest go first."""

Problem = dict[str, Any]
"""`loc` and `msg`, as pydantic tells it."""


def disagreements(recipes: Sequence[Recipe], known: Catalogue) -> list[Diagnostic]:
    """What the classes of all calls say against their arguments, each problem once."""
    asked: dict[str, tuple[Call, Any]] = {}
    calls: list[tuple[Call, str]] = []
    for recipe in recipes:
        for call, entry in _judged(recipe, known):
            question = {"role": entry.role, "call": written(call)}
            key = _key(question, call, known)
            calls.append((call, key))
            asked.setdefault(key, (call, question))
    kept = user_cache.read(_FILE, _FORMAT) or {}
    new = {key: question for key, (_, question) in asked.items() if key not in kept}
    answers = dict(zip(new, _ask(list(new.values())), strict=False)) if new else {}
    if answers:
        user_cache.write(_FILE, _FORMAT, dict([*kept.items(), *answers.items()][-MOST_KEPT:]))
    told = kept | answers
    found: dict[str, Diagnostic] = {}
    for call, key in calls:
        if problems := told.get(key):
            from effc.runtime.refusal import refusals

            found |= {one.render(): one for one in refusals(call, problems)}
    return list(found.values())


def _judged(recipe: Recipe, known: Catalogue) -> Iterator[tuple[Call, Entry]]:
    """Every call of a recipe, nested parts too, whose class has rules of its own."""
    for outer in (*(b.call for b in recipe.bindings), *(e.call for e in recipe.exports)):
        for call in _calls(outer):
            entry = known.find(call.kind)
            if entry is not None and entry.judges and entry.role in ("method", "part") and call.arguments:
                yield call, entry


def _calls(value: Value) -> Iterator[Call]:
    match value:
        case Call():
            yield value
            for inner in value.arguments.values():
                yield from _calls(inner)
        case tuple():
            for item in value:
                yield from _calls(item)
        case Mapping():
            for item in value.values():
                yield from _calls(item)


def _key(question: Any, call: Call, known: Catalogue) -> str:
    """A hash of the call and of all sources that decide about it."""
    entries = [known.find(inner.kind) for inner in _calls(call)]
    closures = [entry.closure for entry in entries if entry is not None]
    text = json.dumps([question, closures], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _ask(questions: Sequence[Any]) -> list[list[Problem]]:
    """An answer to each question; fewer where the child broke off, which then a run tells."""
    if _torch_is_here():
        return answers(questions)
    asked = json.dumps({"questions": questions, "path": sys.path})
    command = [sys.executable, "-m", "effc.runtime.agreeing"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    try:
        found: list[list[Problem]] = json.loads(done.stdout.rpartition("\n")[2])
    except ValueError:
        return []
    return found


def _torch_is_here() -> bool:
    return "torch" in sys.modules


def answers(questions: Sequence[Any]) -> list[list[Problem]]:
    """What each class says against its call; imports torch."""
    from pydantic import ValidationError

    from effc.runtime.bind import class_of, filled
    from effc.specs.diagnostic import EffcError

    def problems(question: Any) -> list[Problem]:
        call = read(question["call"])
        assert isinstance(call, Call)
        try:
            cls = class_of(question["role"], call.kind)
            cls.model_validate(filled(cls, call))
        except ValidationError as error:
            return [{"loc": list(e["loc"]), "msg": e["msg"]} for e in error.errors(include_url=False)]
        except EffcError:
            return []  # of a nested part, which is asked about on its own
        return []

    return [problems(question) for question in questions]


def written(value: Value) -> Any:
    """A value as JSON; names and calls are tables with one key that no argument can have."""
    match value:
        case Ref():
            return {"=ref": [value.name, value.split]}
        case Call():
            arguments = {key: written(inner) for key, inner in value.arguments.items()}
            return {"=call": [value.kind, arguments]}
        case tuple():
            return [written(item) for item in value]
        case Mapping():
            return {key: written(inner) for key, inner in value.items()}
    return value


def read(found: Any) -> Value:
    """The value that `written` wrote."""
    match found:
        case {"=ref": [name, split]}:
            return Ref(name, split)
        case {"=call": [kind, arguments]}:
            return Call(kind, {key: read(inner) for key, inner in arguments.items()})
        case list():
            return tuple(map(read, found))
        case dict():
            return {key: read(inner) for key, inner in found.items()}
    plain: Value = found
    return plain


def main() -> int:
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    print("\n" + json.dumps(answers(asked["questions"])), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
