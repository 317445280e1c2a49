"""Values: from what was written to what an argument takes, in base units, or to what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import floor
from typing import Any, NamedTuple

from effc.dsl import tree
from effc.dsl.scope import Scope, described
from effc.specs.catalogue import Catalogue, Entry, Form, Parameter
from effc.specs.diagnostic import Diagnostic, Label
from effc.specs.quantity import DIMENSIONS, EXAMPLES, UNITS, dimensions_of, to_base
from effc.specs.recipe import Call, Ref, Value
from effc.specs.selector import Selector, SelectorError
from effc.specs.source import Span

SPLITS = ("train", "heldout")


class Place(NamedTuple):
    """The argument that a value is for, as messages call it, and what it may be."""

    name: str
    of: str
    forms: tuple[Form, ...]
    overrides: tuple[Parameter, ...] = ()
    """For `rules`: the arguments that a rule may set."""
    default: Any = None

    @property
    def title(self) -> str:
        return f"`{self.name}` of `{self.of}`"


class _Unfit(Exception):
    """A value that does not fit; it was reported, or belongs to a statement that was."""


@dataclass(slots=True)
class Values:
    """Turns values of one file into recipe values; problems are collected, not raised."""

    scope: Scope
    catalogue: Catalogue
    problems: list[Diagnostic]
    kinds: dict[str, str]
    """Full name of every binding -> "model", "data" or "report"."""
    used: set[str]
    """Full names that something refers to."""

    def argument(self, node: tree.Value, place: Place) -> tuple[bool, Value]:
        """Whether the value fits, and the value."""
        try:
            return True, self._value(node, place, node.span)
        except _Unfit:
            return False, None

    def reference(self, node: tree.Name, wanted: str, place: str) -> Ref | None:
        """The binding that a name means, of the wanted kind ("model", "data"); None when it was reported."""
        found, split = self.scope.binding(node.text), None
        if found is None and "." in node.text:
            head, _, last = node.text.rpartition(".")
            found, split = self.scope.binding(head), last
        if found is None:
            self._unbound(node, place, wanted)
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

    def call(self, node: tree.Call, entry: Entry, values: Sequence[tree.Value]) -> Call:
        """A call with its arguments checked; `values` are those without a name that are no models."""
        arguments: dict[str, Value] = {}
        spans: dict[str, Span] = {}
        given = [*self._positional(node, entry, values), *node.named]
        for item in given:
            key = item.key.text
            parameter = entry.parameter(key)
            if parameter is None:
                self._unknown_argument(item, entry)
            elif key in spans:
                labels = [Label(item.span, "given again"), Label(spans[key], "first given here")]
                self.problems.append(
                    Diagnostic(
                        "E213", f"`{key}` of `{entry.kind}` is given twice", labels, help="keep one of them"
                    )
                )
            else:
                spans[key] = item.span
                fits, value = self.argument(item.value, place_of(parameter, entry))
                if fits:
                    arguments[key] = value
        missing = [p for p in entry.parameters if p.required and p.name not in spans]
        if missing:
            self._missing(node, entry, missing)
        return Call(entry.kind, arguments, (), node.span, spans)

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

    def _value(self, node: tree.Value, place: Place, span: Span) -> Value:
        match node:
            case tree.Name():
                return self._name(node, place, span)
            case tree.Number():
                return self._number(node, place, span)
            case tree.Text():
                return self._text(node, place, span)
            case tree.Pattern():
                if any(node.text in form.choices for form in place.forms):
                    return node.text
                if choices := _choices(place.forms):
                    self._no_choice(node.text, choices, place, span)
                    raise _Unfit
            case tree.Constant():
                if isinstance(node.value, bool) and _form(place, "bool"):
                    return node.value
                if node.value is None and _form(place, "none"):
                    return None
                if node.value is None and "none" in _choices(place.forms):
                    return "none"
            case tree.List():
                return self._list(node, place, span)
            case tree.Table():
                if _form(place, "table"):
                    return {e.key.text: self._value(e.value, _anything(place), e.span) for e in node.entries}
            case tree.Call():
                return self._call(node, place, span)
        self._wrong_type(node, place, span)
        raise _Unfit

    def _name(self, node: tree.Name, place: Place, span: Span) -> Value:
        choices = _choices(place.forms)
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
                raise _Unfit
            inner = (
                self
                if owner is self.scope
                else Values(owner, self.catalogue, self.problems, self.kinds, self.used)
            )
            return inner._value(inner._deeper(found.value), place, span)
        for wanted in ("data", "model"):
            if _form(place, wanted):
                ref = self.reference(node, wanted, place.title)
                if ref is None:
                    raise _Unfit
                return ref
        slot = next((form.slot for form in place.forms if form.slot), None)
        if slot:
            call = tree.Call(tree.Word(node.text, node.span), (), (), node.span)
            return self._part(call, slot)
        bound = self.scope.binding(node.text)
        if bound is not None:
            self.used.add(bound[0])
            if self.kinds[bound[0]] != "unknown":
                self._wrong_type(node, place, span)
        elif choices:
            self._no_choice(node.text, choices, place, span)
        elif (
            _form(place, "str")
            or _form(place, "selector")
            or _inner(place, "str")
            or _inner(place, "selector")
        ):
            title = f"{place.title} takes a string, and strings stand in quotes"
            self.report("E210", title, span, help_=f'write "{node.text}"')
        elif node.text in ("True", "False", "None", "null", "yes", "no"):
            word = {"True": "true", "False": "false", "yes": "true", "no": "false"}.get(node.text, "none")
            self.report("E210", f"`{node.text}` is not a word of recipes", span, help_=f"write {word}")
        else:
            self._unbound(node, place.title, " or ".join(_takes(form) for form in place.forms))
        raise _Unfit

    def _deeper(self, value: tree.Value) -> tree.Value:
        """The value behind constants that name constants. A circle is reported."""
        seen: dict[str, None] = {}
        while isinstance(value, tree.Name) and (found := self.scope.constant(value.text)):
            if value.text in seen:
                self._circle([*seen, value.text], found[1].statement)
                raise _Unfit
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

    def _number(self, node: tree.Number, place: Place, span: Span) -> Value:
        forms = [form for form in place.forms if form.type in ("int", "float")]
        if not forms:
            self._wrong_type(node, place, span)
            raise _Unfit
        if node.unit is not None:
            fitting = [form for form in forms if node.unit in DIMENSIONS.get(form.unit or "", {})]
            if not fitting:
                self._wrong_unit(node, place, forms, span)
                raise _Unfit
            forms = fitting
        whole = float(node.text).is_integer()
        forms.sort(key=lambda form: (form.type == "int") != node.text.lstrip("-").isdigit())
        for form in forms:
            value = _in_form(node, form)
            if value is not None and not _outside(value, form):
                return value
        form = next((f for f in forms if f.type == "float" or whole or node.unit), forms[0])
        value = _in_form(node, form)
        if value is None:
            below = floor(float(node.text))
            help_ = f"write {below} or {below + 1}" if abs(below) < 10**15 else None
            self.report("E210", f"{place.title} is a whole number", span, f"not {_shown(node)}", help_)
        else:
            self._out_of_range(node, value, form, place, span)
        raise _Unfit

    def _text(self, node: tree.Text, place: Place, span: Span) -> Value:
        if form := _form(place, "str"):
            least, most = form.length
            if least is not None and len(node.value) < least:
                self.report(
                    "E202", f"{place.title} cannot be empty", span, f"needs {least} or more characters"
                )
                raise _Unfit
            if most is not None and len(node.value) > most:
                self.report(
                    "E202",
                    f"{place.title} is too long",
                    span,
                    f"at most {most} characters, not {len(node.value)}",
                )
                raise _Unfit
            return node.value
        if _form(place, "selector"):
            return self._selector(node, span)
        if _inner(place, "selector"):  # one selector stands for a list of one
            return (self._selector(node, span),)
        choices = _choices(place.forms)
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
            self._no_choice(node.value, choices, place, span)
        elif any(form.type in ("model", "data") for form in place.forms) and self.scope.binding(node.value):
            self.report(
                "E210", f"{place.title} takes a name", span, help_=f"write {node.value} without quotes"
            )
        else:
            self._wrong_type(node, place, span)
        raise _Unfit

    def _selector(self, node: tree.Text, span: Span) -> str:
        try:
            Selector.parse(node.value)
        except SelectorError as problem:
            help_ = 'write a path such as "layers[0].mlp.up" or a role such as "attention.q"'
            self.report("E226", "this selector does not parse", span, f"it {problem}", help_)
            raise _Unfit from None
        return node.value

    def _list(self, node: tree.List, place: Place, span: Span) -> Value:
        if _form(place, "rules"):
            return tuple(self._all(self._rule, node.items, place))
        form = _form(place, "list")
        if form is None:
            self._wrong_type(node, place, span)
            raise _Unfit
        inside = place._replace(name=f"{place.name}", forms=form.item or _anything(place).forms)
        least, most = form.length
        if (least is not None and len(node.items) < least) or (most is not None and len(node.items) > most):
            wanted = (
                f"{least}"
                if least == most
                else f"at least {least}"
                if most is None
                else f"{least or 0} to {most}"
            )
            help_ = f"the default is {_default(place.default)}" if place.default else None
            self.report("E202", f"{place.title} takes {wanted} values", span, f"not {len(node.items)}", help_)
            raise _Unfit
        return tuple(self._all(lambda item, at: self._value(item, at, item.span), node.items, inside))

    def _all(self, read, items: Sequence[tree.Value], place: Place) -> list[Value]:  # type: ignore[no-untyped-def]
        """Every item read, so that all problems are reported; raises _Unfit when one does not fit."""
        done: list[Value] = []
        for item in items:
            try:
                done.append(read(item, place))
            except _Unfit:
                continue
        if len(done) < len(items):
            raise _Unfit
        return done

    def _rule(self, node: tree.Value, place: Place) -> Value:
        if not isinstance(node, tree.Table):
            help_ = 'write {on = "head", skip = true} or {on = "layers[0]", bits = 8}'
            self.report("E210", "a rule is a table", node.span, f"not {described(node)}", help_)
            raise _Unfit
        known = {
            "on": Place("on", "rules", (Form("selector"),)),
            "skip": Place("skip", "rules", (Form("bool"),)),
        }
        known |= {p.name: Place(p.name, place.of, p.forms) for p in place.overrides}
        done: dict[str, Value] = {}
        for entry in node.entries:
            key = entry.key.text
            if key in done:
                self.report("E213", f"`{key}` of a rule is given twice", entry.span, help_="keep one of them")
                raise _Unfit
            if key not in known:
                near = get_close_matches(key, known, n=1, cutoff=0.75)
                has = f"rules of `{place.of}` may set: {', '.join(known)}"
                help_ = f"did you mean `{near[0]}`?" if near else has
                self.report("E211", f"a rule of `{place.of}` cannot set `{key}`", entry.key.span, help_=help_)
                raise _Unfit
            done[key] = self._value(entry.value, known[key], entry.value.span)
        if "on" not in done:
            self.report(
                "E204", "a rule needs `on`", node.span, help_='say where it holds: {on = "head", ...}'
            )
            raise _Unfit
        if len(done) == 1:
            self.report(
                "E204", "a rule says what is different", node.span, help_="add skip = true or an argument"
            )
            raise _Unfit
        if done.get("skip") is True and len(done) > 2:
            self.report(
                "E213", "a rule either skips or sets arguments", node.span, help_="take one of them out"
            )
            raise _Unfit
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
            self._wrong_type(node, place, span)
        raise _Unfit

    def _gradient(self, node: tree.Call, place: Place) -> Call:
        if len(node.values) != 2 or node.named:
            self.report(
                "E214",
                "`depth` takes two values, for the first and the last layer",
                node.span,
                help_="write depth(0.3, 0.7)",
            )
            raise _Unfit
        first, last = self._all(lambda item, at: self._value(item, at, item.span), node.values, place)
        return Call("depth", {"first": first, "last": last}, (), node.span)

    def _part(self, node: tree.Call, slot: str) -> Call:
        entry = self.catalogue.part(slot, node.name.text)
        if entry is None:
            names = [e.short for e in self.catalogue.of_slot(slot)]
            near = get_close_matches(node.name.text, names, n=1, cutoff=0.6)
            other = next(
                (e for e in self.catalogue.entries if e.role == "part" and e.short == node.name.text), None
            )
            notes = [f"`{node.name.text}` is a part of {other.slot}"] if other else []
            help_ = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(names)}"
            if other and other.slot:
                help_ = f"write {other.slot.rpartition('.')[2]} = {other.short}(...)"
            self.report(
                "E201", f"{slot} has no part `{node.name.text}`", node.name.span, help_=help_, notes=notes
            )
            raise _Unfit
        before = len(self.problems)
        call = self.call(node, entry, node.values)
        if len(self.problems) > before:
            raise _Unfit
        return call

    # ---- what does not fit, in words

    def _positional(self, node: tree.Call, entry: Entry, values: Sequence[tree.Value]) -> list[tree.Entry]:
        """Values without a name, given the names of the arguments that must be there, in order."""
        names = [p.name for p in entry.parameters if p.required] if entry.role != "method" else []
        if entry.role == "part":
            names = []
        if len(values) > len(names):
            extra = values[len(names)]
            named = [p.name for p in entry.parameters if p.name not in names]
            help_ = (
                f"write {named[0]} = {_short(extra)}, or another of: {', '.join(named)}" if named else None
            )
            name = entry.short if entry.role == "part" else entry.kind
            title = f"`{name}` takes {_count(len(names))} without a name"
            self.report("E214", title, extra.span, f"not {len(values)}", help_)
        return [
            tree.Entry(tree.Word(name, value.span), value) for name, value in zip(names, values, strict=False)
        ]

    def _unknown_argument(self, item: tree.Entry, entry: Entry) -> None:
        key = item.key.text
        names = [p.name for p in entry.parameters]
        near = get_close_matches(key, names, n=1, cutoff=0.6) or [
            n for n in names if key in _SYNONYMS.get(n, ())
        ]
        slots = [p for p in entry.parameters if p.slot and self._part_takes(p.slot, p.default, key)]
        if near:
            help_ = f"did you mean `{near[0]}`?"
        elif slots:
            help_ = (
                f"it belongs to a part: {slots[0].name} = {slots[0].default}({key} = {_short(item.value)})"
            )
        else:
            help_ = f"it has: {', '.join(names) or 'no arguments'}"
        self.report("E203", f"`{entry.kind}` has no argument `{key}`", item.key.span, help_=help_)

    def _part_takes(self, slot: str, default: object, key: str) -> bool:
        part = self.catalogue.part(slot, str(default))
        return bool(part and part.parameter(key))

    def _missing(self, node: tree.Call, entry: Entry, missing: Sequence[Parameter]) -> None:
        names = " and ".join(f"`{p.name}`" for p in missing)
        shown = ", ".join(f"{p.name} = {self._example(p)}" for p in missing)
        notes = [f"{p.name}: {p.description}" for p in missing if p.description]
        title = f"`{entry.kind}` needs {names}"
        self.report("E204", title, node.name.span, help_=f"add {shown}", notes=notes)

    def _example(self, parameter: Parameter) -> str:
        form = parameter.forms[0]
        if form.type in ("data", "model"):
            bound = [name for name, kind in self.kinds.items() if kind == form.type]
            return bound[0] if bound else "NAME"
        if form.choices:
            return str(form.choices[0])
        number = "100" if parameter.name in ("steps", "samples") else f"{form.least or 1:g}"
        return {"str": '"..."', "int": number, "float": number, "bool": "true", "list": "[...]"}.get(
            form.type, "..."
        )

    def _unbound(self, node: tree.Name, place: str, wanted: str) -> None:
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

    def _wrong_type(self, node: tree.Value, place: Place, span: Span) -> None:
        takes = " or ".join(_takes(form) for form in place.forms)
        found = described(node)
        help_ = None
        if isinstance(node, tree.Name) and self.kinds.get(node.text):
            found = f"the {self.kinds[node.text]} `{node.text}`"
        if _form(place, "bool") and isinstance(node, tree.Number) and node.text in ("0", "1"):
            help_ = f"write {'true' if node.text == '1' else 'false'}"
        elif isinstance(node, tree.Text) and _form(place, "int", "float"):
            help_ = f"write {node.value} without quotes" if node.value[:1].isdigit() else None
        elif form := _form(place, "list"):
            if not isinstance(node, tree.List):
                example = EXAMPLES.get(form.item[0].unit or "", "0.9") if form.item else "..."
                items = form.length[0] or 1
                help_ = f"write a list, as in [{', '.join([_short(node)] + [example] * (items - 1))}]"
        elif slot := next((form.slot for form in place.forms if form.slot), None):
            names = ", ".join(e.short for e in self.catalogue.of_slot(slot))
            help_ = f"name a part, as in {place.name} = {names.split(', ')[0]}(...); there are: {names}"
        elif _form(place, "rules"):
            help_ = 'write a list of tables: [{on = "head", skip = true}]'
        self.report("E210", f"{place.title} takes {takes}", span, f"not {found}", help_)

    def _wrong_unit(self, node: tree.Number, place: Place, forms: Sequence[Form], span: Span) -> None:
        unit = node.unit or ""
        measured = dimensions_of(unit)
        wanted = " or ".join(dict.fromkeys(form.unit or "a plain number" for form in forms))
        examples = [EXAMPLES[form.unit] for form in forms if form.unit and form.unit in EXAMPLES]
        if not measured:
            fits = near_unit(unit, [form.unit or "" for form in forms])
            help_ = (
                f"did you mean {node.text} {fits}?"
                if fits
                else (f"write {examples[0]}" if examples else f"write {node.text}")
            )
            self.report("E209", f"`{unit}` is no unit", span, f"{place.title} counts in {wanted}", help_)
            return
        help_ = (
            f"write it as in {place.name} = {examples[0]}"
            if examples
            else f"write {place.name} = {node.text}"
        )
        self.report(
            "E209", f"{place.title} is measured in {wanted}", span, f"`{unit}` measures {measured[0]}", help_
        )

    def _out_of_range(self, node: tree.Number, value: float, form: Form, place: Place, span: Span) -> None:
        shown = _shown(node) if node.unit else f"{value:g}" if isinstance(value, float) else str(value)[:40]
        help_ = None
        if form.unit == "share" and node.unit is None and 1 < value <= 100:
            help_ = f"write {value:g}% for a share"
        elif form.choices:
            near = min(form.choices, key=lambda c: abs(float(c) - value))
            help_ = f"write {near}"
        else:
            inside = _nearest(value, form)
            help_ = f"write {inside}" if inside else None
        limits = f"one of {', '.join(map(str, form.choices))}" if form.choices else _limits(form)
        self.report("E202", f"{place.title} is out of range", span, f"must be {limits}, not {shown}", help_)

    def _no_choice(self, word: str, choices: Sequence[str], place: Place, span: Span) -> None:
        near = get_close_matches(word, choices, n=1, cutoff=0.5)
        help_ = f"did you mean `{near[0]}`?" if near else None
        self.report(
            "E215", f"{place.title} cannot be `{word[:60]}`", span, f"one of: {', '.join(choices)}", help_
        )


_ARTICLES = {"model": "a model", "data": "data", "report": "a report"}
_BINDS = {"model": 'model {} = load("...")', "data": 'data {} = corpus("python-stdlib")'}
_SYNONYMS = {
    "keep": ("ratio", "fraction"),
    "bits": ("w_bits", "wbits", "num_bits"),
    "group": ("groupsize", "q_group_size"),
    "samples": ("num_samples", "nsamples", "num_calibration_samples"),
    "except": ("ignore", "exclude", "skip"),
    "select": ("targets", "include", "modules", "on"),
    "steps": ("max_steps", "iterations", "epochs"),
    "rank": ("r",),
    "temperature": ("tau", "T"),
    "wd": ("weight_decay",),
    "lambda": ("scale", "strength"),
}
"""What other tools call an argument."""


def place_of(parameter: Parameter, entry: Entry) -> Place:
    """The place of one argument; `rules` also know what they may set."""
    overrides: tuple[Parameter, ...] = ()
    if parameter.takes("rules"):
        overrides = tuple(p for name in entry.overrides if (p := entry.parameter(name)))
    return Place(parameter.name, entry.kind, parameter.forms, overrides, parameter.default)


def near_unit(unit: str, dimensions: Sequence[str]) -> str | None:
    """A unit of these dimensions that looks like a word that is none."""
    known = [u for u in UNITS if any(u in DIMENSIONS.get(dimension, {}) for dimension in dimensions)]
    same = [u for u in known if u.lower() == unit.lower()]
    return next(iter([*same, *get_close_matches(unit, known, n=1, cutoff=0.5)]), None)


def _form(place: Place, *types: str) -> Form | None:
    return next((form for form in place.forms if form.type in types), None)


def _inner(place: Place, type_: str) -> bool:
    """Whether the argument is a list of such items."""
    return any(inner.type == type_ for form in place.forms if form.type == "list" for inner in form.item)


def _choices(forms: Sequence[Form]) -> list[str]:
    return [c for form in forms for c in form.choices if isinstance(c, str)]


_ANYTHING = (Form("float"), Form("bool"), Form("none"), Form("str"), Form("list"), Form("table"))


def _anything(place: Place) -> Place:
    return place._replace(forms=_ANYTHING)


def _in_form(node: tree.Number, form: Form) -> float | None:
    """The number in base units as this form takes it; None when the form takes only whole numbers."""
    number = int(node.text) if node.text.lstrip("-").isdigit() else float(node.text)
    value = to_base(number, node.unit, form.unit)
    if value is None or form.type == "float":
        return None if value is None else float(value)
    return int(value) if float(value).is_integer() else None


def _outside(value: float, form: Form) -> bool:
    if form.choices:
        return value not in form.choices
    low, high = form.open
    return (form.least is not None and (value < form.least or (low and value == form.least))) or (
        form.greatest is not None and (value > form.greatest or (high and value == form.greatest))
    )


def _limits(form: Form) -> str:
    """The range in words, shares as percentages."""

    def shown(limit: float) -> str:
        return f"{limit * 100:g}%" if form.unit == "share" else f"{limit:g}"

    low, high = form.open
    least = "" if form.least is None else f"{'above' if low else 'at least'} {shown(form.least)}"
    greatest = "" if form.greatest is None else f"{'below' if high else 'at most'} {shown(form.greatest)}"
    return " and ".join(part for part in (least, greatest) if part)


def _nearest(value: float, form: Form) -> str | None:
    """The limit that was crossed, where it is itself allowed."""
    low, high = form.open
    for limit, is_open, crossed in ((form.least, low, -1), (form.greatest, high, 1)):
        if limit is not None and not is_open and (value - limit) * crossed > 0:
            return f"{limit * 100:g}%" if form.unit == "share" else f"{limit:g}"
    return None


def _takes(form: Form) -> str:
    """A form in words, for "takes ..."."""
    if form.choices:
        return " | ".join(map(str, form.choices))
    plain = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a string",
        "none": "none",
        "model": "a model",
        "data": "data",
        "selector": "a selector",
        "rules": "a list of rules",
        "table": "a table",
    }
    if form.type == "part":
        return f"a part of {form.slot}"
    if form.type == "list":
        return f"a {form}"
    return f"{plain[form.type]} ({form.unit})" if form.unit else plain[form.type]


def _default(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple | list) else str(value)


def _shown(node: tree.Number) -> str:
    return node.text + (node.unit if node.unit == "%" else f" {node.unit}" if node.unit else "")


def _short(node: tree.Value) -> str:
    text = " ".join(node.span.text.split())
    return text if len(text) <= 40 else "..."


def _count(n: int) -> str:
    return {0: "no value", 1: "one value"}.get(n, f"{n} values")
