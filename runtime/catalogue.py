"""The catalogue: read from the files themselves, kept in the user's cache, never edited by hand.

Checking a recipe may not import torch, and methods do. So every file is described once, by a child process,
and the description is kept under the hash of all effc sources that the file depends on. Per run, only the
stamps (size, time) of the sources are compared; what changed is described again.

    python -m effc.runtime.catalogue        describe everything now, as `make venv` does
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from effc import specs
from effc.specs import plugins as packages
from effc.specs import user_cache
from effc.specs.catalogue import Catalogue, Entry, EntryRole

_FORMAT = "6"
"""Raised when entries get another shape."""
_ROOT = Path(specs.__path__[0]).resolve().parent
"""The folder that holds the six floors."""
_READ = ("compiler", "passes", "runtime", "specs")
"""Floors whose files entries may depend on."""


class Plugin(NamedTuple):
    """One file that a recipe can call."""

    kind: str
    role: EntryRole
    module: str
    value: str


@dataclass(frozen=True, slots=True)
class Described:
    """Entries, and for files that could not be read the reason."""

    entries: Mapping[str, Entry]
    broken: Mapping[str, str]


@cache
def catalogue() -> Catalogue:
    """Everything that recipes can call, up to date with the files. Files that do not import are left out."""
    found = described()
    return Catalogue.of(found.entries.values(), found.broken)


@cache
def described() -> Described:
    """The catalogue's entries, from the cache where nothing changed."""
    name, key = _place()
    kept = user_cache.read(name, key) or user_cache.read(_place(alone=True)[0], key)
    now = _stamps()
    if kept and kept["stamps"] == now:
        return _from_json(kept)
    return _renew(name, key, kept, now)


def plugins(modules: Iterable[str]) -> Iterator[Plugin]:
    """The files among these modules that recipes can call; a leading underscore means shared code."""
    foreign = {one.module: one.kind for one in packages.methods()}
    for module in modules:
        if module in foreign:
            yield Plugin(foreign[module], "method", module, _value(foreign[module]))
            continue
        parts = module.split(".")[1:] if module.startswith("effc.") else []
        if any(part.startswith("_") for part in parts):
            continue
        match parts:
            case ["passes", family, method] if family != "lower":
                yield Plugin(f"{family}.{method}", "method", module, _value(family))
            case ["runtime", "parts", *slot, part] if len(slot) >= 2:
                yield Plugin(".".join((*slot, part)), "part", module, "part")
            case ["runtime", "data", source]:
                yield Plugin(source, "data", module, "data")
            case ["runtime", "exports", name]:
                yield Plugin(name, "export", module, "export")
            case ["runtime", "models", name]:
                yield Plugin(name, "model", module, "model")


def _value(kind: str) -> str:
    """What a method makes, by its family."""
    return "report" if kind.partition(".")[0] == "analyze" else "model"


def describe(found: Sequence[Plugin], digests: Mapping[str, str]) -> dict[str, Any]:
    """Import the files and describe them, as JSON. One that fails is reported and does not stop the rest."""
    from importlib import import_module

    from effc.runtime.describe_fields import entry
    from effc.specs.base import Spec

    entries: list[Any] = []
    broken: dict[str, str] = {}
    for plugin in found:
        try:
            module = import_module(plugin.module)
            classes = [
                value
                for value in vars(module).values()
                if isinstance(value, type) and issubclass(value, Spec) and value.__module__ == plugin.module
            ]
            if len(classes) != 1:
                raise TypeError(f"it must define exactly one Spec, found {len(classes)}")
            made = entry(classes[0], plugin.kind, plugin.role, digests[plugin.module], plugin.value)
            package = packages.package_of(plugin.module)
            entries.append(made.as_json() | {"package": str(package) if package else ""})
        except Exception as problem:
            broken[plugin.kind] = f"{type(problem).__name__}: {problem}".partition("\n")[0]
    return {"entries": entries, "broken": broken}


def _renew(name: str, key: str, kept: Any, now: dict[str, list[int]]) -> Described:
    """Describe what is new or depends on something new, and keep the result."""
    found, broken = _unlike(plugins(now))
    broken |= {package.name: package.problem for package in packages.packages() if package.problem}
    digests = _digests(found)
    old = {e["kind"]: e for e in kept["entries"]} if kept else {}
    stale = [p for p in found if p.kind not in old or old[p.kind]["closure"] != digests[p.module]]
    fresh: dict[str, Any] = {"entries": [], "broken": {}}
    if stale:
        print(
            f"effc: reading {len(stale)} new or changed methods and parts, once", file=sys.stderr, flush=True
        )
        fresh = _in_child(stale, digests)
    renewed = {e["kind"]: e for e in fresh["entries"]}
    kept_on = {p.kind: old[p.kind] for p in found if p.kind in old and p not in stale}
    entries = {**kept_on, **renewed}
    broken |= fresh["broken"]
    data = {"stamps": now, "entries": [entries[kind] for kind in sorted(entries)], "broken": broken}
    if not fresh.get("lost"):
        user_cache.write(name, key, data)
    return _from_json(data)


def _unlike(found: Iterable[Plugin]) -> tuple[list[Plugin], dict[str, str]]:
    """The files whose names are their own; a name that two packages give is taken from neither."""
    by_kind: dict[str, list[Plugin]] = {}
    for plugin in found:
        by_kind.setdefault(plugin.kind, []).append(plugin)

    def giver(plugin: Plugin) -> str:
        return str(packages.package_of(plugin.module) or "effc")

    clashes = {
        kind: f"{' and '.join(sorted(map(giver, several), key=lambda who: who != 'effc'))} both give it"
        for kind, several in by_kind.items()
        if len(several) > 1
    }
    return [several[0] for several in by_kind.values() if len(several) == 1], clashes


def _digests(found: Sequence[Plugin]) -> dict[str, str]:
    """The hash of everything each file depends on; that of its error where a file does not even parse."""
    from effc.runtime.closure import fingerprint

    digests: dict[str, str] = {}
    for plugin in found:
        try:
            digests[plugin.module] = fingerprint([plugin.module])
        except (SyntaxError, ModuleNotFoundError) as problem:
            digests[plugin.module] = f"broken: {problem}"
    return digests


def _stamps() -> dict[str, list[int]]:
    """Module name -> size and time of change of its file; equal stamps, equal file. Packages count too."""
    found: dict[str, list[int]] = {}
    todo = [(f"effc.{floor}", _ROOT / floor) for floor in _READ]
    todo += [(p.module, Path(p.folder)) for p in packages.packages() if p.folder is not None]
    while todo:
        name, folder = todo.pop()
        with os.scandir(folder) as inside:
            for item in inside:
                if item.is_dir() and not item.name.startswith((".", "__")):
                    todo.append((f"{name}.{item.name}", Path(item.path)))
                elif item.name.endswith(".py"):
                    stat = item.stat()
                    module = name if item.name == "__init__.py" else f"{name}.{item.name[:-3]}"
                    found[module] = [stat.st_size, stat.st_mtime_ns]
    found |= {f"{p.name} = {p} {p.problem}": [0, 0] for p in packages.packages()}
    return dict(sorted(found.items()))


def _in_child(stale: Sequence[Plugin], digests: Mapping[str, str]) -> dict[str, Any]:
    """Describe in another process: imports of torch and errors at import stay outside this one."""
    command = [sys.executable, "-m", "effc.runtime.catalogue", "--describe"]
    asked = json.dumps({"plugins": stale, "digests": digests, "path": sys.path})
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(done.stdout.rpartition("\n")[2])
        return answer
    except ValueError:
        reason = done.stderr.strip().rpartition("\n")[2] or f"the reader ended with status {done.returncode}"
        return {"entries": [], "broken": {plugin.kind: reason for plugin in stale}, "lost": True}


def _place(alone: bool = False) -> tuple[str, str]:
    """File name and key in the user's cache: one for each place where effc is installed, and for each set of
    packages beside it; `alone` is the one without any."""
    beside = () if alone else [(p.name, p.module, p.distribution, p.folder) for p in packages.packages()]
    what = f"{_ROOT}{sorted(map(str, beside)) if beside else ''}"
    where = hashlib.blake2b(what.encode(), digest_size=4).hexdigest()
    return f"catalogue-{where}.json", f"{_FORMAT}-py{sys.version_info[0]}.{sys.version_info[1]}"


def _from_json(data: Any) -> Described:
    found = {e["kind"]: Entry.from_json(e) for e in data["entries"]}
    return Described(found, data["broken"])


def main(words: Sequence[str]) -> int:
    if words == ["--describe"]:
        asked = json.load(sys.stdin)
        sys.path[:] = asked["path"]
        packages.forget()
        print("\n" + json.dumps(describe([Plugin(*p) for p in asked["plugins"]], asked["digests"])), end="")
        return 0
    found = described()
    for kind, reason in sorted(found.broken.items()):
        print(f"effc: `{kind}` cannot be read: {reason}", file=sys.stderr)
    place = user_cache.folder() / _place()[0]
    print(f"effc: {len(found.entries)} entries in {place if Path(place).exists() else 'memory'}")
    return 1 if found.broken else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
