"""Packages installed beside effc that bring methods of their own, found without importing anything.

    [project.entry-points."effc.methods"]
    acme = "acme_effc"            # acme_effc/fold/gain.py is the method fold.gain

The value names a package; as inside effc, the path below it is the name of the method.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

GROUP = "effc.methods"


@dataclass(frozen=True, slots=True)
class Package:
    """What one line of the entry point group names."""

    name: str
    """Left of the equals sign; only for people."""
    module: str
    distribution: str
    """As it is installed, e.g. acme_effc-1.0."""
    folder: str | None
    """Where its families lie; None when it cannot be found."""
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.module} ({self.distribution})"


@dataclass(frozen=True, slots=True)
class Foreign:
    """One file of such a package that is named as a method is."""

    kind: str
    module: str
    package: Package


@cache
def packages() -> tuple[Package, ...]:
    """Every package of the group, in the order of the import path; the first of two like ones counts."""
    found: dict[str, Package] = {}
    for distribution, name, value in _lines():
        module = value.partition("[")[0].strip()
        if module not in found:
            found[module] = _package(name, module, distribution)
    return tuple(found.values())


@cache
def methods() -> tuple[Foreign, ...]:
    """Every method file of every package, those included whose names collide."""
    return tuple(one for package in packages() for one in _files(package))


def package_of(module: str) -> Package | None:
    """The registered package that a module lies in."""
    return next((p for p in packages() if module == p.module or module.startswith(f"{p.module}.")), None)


def kind_of(module: str) -> str | None:
    """The name of the method that a module of a registered package holds; None for shared code."""
    return next((one.kind for one in methods() if one.module == module), None)


def forget() -> None:
    """Look anew, after the import path has changed."""
    packages.cache_clear()
    methods.cache_clear()


def _package(name: str, module: str, distribution: str) -> Package:
    if not module or not all(word.isidentifier() for word in module.split(".")):
        problem = f'`{module}` is no package; write {name} = "package", without a colon'
        return Package(name, module, distribution, None, problem)
    folder = _folder(module)
    if folder is None:
        return Package(name, module, distribution, None, f"the package `{module}` is not there")
    if module.partition(".")[0] == "effc":
        return Package(name, module, distribution, None, "a package of another name than effc is due")
    return Package(name, module, distribution, folder)


def _folder(module: str) -> str | None:
    """The folder of a package. Parents of a dotted name are found by path, so that none is imported."""
    first, *rest = module.split(".")
    try:
        spec = find_spec(first)
        for word in rest:
            if spec is None:
                return None
            spec = PathFinder.find_spec(f"{spec.name}.{word}", spec.submodule_search_locations)
    except (ImportError, ValueError):
        return None
    places = spec.submodule_search_locations if spec else None
    return next((place for place in places if os.path.isdir(place)), None) if places else None


def _files(package: Package) -> Iterator[Foreign]:
    """family/method.py below a package; names with an underscore in front are shared code."""
    if package.folder is None:
        return
    for family in sorted(Path(package.folder).iterdir()):
        if not family.is_dir() or not family.name.isidentifier() or family.name.startswith("_"):
            continue
        for file in sorted(family.glob("*.py")):
            if file.stem.isidentifier() and not file.stem.startswith("_"):
                kind = f"{family.name}.{file.stem}"
                yield Foreign(kind, f"{package.module}.{kind}", package)


def _lines() -> Iterator[tuple[str, str, str]]:
    """(distribution, name, value) of the group. Read by hand, as importing importlib.metadata takes tens of
    milliseconds, more than checking a recipe does."""
    for place in dict.fromkeys(sys.path):
        try:
            with os.scandir(place or ".") as inside:
                infos = sorted(i.path for i in inside if i.name.endswith((".dist-info", ".egg-info")))
        except OSError:
            continue
        for info in infos:
            try:
                text = Path(info, "entry_points.txt").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            distribution = Path(info).name.rpartition(".")[0]
            for name, value in _section(text):
                yield distribution, name, value


def _section(text: str) -> Iterator[tuple[str, str]]:
    here = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            here = line == f"[{GROUP}]"
        elif here and line and line[0] not in "#;" and "=" in line:
            name, _, value = line.partition("=")
            yield name.strip(), value.strip()
