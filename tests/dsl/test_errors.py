"""Wrong recipes and the words that repair them: every file of tests/golden/errors beside its .err.

The first line of a recipe names the command that shows its problems. `pytest --update-golden` rewrites the
.err files; read the difference before committing it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from effc.runtime.catalogue import catalogue
from effc.runtime.cli import main
from effc.specs.codes import CODES

catalogue()  # what it says while it is read anew belongs to no recipe
GOLDEN = Path(__file__).parent.parent / "golden" / "errors"
RECIPES = sorted(
    p for p in GOLDEN.iterdir() if p.suffix in (".effc", ".yaml") and p.read_bytes().startswith(b"# effc ")
)


def verb(recipe: Path) -> str:
    """The command of the first line, without `effc`."""
    return recipe.read_bytes().partition(b"\n")[0].decode().split()[2]


def said(recipe: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command of the first line says about the recipe, on stderr; HERE is its folder."""
    first = recipe.read_bytes().partition(b"\n")[0].decode()
    program, verb, *rest = shlex.split(first.removeprefix("#"))
    assert program == "effc"
    main([verb, recipe.name, *rest])
    return capsys.readouterr().err.replace(str(GOLDEN), "HERE")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_words(
    recipe: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(GOLDEN)
    found = said(recipe, capsys)
    place = recipe.with_name(recipe.name + ".err") if recipe.suffix == ".yaml" else recipe.with_suffix(".err")
    if request.config.getoption("--update-golden"):
        place.write_text(found, encoding="utf-8")
    assert found == place.read_text(encoding="utf-8")
    assert found.startswith(("error[", "warning["))


def test_there_are_enough() -> None:
    assert len(RECIPES) >= 120
    assert sum(verb(p) == "plan" for p in RECIPES) >= 20


def test_no_file_is_left_over() -> None:
    known = {p.name for p in RECIPES}
    orphans = [p.name for p in GOLDEN.glob("*.err") if not {p.stem, f"{p.stem}.effc"} & known]
    assert orphans == []


def test_every_code_of_the_language_is_shown() -> None:
    """Codes of levels 0 to 2 each have a wrong recipe that earns them."""
    shown = "".join(p.read_text(encoding="utf-8") for p in GOLDEN.glob("*.err"))
    elsewhere = {"E109", "E114", "E212", "E233"}
    levels = [c for c in CODES if c < "E234" or c in ("E301", "E303", "E304") or c.startswith("W20")]
    assert [code for code in levels if f"[{code}]" not in shown and code not in elsewhere] == []
