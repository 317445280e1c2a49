"""Rules: one table of `rules`, {on = ..., skip = true} or {on = ..., argument = value}."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from effc.dsl import tree
from effc.dsl.names import Names
from effc.dsl.place import Place, Unfit
from effc.dsl.scope import described
from effc.specs.catalogue import Form
from effc.specs.recipe import Value
from effc.specs.source import Span

Read = Callable[[tree.Value, Place, Span], Value]


def read_rule(names: Names, node: tree.Value, place: Place, read: Read) -> Value:
    """The rule as a table. Raises Unfit after telling what is wrong with it."""
    if not isinstance(node, tree.Table):
        help_ = 'write {on = "head", skip = true} or {on = "layers[0]", bits = 8}'
        names.report("E210", "a rule is a table", node.span, f"not {described(node)}", help_)
        raise Unfit
    known = {
        "on": Place("on", "rules", (Form("selector"),)),
        "skip": Place("skip", "rules", (Form("bool"),)),
    }
    known |= {p.name: Place(p.name, place.of, p.forms) for p in place.overrides}
    done: dict[str, Value] = {}
    for entry in node.entries:
        key = entry.key.text
        if key in done:
            names.report("E213", f"`{key}` of a rule is given twice", entry.span, help_="keep one of them")
            raise Unfit
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.75)
            has = f"rules of `{place.of}` may set: {', '.join(known)}"
            help_ = f"did you mean `{near[0]}`?" if near else has
            names.report("E211", f"a rule of `{place.of}` cannot set `{key}`", entry.key.span, help_=help_)
            raise Unfit
        done[key] = read(entry.value, known[key], entry.value.span)
    if "on" not in done:
        names.report("E204", "a rule needs `on`", node.span, help_='say where it holds: {on = "head", ...}')
        raise Unfit
    if len(done) == 1:
        names.report(
            "E204", "a rule says what is different", node.span, help_="add skip = true or an argument"
        )
        raise Unfit
    if done.get("skip") is True and len(done) > 2:
        names.report("E213", "a rule either skips or sets arguments", node.span, help_="take one of them out")
        raise Unfit
    return done
