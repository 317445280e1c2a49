"""The import closure of a source file inside effc, or a package of methods beside it, read from its text:
nothing is imported, nothing runs.

A result depends on the sources that could have run; a catalogue entry on those it was read from. Both are
told apart by the same hash. Layout and comments do not count. What is imported for type checkers alone,
under `if TYPE_CHECKING:`, never runs and does not count either.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from effc import HOMES
from effc.runtime.read_sources import ReadSources, Stamp
from effc.specs import plugins

PACKAGE = "effc"


def fingerprint(modules: Sequence[str], docstrings: bool = True) -> str:
    """SHA-256 over the closure of these modules; docstrings count where they are read, as in a catalogue.

    Raises:
        ModuleNotFoundError: when a module of the list has no source file.
        SyntaxError: when a file of the closure does not parse.
    """
    digest = sha256()
    for module in closure(modules):
        digest.update(f"{module} {_digest(*_stamp(_file(module)), docstrings)}\n".encode())
    _read().keep()
    return digest.hexdigest()


def closure(modules: Sequence[str]) -> list[str]:
    """Dotted names of all modules inside effc, and the packages that `modules` lie in, that importing
    `modules` could load, sorted.

    Raises: as `fingerprint`.
    """
    for module in modules:
        if source(module) is None:
            raise ModuleNotFoundError(f"{module} has no source file", name=module)
    found: set[str] = set()
    exists: dict[str, bool] = {}
    todo = list(modules)
    while todo:
        if (module := todo.pop()) not in found:
            found.add(module)
            todo += _needs(module, exists)
    _read().keep()
    return sorted(found)


def source(module: str) -> Path | None:
    """The file of a module inside effc or a package of methods; None when there is none."""
    words = module.split(".")
    if words[0] == PACKAGE:
        base, rest = _floor(words[1]) if len(words) > 1 else None, words[2:]
    else:
        found = plugins.package_of(module)
        base = Path(found.folder) if found is not None and found.folder is not None else None
        rest = words[len(found.module.split(".")) :] if found is not None else []
    if base is None:
        return None
    place = base.joinpath(*rest)
    for path in (place / "__init__.py", place.with_suffix(".py") if rest else None):
        if path is not None and path.is_file():
            return path
    return None


@cache
def _floor(name: str) -> Path | None:
    """The folder of a floor. Finding it imports only `effc` itself."""
    found = find_spec(f"{PACKAGE}.{name}")
    places = found.submodule_search_locations if found else None
    return Path(next(iter(places))) if places else None


def _file(module: str) -> Path:
    found = source(module)
    assert found is not None, module
    return found


def _stamp(path: Path) -> Stamp:
    """What changes when a file is edited."""
    stat = os.stat(path)
    return str(path), stat.st_mtime_ns, stat.st_size


@cache
def _read() -> ReadSources:
    return ReadSources(_stamp(Path(__file__)))


@cache
def _tree(path: str, changed: int, size: int) -> ast.Module:
    return ast.parse(Path(path).read_bytes(), filename=path)


@cache
def _digest(path: str, changed: int, size: int, docstrings: bool) -> str:
    stamp, what = (path, changed, size), "whole" if docstrings else "bare"
    if (known := _read().get(stamp, what)) is not None:
        return str(known)
    tree = _tree(path, changed, size)
    text = ast.dump(tree if docstrings else _bare(Path(path).read_bytes()))
    digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    _read().put(stamp, what, digest)
    return digest


def _bare(text: bytes) -> ast.Module:
    """The tree without statements that are only a string, which covers docstrings of fields too."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not _is_text(s)] or [ast.Pass()]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _needs(module: str, exists: dict[str, bool]) -> list[str]:
    """Modules inside effc that a module imports, packages on the way to them included.

    `exists` holds what is known of names in this walk: a name may be a module today and none tomorrow.
    """
    found: list[str] = []
    for name in _names(module, *_stamp(_file(module))):
        words = name.split(".")
        for end in range(1, len(words) + 1):
            part = ".".join(words[:end])
            if part not in exists:
                exists[part] = source(part) is not None
            if exists[part] and part != module:
                found.append(part)
    return found


@cache
def _names(module: str, path: str, changed: int, size: int) -> list[str]:
    """Every dotted name that a module may load, each once."""
    stamp = (path, changed, size)
    if (known := _read().get(stamp, module)) is not None:
        return list(known)
    package = module if Path(path).name == "__init__.py" else module.rpartition(".")[0]
    found = dict.fromkeys(n for node in _running(_tree(*stamp)) for n in _named(node, package))
    _read().put(stamp, module, list(found))
    return list(found)


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, except bodies that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _for_types(child.test):
            for other in child.orelse:
                yield other
                yield from _running(other)
            continue
        yield child
        yield from _running(child)


def _for_types(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _named(node: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that a statement may load; what follows `import` may be a module or not.

    Names of the front door lead on: `from effc import rule`, `effc.rule`, and with `import effc as e` all.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        if any(alias.name == PACKAGE and alias.asname for alias in node.names):
            yield from HOMES.values()
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
        yield from (HOMES[name] for name in (node.attr,) if name in HOMES)
    elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE and not node.level:
        yield from (HOMES.get(alias.name, f"{PACKAGE}.{alias.name}") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")
            above = above[: len(above) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
