"""Values: from what was written to what an argument takes, in base units, or to what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from effc.dsl import arguments, tree
from effc.dsl.names import Names
from effc.dsl.numbers import read_number
from effc.dsl.place import (
    Place,
    Unfit,
    anything,
    choices_of,
    form_of,
    holds,
    place_of,
    takes,
    written_default,
)
from effc.dsl.rules import read_rule
from effc.specs.catalogue import Entry
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.recipe import Call, Value
from effc.specs.selector import Selector, SelectorError
from effc.specs.source import Span


class Values(Names):
    """Turns values of one file into recipe values."""

    def argument(self, node: tree.Value, place: Place) -> tuple[bool, Value]:
        """Whether the value fits, and the value."""
        try:
            return True, self._value(node, place, node.span)
        except Unfit:
            return False, None

    def call(self, node: tree.Call, entry: Entry, values: Sequence[tree.Value]) -> Call:
        """A call with its arguments checked; `values` are those without a name that are no models."""
        given: dict[str, Value] = {}
        spans: dict[str, Span] = {}
        items = [*arguments.positional(self, node, entry, values), *node.named]
        for item in items:
            key = item.key.text
            parameter = entry.parameter(key)
            if parameter is None:
                arguments.unknown(self, item, entry)
            elif key in spans:
                labels = [Label(item.span, "given again"), Label(spans[key], "first given here")]
                self.problems.append(
                    Diagnostic(
                        "E213", f"`{key}` of `{entry.kind}` is given twice", labels, help="keep one of them"
                    )
                )
            else:
                spans[key] = item.span
                spans |= _inside(key, item.value)
                fits, value = self.argument(item.value, place_of(parameter, entry))
                if fits:
                    given[key] = value
        missing = [p for p in entry.parameters if p.required and p.name not in spans]
        if missing:
            arguments.missing(self, node, entry, missing)
        return Call(entry.kind, given, (), node.span, spans)

    # ---- one value

    def _value(self, node: tree.Value, place: Place, span: Span) -> Value:
        match node:
            case tree.Name():
                return self._name(node, place, span)
            case tree.Number():
                return read_number(self, node, place, span)
            case tree.Text():
                return self._text(node, place, span)
            case tree.Pattern():
                if any(node.text in form.choices for form in place.forms):
                    return node.text
                if choices := choices_of(place.forms):
                    self.no_choice(node.text, choices, place, span)
                    raise Unfit
            case tree.Constant():
                if isinstance(node.value, bool) and form_of(place, "bool"):
                    return node.value
                if node.value is None and form_of(place, "none"):
                    return None
                if node.value is None and "none" in choices_of(place.forms):
                    return "none"
            case tree.List():
                return self._list(node, place, span)
            case tree.Table():
                if form_of(place, "table"):
                    return {e.key.text: self._value(e.value, anything(place), e.span) for e in node.entries}
            case tree.Call():
                return self._call(node, place, span)
        self.wrong_type(node, place, span)
        raise Unfit

    def _name(self, node: tree.Name, place: Place, span: Span) -> Value:
        choices = choices_of(place.forms)
        if node.text in choices and not node.sigil:
            return node.text
        constant = self.scope.constant(node.text)
        if constant is not None:
            owner, found = constant
            found.used = True
            if node.sigil is False:
                self.report(
                    "E205", f"a constant is written `${node.text}` in YAML", span, help_=f"write ${node.text}"
                )
                raise Unfit
            inner = (
                self
                if owner is self.scope
                else Values(owner, self.catalogue, self.problems, self.kinds, self.used)
            )
            return inner._value(inner.behind(found.value), place, span)
        for wanted in ("data", "model"):
            if form_of(place, wanted):
                ref = self.reference(node, wanted, place.title)
                if ref is None:
                    raise Unfit
                return ref
        slot = next((form.slot for form in place.forms if form.slot), None)
        if slot:
            call = tree.Call(tree.Word(node.text, node.span), (), (), node.span)
            return self._part(call, slot)
        bound = self.scope.binding(node.text)
        if bound is not None:
            self.used.add(bound[0])
            if self.kinds[bound[0]] != "unknown":
                self.wrong_type(node, place, span)
        elif choices:
            self.no_choice(node.text, choices, place, span)
        elif (
            form_of(place, "str")
            or form_of(place, "selector")
            or holds(place, "str")
            or holds(place, "selector")
        ):
            title = f"{place.title} takes a string, and strings stand in quotes"
            self.report("E210", title, span, help_=f'write "{node.text}"')
        elif node.text in ("True", "False", "None", "null", "yes", "no"):
            word = {"True": "true", "False": "false", "yes": "true", "no": "false"}.get(node.text, "none")
            self.report("E210", f"`{node.text}` is not a word of recipes", span, help_=f"write {word}")
        else:
            self.unbound(node, place.title, " or ".join(takes(form) for form in place.forms))
        raise Unfit

    def _text(self, node: tree.Text, place: Place, span: Span) -> Value:
        if form := form_of(place, "str"):
            least, most = form.length
            if least is not None and len(node.value) < least:
                self.report(
                    "E202", f"{place.title} cannot be empty", span, f"needs {least} or more characters"
                )
                raise Unfit
            if most is not None and len(node.value) > most:
                self.report(
                    "E202",
                    f"{place.title} is too long",
                    span,
                    f"at most {most} characters, not {len(node.value)}",
                )
                raise Unfit
            return node.value
        if form_of(place, "selector"):
            return self._selector(node, span)
        if holds(place, "selector"):  # one selector stands for a list of one
            return (self._selector(node, span),)
        choices = choices_of(place.forms)
        if node.value in choices and any(
            form.type == "word" and len(form.choices) == 1 for form in place.forms
        ):
            return node.value  # a name such as "python-stdlib", of which there is one so far
        if node.value in choices and not node.value.isidentifier() and ":" not in node.value:
            return node.value
        if node.value in choices:
            self.report(
                "E210", f"{place.title} takes a bare word", span, help_=f"write {node.value} without quotes"
            )
        elif choices:
            self.no_choice(node.value, choices, place, span)
        elif any(form.type in ("model", "data") for form in place.forms) and self.scope.binding(node.value):
            self.report(
                "E210", f"{place.title} takes a name", span, help_=f"write {node.value} without quotes"
            )
        else:
            self.wrong_type(node, place, span)
        raise Unfit

    def _selector(self, node: tree.Text, span: Span) -> str:
        try:
            Selector.parse(node.value)
        except SelectorError as problem:
            help_ = 'write a path such as "layers[0].mlp.up" or a role such as "attention.q"'
            self.report("E226", "this selector does not parse", span, f"it {problem}", help_)
            raise Unfit from None
        return node.value

    def _list(self, node: tree.List, place: Place, span: Span) -> Value:
        if form_of(place, "rules"):
            return tuple(
                self._all(lambda item, at: read_rule(self, item, at, self._value), node.items, place)
            )
        form = form_of(place, "list")
        if form is None:
            self.wrong_type(node, place, span)
            raise Unfit
        inside = place._replace(name=f"{place.name}", forms=form.item or anything(place).forms)
        least, most = form.length
        if (least is not None and len(node.items) < least) or (most is not None and len(node.items) > most):
            wanted = (
                f"{least}"
                if least == most
                else f"at least {least}"
                if most is None
                else f"{least or 0} to {most}"
            )
            help_ = f"the default is {written_default(place.default)}" if place.default else None
            self.report("E202", f"{place.title} takes {wanted} values", span, f"not {len(node.items)}", help_)
            raise Unfit
        return tuple(self._all(lambda item, at: self._value(item, at, item.span), node.items, inside))

    def _all(self, read, items: Sequence[tree.Value], place: Place) -> list[Value]:  # type: ignore[no-untyped-def]
        """Every item read, so that all problems are reported; raises Unfit when one does not fit."""
        done: list[Value] = []
        for item in items:
            try:
                done.append(read(item, place))
            except Unfit:
                continue
        if len(done) < len(items):
            raise Unfit
        return done

    def _call(self, node: tree.Call, place: Place, span: Span) -> Value:
        slot = next((form.slot for form in place.forms if form.slot), None)
        if slot:
            return self._part(node, slot)
        gradient = next((form for form in place.forms if form.gradient), None)
        if node.name.text == "depth" and gradient:
            return self._gradient(node, place._replace(forms=(gradient,)))
        if node.name.text == "depth":
            title = f"{place.title} is one value for all layers"
            self.report(
                "E210",
                title,
                span,
                help_="write one value; rules set others by layer" if place.overrides else "write one value",
            )
        elif any(form.type in ("model", "data") for form in place.forms):
            name = place.forms[0].type
            self.report(
                "E210",
                f"{place.title} takes the name of a {name if name == 'model' else 'data binding'}",
                span,
                help_="bind the call on a line of its own, and write its name here",
            )
        else:
            self.wrong_type(node, place, span)
        raise Unfit

    def _gradient(self, node: tree.Call, place: Place) -> Call:
        if len(node.values) != 2 or node.named:
            self.report(
                "E214",
                "`depth` takes two values, for the first and the last layer",
                node.span,
                help_="write depth(0.3, 0.7)",
            )
            raise Unfit
        first, last = self._all(lambda item, at: self._value(item, at, item.span), node.values, place)
        return Call("depth", {"first": first, "last": last}, (), node.span)

    def _part(self, node: tree.Call, slot: str) -> Call:
        entry = self.catalogue.part(slot, node.name.text)
        if entry is None:
            arguments.unknown_part(self, node, slot)
            raise Unfit
        before = len(self.problems)
        call = self.call(node, entry, node.values)
        if len(self.problems) > before:
            raise Unfit
        return call


def _inside(key: str, value: tree.Value) -> dict[str, Span]:
    """Places within an argument: items of a list as "key[0]", entries of its tables as "key[0].on"."""
    match value:
        case tree.Text():  # one string stands for a list of one
            return {f"{key}[0]": value.span}
        case tree.List():
            found = {f"{key}[{i}]": item.span for i, item in enumerate(value.items)}
            tables = [(i, item) for i, item in enumerate(value.items) if isinstance(item, tree.Table)]
            return found | {f"{key}[{i}].{e.key.text}": e.value.span for i, t in tables for e in t.entries}
    return {}
