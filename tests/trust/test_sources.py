"""No source of effc reads a pickle, evaluates text or starts a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import effc

ROOT = Path(effc.__file__).resolve().parents[2]
FLOORS = ("specs", "dsl", "compiler", "kernels", "passes", "runtime", "src")
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "code",
    "pty",
}
CALLS = {"eval", "exec", "__import__"}
METHODS = {
    ("torch", "load"), ("torch", "save"), ("torch", "package"), ("os", "system"), ("os", "popen"),
    ("yaml", "unsafe_load"), ("yaml", "full_load"), ("yaml", "load_all"),
    ("builtins", "eval"), ("builtins", "exec"),
}  # fmt: skip
WORDS = {"allow_pickle", "shell", "trust_remote_code", "weights_only"}
"""Keyword arguments that may only be False."""


def test_nothing_is_unpickled_or_evaluated() -> None:
    files = sorted({p.resolve() for f in FLOORS for p in (ROOT / f).rglob("*.py")})
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{line}: {what}" for path in files for line, what in _bad(path)]
    assert found == []


def _bad(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, n.name) for n in names if n.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                yield node.lineno, module
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if (owner, attribute) in METHODS:
                yield node.lineno, f"{owner}.{attribute}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr="load")) if not _safe(node):
                yield node.lineno, "yaml.load without a safe loader"
            case ast.keyword(arg=str(word), value=value) if word in WORDS and not _false(value):
                yield node.value.lineno, word


def _safe(call: ast.Call) -> bool:
    loader = next((ast.unparse(k.value) for k in call.keywords if k.arg == "Loader"), "")
    return (loader == "" and len(call.args) > 1) or "SafeLoader" in loader or loader.startswith("_")


def _false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\nfrom marshal import loads\neval('1')\nimport torch\ntorch.load('x')\n"
        "import yaml\nyaml.load('x', Loader=yaml.Loader)\nrun('x', shell=True)\nmodel.eval()\n"
    )
    assert [line for line, _ in sorted(_bad(path))] == [1, 2, 3, 5, 7, 8]
