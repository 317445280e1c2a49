"""Names: what each one stands for, in a recipe and in the files it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from effc.dsl import tree
from effc.dsl.files import Reader
from effc.specs.diagnostic import Diagnostic, EffcError, Label
from effc.specs.source import Span

RESERVED = frozenset(
    (
        "effc",
        "recipe",
        "model",
        "data",
        "param",
        "let",
        "expect",
        "export",
        "use",
        "as",
        "true",
        "false",
        "none",
    )
)


@dataclass(slots=True)
class Constant:
    """A `let` or `param`, with what the command line put in its place."""

    statement: tree.Let
    value: tree.Value
    used: bool = False


@dataclass(slots=True)
class Scope:
    """The names of one file. `prefix` is what its bindings are called from outside, such as "c."."""

    document: tree.Document
    prefix: str = ""
    constants: dict[str, Constant] = field(default_factory=dict)
    bindings: dict[str, tree.Bind] = field(default_factory=dict)
    aliases: dict[str, Scope] = field(default_factory=dict)
    uses: dict[str, tree.Use] = field(default_factory=dict)

    def all(self) -> Iterator[Scope]:
        """This scope and those it uses."""
        yield self
        for inner in self.aliases.values():
            yield from inner.all()

    def constant(self, name: str) -> tuple[Scope, Constant] | None:
        """The constant of this name, and the scope its own value is read in."""
        head, dot, rest = name.partition(".")
        if dot:
            return self.aliases[head].constant(rest) if head in self.aliases else None
        found = self.constants.get(name)
        return (self, found) if found else None

    def binding(self, name: str) -> tuple[str, tree.Bind] | None:
        """The full name and the statement of a binding."""
        if name in self.bindings:
            return self.prefix + name, self.bindings[name]
        head, dot, rest = name.partition(".")
        return self.aliases[head].binding(rest) if dot and head in self.aliases else None

    def is_broken(self, name: str) -> bool:
        """Whether the name belongs to a statement that was reported already."""
        head, _, rest = name.partition(".")
        if head in self.aliases and rest:
            return self.aliases[head].is_broken(rest)
        return head in self.document.broken

    def near(self, name: str) -> list[str]:
        """Names of this scope that look like `name`."""
        names = [*self.constants, *self.bindings]
        names += [f"{alias}.{n}" for alias, inner in self.aliases.items() for n in inner.bindings]
        return get_close_matches(name, names, n=3, cutoff=0.6)


def build(
    document: tree.Document,
    settings: Mapping[str, tree.Value],
    problems: list[Diagnostic],
    read: Reader,
) -> Scope:
    """The scope of a file and of everything it uses; `settings` replace values of its params."""
    scope = _one(document, "", problems, read, ())
    for name, value in settings.items():
        constant = scope.constants.get(name)
        if constant is None or constant.statement.keyword != "param":
            problems.append(_no_param(scope, name, value))
        elif type(constant.value) is not type(value) or not _alike(constant.value, value):
            problems.append(_other_kind(name, constant.value, value))
        else:
            constant.value = value
    return scope


def _one(
    document: tree.Document, prefix: str, problems: list[Diagnostic], read: Reader, above: tuple[Path, ...]
) -> Scope:
    scope = Scope(document, prefix)
    places: dict[str, Span] = {}
    for statement in document.statements:
        match statement:
            case tree.Let():
                if _binds(statement.name, places, problems):
                    scope.constants[statement.name.text] = Constant(statement, statement.value)
            case tree.Bind():
                if _binds(statement.name, places, problems):
                    scope.bindings[statement.name.text] = statement
            case tree.Use():
                if _binds(statement.alias, places, problems):
                    inner = _used(statement, scope, problems, read, above)
                    if inner is not None:
                        scope.aliases[statement.alias.text] = inner
                        scope.uses[statement.alias.text] = statement
    return scope


def _binds(word: tree.Word, places: dict[str, Span], problems: list[Diagnostic]) -> bool:
    """Whether the word may be bound here; says why not."""
    name = word.text
    if name in RESERVED:
        problems.append(
            Diagnostic(
                "E225",
                f"`{name}` is a word of the language and cannot be bound",
                [Label(word.span)],
                help="choose another name",
            )
        )
    elif "." in name:
        help_ = f"bind one word, such as `{name.replace('.', '_')}`"
        problems.append(
            Diagnostic("E225", f"`{name}` cannot be bound: it has a dot", [Label(word.span)], help=help_)
        )
    elif name in places:
        labels = [Label(word.span, "bound again"), Label(places[name], "first bound here")]
        problems.append(
            Diagnostic("E206", f"`{name}` is bound twice", labels, help="give one of them another name")
        )
    else:
        places[name] = word.span
        return True
    return False


def _used(
    use: tree.Use, scope: Scope, problems: list[Diagnostic], read: Reader, above: tuple[Path, ...]
) -> Scope | None:
    """The scope of a used file, or None after saying what is wrong with it."""
    label = Label(use.path.span)
    folder = scope.document.source.folder
    if folder is None:
        problems.append(Diagnostic("E218", "`use` needs a recipe that is a file", [label]))
        return None
    top = above[0].parent if above else folder
    try:
        path = (folder / use.path.value).resolve()
        inside = path.is_relative_to(top) and not Path(use.path.value).is_absolute()
    except (OSError, ValueError, RuntimeError):
        problems.append(Diagnostic("E218", "`use` is given no file name", [label]))
        return None
    here = (*above, _file_of(scope.document))
    if not inside:
        notes = ["a recipe may use files of its own folder and below"]
        problems.append(
            Diagnostic(
                "E218",
                "`use` reaches outside the folder of the recipe",
                [label],
                notes,
                "move the file there",
            )
        )
    elif path in here:
        problems.append(
            Diagnostic(
                "E218",
                f"`{use.path.value}` uses itself, directly or through others",
                [label],
                help="take this line out",
            )
        )
    else:
        try:
            document = read(path, problems)
            return _one(document, f"{scope.prefix}{use.alias.text}.", problems, read, here)
        except EffcError as problem:
            found = problem.diagnostics[0]
            near = get_close_matches(path.name, _siblings(path), n=1, cutoff=0.75)
            title, help_ = found.title.replace(str(path), use.path.value), found.help
            if found.code == "E114":
                help_ = f"did you mean `{near[0]}`?" if near else "write a path as seen from this file"
            problems.append(Diagnostic("E218", title, [label], found.notes, help_))
        except OSError as problem:
            problems.append(Diagnostic("E218", str(problem), [label]))
    return None


def _file_of(document: tree.Document) -> Path:
    folder = document.source.folder or Path()
    return folder / Path(document.source.name).name


def _siblings(path: Path) -> list[str]:
    try:
        return [p.name for p in path.parent.iterdir() if p.suffix in (".effc", ".yaml", ".yml")][:1000]
    except OSError:
        return []


def _alike(default: tree.Value, value: tree.Value) -> bool:
    """Whether a value from the command line may stand for a default of the same node type."""
    return not isinstance(default, tree.Constant) or isinstance(value, tree.Constant)


def _no_param(scope: Scope, name: str, value: tree.Value) -> Diagnostic:
    params = [n for n, c in scope.constants.items() if c.statement.keyword == "param"]
    labels = [Label(value.span)]
    if name in scope.constants:
        labels = [Label(scope.constants[name].statement.span)]
        return Diagnostic(
            "E216",
            f"`{name}` is a `let`; the command line sets only params",
            labels,
            help=f"write `param {name} = ...` in the recipe",
        )
    near = get_close_matches(name, params, n=1, cutoff=0.6)
    has = f"it has: {', '.join(params)}" if params else "it has no params"
    return Diagnostic(
        "E216",
        f"the recipe has no param `{name}`",
        labels,
        help=f"did you mean `{near[0]}`?" if near else has,
    )


def _other_kind(name: str, default: tree.Value, value: tree.Value) -> Diagnostic:
    written = default.span.text
    return Diagnostic(
        "E217",
        f"`-p {name}` gives {described(value)}, where the recipe has {described(default)}",
        [Label(value.span), Label(default.span, "the value in the recipe")],
        help=f"write -p {name}='\"...\"'"
        if isinstance(default, tree.Text)
        else f"write a value such as {written}",
    )


def described(value: tree.Value) -> str:
    """A value in words, for errors: what kind of thing was written."""
    match value:
        case tree.Name():
            return f"the word `{value.text}`"
        case tree.Number():
            return (
                f"the number {value.text}{' ' if value.unit and value.unit != '%' else ''}{value.unit or ''}"
            )
        case tree.Text():
            return "a string"
        case tree.Pattern():
            return f"the pattern {value.text}"
        case tree.Constant():
            return {True: "true", False: "false", None: "none"}[value.value]
        case tree.List():
            return "a list"
        case tree.Table():
            return "a table"
    return f"a call of `{value.name.text}`"
