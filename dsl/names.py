"""Names in values: the binding that one means; what stands in a wrong place, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from effc.dsl import tree
from effc.dsl.place import Place, Unfit, form_of, short, takes
from effc.dsl.scope import Scope, described
from effc.specs.catalogue import Catalogue
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.quantity import EXAMPLES
from effc.specs.recipe import Ref
from effc.specs.source import Span

SPLITS = ("train", "heldout")
_ARTICLES = {"model": "a model", "data": "data", "report": "a report"}
_BINDS = {
    "model": 'model {} = load("...")',
    "data": 'data {} = corpus("python-stdlib")',
    "report": "{} = analyze.batch_isolation(MODEL)",
}


@dataclass(slots=True)
class Names:
    """The names that one file sees; problems are collected, not raised."""

    scope: Scope
    catalogue: Catalogue
    problems: list[Diagnostic]
    kinds: dict[str, str]
    """Full name of every binding -> "model", "data" or "report"."""
    used: set[str]
    """Full names that something refers to."""

    def reference(self, node: tree.Name, wanted: str, place: str) -> Ref | None:
        """The binding that a name means, of the wanted kind ("model", "data"); None when it was reported."""
        found, split = self.scope.binding(node.text), None
        if found is None and "." in node.text:
            head, _, last = node.text.rpartition(".")
            found, split = self.scope.binding(head), last
        if found is None:
            self.unbound(node, place, wanted)
            return None
        name = found[0]
        self.used.add(name)
        if node.sigil is False:
            self.report(
                "E205", f"a binding is written `${node.text}` in YAML", node.span, help_=f"write ${node.text}"
            )
            return None
        kind = self.kinds[name]
        if kind == "unknown":  # its own line was reported
            return None
        if kind != wanted:
            self._wrong_kind(node, name, kind, wanted, place)
            return None
        if split is not None and kind == "data" and split not in SPLITS:
            near = get_close_matches(split, SPLITS, n=1)
            help_ = f"did you mean `{near[0]}`?" if near else f"it has: {', '.join(SPLITS)}"
            self.report("E222", f"data have no split `{split}`", node.span, help_=help_)
            return None
        if split is not None and kind == "model":
            help_ = f"write {name}; metrics such as {node.text} stand only after `expect`"
            self.report("E208", f"{place} takes a model, not a metric of one", node.span, help_=help_)
            return None
        return Ref(name, split)

    def behind(self, value: tree.Value) -> tree.Value:
        """The value behind constants that name constants. A circle is reported."""
        seen: dict[str, None] = {}
        while isinstance(value, tree.Name) and (found := self.scope.constant(value.text)):
            if value.text in seen:
                self._circle([*seen, value.text], found[1].statement)
                raise Unfit
            seen[value.text] = None
            found[1].used = True
            value = found[1].value
        return value

    def _circle(self, names: list[str], again: tree.Let) -> None:
        """Tell a circle of constants, once."""
        if any(d.code == "E207" and d.labels[0].span == again.span for d in self.problems):
            return
        notes, help_ = [" -> ".join(names[-8:])], f"give `{again.name.text}` a value"
        self.report("E207", "constants define each other in a circle", again.span, "", help_, notes)

    def report(
        self,
        code: str,
        title: str,
        span: Span,
        text: str = "",
        help_: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.problems.append(Diagnostic(code, title, [Label(span, text)], notes, help_))

    # ---- one value

    def unbound(self, node: tree.Name, place: str, wanted: str) -> None:
        if self.scope.is_broken(node.text):
            return
        near = self.scope.near(node.text)
        if not near and "." in node.text and self.scope.is_broken(node.text.rpartition(".")[0]):
            return
        bound = self._before(node.span, wanted)
        keyword = f"bind it first: {_BINDS[wanted].format(node.text)}" if wanted in _BINDS else None
        help_ = (
            f"did you mean `{near[0]}`?"
            if near
            else keyword
            if not bound
            else f"there are: {', '.join(bound)}"
        )
        self.report(
            "E205",
            f"nothing is called `{node.text}`",
            node.span,
            f"{place} takes {_ARTICLES.get(wanted, wanted)}",
            help_,
        )

    def _before(self, span: Span, wanted: str) -> list[str]:
        """Bindings of a kind that stand before a place: using one of them closes no circle."""
        return [
            name
            for name, bind in self.scope.bindings.items()
            if self.kinds[self.scope.prefix + name] == wanted and bind.span.end <= span.start
        ]

    def _wrong_kind(self, node: tree.Name, name: str, kind: str, wanted: str, place: str) -> None:
        others = self._before(node.span, wanted)
        near = get_close_matches(name, others, n=1) or others[:1]
        help_ = (
            f"{wanted}s here: {', '.join(others[:8])}".replace("datas", "data")
            if near
            else (f"bind one: {_BINDS[wanted].format('NAME')}")
        )
        self.report(
            "E208", f"{place} takes {_ARTICLES[wanted]}", node.span, f"`{name}` is {_ARTICLES[kind]}", help_
        )

    def wrong_type(self, node: tree.Value, place: Place, span: Span) -> None:
        wanted = " or ".join(takes(form) for form in place.forms)
        found = described(node)
        help_ = None
        if isinstance(node, tree.Name) and self.kinds.get(node.text):
            found = f"the {self.kinds[node.text]} `{node.text}`"
        if form_of(place, "bool") and isinstance(node, tree.Number) and node.text in ("0", "1"):
            help_ = f"write {'true' if node.text == '1' else 'false'}"
        elif isinstance(node, tree.Text) and form_of(place, "int", "float"):
            help_ = f"write {node.value} without quotes" if node.value[:1].isdigit() else None
        elif form := form_of(place, "list"):
            if not isinstance(node, tree.List):
                named = not form.item or form.item[0].type in ("data", "model")
                example = "..." if named else EXAMPLES.get(form.item[0].unit or "", "0.9")
                items = form.length[0] or 1
                help_ = f"write a list, as in [{', '.join([short(node)] + [example] * (items - 1))}]"
        elif slot := next((form.slot for form in place.forms if form.slot), None):
            names = ", ".join(e.short for e in self.catalogue.of_slot(slot))
            help_ = f"name a part, as in {place.name} = {names.split(', ')[0]}(...); there are: {names}"
        elif form_of(place, "rules"):
            help_ = 'write a list of tables: [{on = "head", skip = true}]'
        self.report("E210", f"{place.title} takes {wanted}", span, f"not {found}", help_)

    def no_choice(self, word: str, choices: Sequence[str], place: Place, span: Span) -> None:
        near = get_close_matches(word, choices, n=1, cutoff=0.5)
        help_ = f"did you mean `{near[0]}`?" if near else None
        self.report(
            "E215", f"{place.title} cannot be `{word[:60]}`", span, f"one of: {', '.join(choices)}", help_
        )
