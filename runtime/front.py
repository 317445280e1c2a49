"""The front door of the Python API: parse, plan, compile, load, with defaults that suit a first try."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from effc.dsl.read import Checked, read_file
from effc.runtime.catalogue import catalogue
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.recipe import Recipe

if TYPE_CHECKING:
    from effc.compiler.model import Model
    from effc.compiler.plan import Plan
    from effc.runtime.compiled import Compiled
    from effc.runtime.progress import Observer
    from effc.specs.target import Target

RECIPE_INSIDE = "recipe.effc"
"""Name of the recipe in an artefact's folder."""


def parse(where: str | Path, params: Sequence[str] = ()) -> Recipe:
    """A checked recipe (levels 0 to 2) from text, its YAML twin, or an artefact that holds one.

    `params` are settings as the command line takes them, one value each: ["steps=50"].

    Raises:
        EffcError: everything that is wrong, at once.
    """
    found = checked(where, params)
    if len(found) > 1:
        title = f"the settings make {len(found)} recipes, where one is due"
        raise EffcError(Diagnostic("E233", title, help="give one value to each param"))
    return found[0].recipe


def checked(where: str | Path, params: Sequence[str] = ()) -> list[Checked]:
    """One checked recipe for each combination of settings."""
    path = Path(where)
    if path.is_dir():
        path = path / RECIPE_INSIDE
    return read_file(path, catalogue(), params)


def plan(
    recipe: Recipe,
    store: str | Path = ".effc",
    target: Target | None = None,
    device: str | None = None,
    tiny: bool = False,
    weights: bool = False,
) -> Plan:
    """What every stage will cost (levels 3 and 4); reads configurations and headers, no weight.

    A folder with config.json alone can be planned, unless `weights` says that a run follows.

    Raises:
        EffcError: what a stage or export cannot take, files that cannot be read, what does not fit.
    """
    from effc.compiler.plan import plan as planned
    from effc.runtime.machine import this_machine
    from effc.runtime.sources import Files
    from effc.runtime.tiny import shrink

    recipe = shrink(recipe, Path(store)) if tiny else recipe
    machine = target or this_machine(device or "cpu")
    files = Files(recipe, Path(store), tiny, weights)
    made = planned(recipe, files, machine)
    return replace(made, warnings=(*files.notices, *made.warnings))


def compile(
    recipe: Recipe,
    store: str | Path = ".effc",
    device: str | None = None,
    tiny: bool = False,
    observers: Sequence[Observer] = (),
) -> Compiled:
    """Run a recipe, or go on with it; results that exist are taken from the store.

    Raises:
        EffcError: what a stage, a file or the disk refuses.
        KeyboardInterrupt: on Ctrl-C; the same call goes on from the last finished unit.
    """
    from effc.runtime.run import compile as run

    return run(recipe, Path(store), device=device or "cpu", observers=observers, tiny=tiny)


def load(where: str | Path) -> Model:
    """A model with its weights: an artefact, a Hugging Face folder, or zoo:NAME.

    Raises:
        EffcError: E41x to E43x for files that are missing, damaged or of an unknown architecture.
    """
    import effc.runtime.generate  # noqa: F401  hands generation to Model
    from effc.runtime.load import load as opened

    return opened(str(where)).materialize()
