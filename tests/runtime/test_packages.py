"""Methods of other packages: found by entry point, checked, planned, run and cached as effc's own are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from effc import passes
from effc.dsl.read import read
from effc.runtime import catalogue as catalogues
from effc.runtime import closure, pages
from effc.runtime.cli import main
from effc.specs import plugins, user_cache
from effc.specs.diagnostic import EffcError
from effc.specs.source import Source
from effc.testing import check_method

METHOD = '''"""Halve what one matrix gives and double what the next makes of it."""
from effc import EXACT, Ruled, rule
from effc.compiler.contract import Contract, Fact
from effc.specs.paper import FOLKLORE
from pydantic import Field

from {package}._shared import FACTOR


@rule("balance", "m: mlp")
def balance(rw, hit):
    for name, by in (("up", FACTOR), ("down", 1 / FACTOR)):
        path = f"{{hit['m']}}.{{name}}"
        rw.derive(path, "weight", lambda w, by=by: w * by, rw.value(path, "weight"))


class Balance(Ruled):
    """Scale W_up by 2 and W_down by 1/2, which cancel.

    Use when: a test needs an exact edit.
    Costs:    nothing.
    """

    paper = FOLKLORE
    contract = Contract(EXACT, keeps=(Fact("tied"),))
    examples = ("{family}.{name}()", "{family}.{name}(times = 2)")
    rules = (balance,)

    times: int = Field(default=1, ge=1, le=9, description="how often")
'''
RECIPE = """\
effc 1

recipe foreign "A method of another package"

model base = load("zoo:pylm")

even = {kind}(base)

expect even.bytes <= base.bytes

export even as artifact("out/even.effc")
"""

Make = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Puts packages on the import path, each with a dist-info, as pip would."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    kept = user_cache.folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if kept.is_dir():  # what is known of effc's own methods need not be read again
        shutil.copytree(kept, user_cache.folder(), ignore=shutil.ignore_patterns("*.so", ".*"))
    monkeypatch.chdir(tmp_path)

    def package(name: str = "acme", kind: str = "fold.balance", text: str | None = None) -> Path:
        family, _, method = kind.partition(".")
        folder = site / name
        (folder / family).mkdir(parents=True)
        (folder / "__init__.py").write_text('"""Methods."""\n')
        (folder / "_shared.py").write_text("FACTOR = 2.0\n")
        source = METHOD if text is None else text
        made = folder / family / f"{method}.py"
        made.write_text(source.format(package=name, family=family, name=method))
        register(site, name, name)
        forget()
        return made

    yield package
    for name in [n for n in sys.modules if n.partition(".")[0] in ("acme", "other")]:
        del sys.modules[name]
    monkeypatch.undo()
    forget()


def register(site: Path, name: str, value: str) -> None:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[console_scripts]\nx = y:z\n\n[effc.methods]\n# ours\n{name} = {value}\n"
    )


def forget() -> None:
    """As a new process would begin."""
    plugins.forget()
    passes.resolve.cache_clear()
    catalogues.described.cache_clear()
    catalogues.catalogue.cache_clear()


def recipe(kind: str = "fold.balance") -> str:
    Path("foreign.effc").write_text(RECIPE.format(kind=kind))
    return "foreign.effc"


def errors(text: str) -> str:
    with pytest.raises(EffcError) as caught:
        read(Source("r", text), catalogues.catalogue(), ())
    return str(caught.value)


def test_a_recipe_uses_it_from_check_to_artifact(install: Make, capsys: pytest.CaptureFixture[str]) -> None:
    shared = install().parent.parent / "_shared.py"
    path = recipe()
    assert main(["check", path]) == 0
    assert "fold.balance" not in sys.modules
    assert main(["plan", path, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert [s["method"] for s in planned["stages"]] == ["load", "fold.balance"]
    assert main(["compile", path, "--tiny", "--json"]) == 0
    ran = json.loads(capsys.readouterr().out)
    stage = ran["stages"][1]
    assert (stage["method"], stage["cached"]) == ("fold.balance", False)
    assert stage["contract"]["held"]
    assert stage["contract"]["error_float64"] <= 1e-9
    assert main(["compile", path, "--tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][1]["cached"]
    shared.write_text("FACTOR = 2.0  # a comment changes nothing\n")
    assert main(["compile", path, "--tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][1]["cached"]
    before = closure.fingerprint(["acme.fold.balance"])
    shared.write_text("FACTOR = 4.0\n")
    assert closure.fingerprint(["acme.fold.balance"]) != before


def test_it_is_listed_documented_and_completed_as_others_are(
    install: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    assert main(["methods", "--json"]) == 0
    (one,) = [m for m in json.loads(capsys.readouterr().out) if m["name"] == "fold.balance"]
    assert one["package"] == "acme (acme-1.0)"
    assert one["contract"]["fidelity"] == "EXACT"
    assert one["parameters"][0]["range"] == ">= 1 and <= 9"
    assert main(["methods", "fold.balance"]) == 0
    assert "package: acme (acme-1.0)" in capsys.readouterr().out
    assert main(["schema", "fold.balance"]) == 0
    assert '"maximum": 9' in capsys.readouterr().out
    folder = tmp_path / "docs"
    assert [p.name for p in pages.write(folder, "acme")] == ["README.md", "fold.balance.md"]
    assert "**Use when:** a test needs" in (folder / "fold.balance.md").read_text()
    assert "fold.balance" not in pages.table()
    head = 'effc 1\nrecipe r "r"\nmodel base = load("zoo:pylm")\n'
    assert "did you mean `fold.balance`?" in errors(head + "x = fold.balanec(base)")
    assert "must be at least 1 and at most 9, not 0" in errors(head + "x = fold.balance(base, times = 0)")
    assert "has no argument `tims`" in errors(head + "x = fold.balance(base, tims = 1)")


def test_it_keeps_the_common_contract(install: Make) -> None:
    install()
    cls = passes.resolve("fold.balance")
    assert (cls.kind, cls.__module__) == ("fold.balance", "acme.fold.balance")
    done = check_method(cls)
    assert "keeps_its_contract: fold.balance()" in done
    assert len(done) == 4 + 2 * 11


OWN_BLOCK = '''"""Put a linear of its own kind in place of every down projection."""
from effc import EXACT, Ruled, rule
from effc.compiler.blocks import Linear
from effc.compiler.contract import Contract, Fact
from effc.specs.paper import FOLKLORE


class {name}_Twin(Linear):
    """The same linear by another name."""


@rule("twin", "m: mlp")
def twin(rw, hit):
    path = f"{{hit['m']}}.down"
    old = rw.module(path)
    new = {name}_Twin(**{{k: v for k, v in old.spec().items() if k != "type"}})
    new.weight, new.bias = old.weight, old.bias
    rw.swap(path, new)


class Twins(Ruled):
    """Swap the down projections for twins.

    Use when: a test needs a block of its own.
    Costs:    nothing.
    """

    paper = FOLKLORE
    contract = Contract(EXACT, keeps=(Fact("tied"),))
    examples = ("{family}.{name}()",)
    rules = (twin,)
'''


def test_a_block_of_its_own_is_saved_and_found_again(
    install: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(kind="fold.twins", text=OWN_BLOCK)
    monkeypatch.setenv("PYTHONPATH", str(Path("site").resolve()))
    path = recipe("fold.twins")
    assert main(["compile", path, "--tiny"]) == 0, capsys.readouterr().err
    check_method(passes.resolve("fold.twins"))
    place = next(Path(".").rglob("even.effc"))
    code = f"import effc; m = effc.load({str(place)!r}); print(type(m.module('layers.0.mlp.down')).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "twins_Twin"


def test_a_block_may_not_have_the_name_of_another(install: Make) -> None:
    install(text=OWN_BLOCK.replace("{name}_Twin", "QuantLinear"))
    with pytest.raises(EffcError, match=r"has the name of a block of effc; a saved model names blocks"):
        passes.resolve("fold.balance")
    from effc.compiler.blocks.unit import REGISTRY

    assert REGISTRY["QuantLinear"].__module__ == "effc.compiler.blocks.quant_linear"


def test_a_name_of_effcs_own_is_given_to_nobody(install: Make, capsys: pytest.CaptureFixture[str]) -> None:
    install(kind="quantize.rtn")
    path = recipe("quantize.rtn")
    assert main(["check", path]) == 1
    said = capsys.readouterr().err
    assert "error[E235]: `quantize.rtn` cannot be used" in said
    assert "effc and acme (acme-1.0) both give it" in said
    assert "quantize.rtn" not in passes.kinds()
    with pytest.raises(EffcError, match=r"effc and acme \(acme-1\.0\) both give it"):
        passes.resolve("quantize.rtn")
    assert main(["methods"]) == 0
    assert "broken: effc and acme (acme-1.0) both give it" in capsys.readouterr().out


def test_two_packages_with_one_name_are_both_named(install: Make) -> None:
    install("acme")
    install("other")
    head = 'effc 1\nrecipe r "r"\nmodel base = load("zoo:pylm")\n'
    assert "acme (acme-1.0) and other (other-1.0) both give it" in errors(head + "x = fold.balance(base)")


def test_a_file_that_does_not_import_matters_only_where_it_is_used(
    install: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    install(text='"""Needs what is not there."""\nimport surely_not_installed\n')
    Path("plain.effc").write_text(RECIPE.format(kind="quantize.rtn"))
    assert main(["check", "plain.effc"]) == 0
    assert main(["check", recipe()]) == 1
    said = capsys.readouterr().err
    assert "error[E235]: `fold.balance` cannot be used" in said
    assert "No module named 'surely_not_installed'" in said
    assert main(["methods", "--json"]) == 0
    (one,) = [m for m in json.loads(capsys.readouterr().out) if m["name"] == "fold.balance"]
    assert "surely_not_installed" in one["broken"]
    assert main(["explain", "fold.balance"]) == 1
    with pytest.raises(EffcError, match="does not import: ModuleNotFoundError"):
        passes.resolve("fold.balance")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nowhere_at_all", "the package `nowhere_at_all` is not there"),
        ("acme.module:Class", '`acme.module:Class` is no package; write acme = "package"'),
        ("effc.passes", "a package of another name than effc is due"),
    ],
)
def test_a_line_that_names_no_package_is_shown_as_broken(
    value: str, words: str, install: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    register(tmp_path / "site", "acme", value)
    forget()
    assert main(["methods"]) == 0
    assert words in capsys.readouterr().out


def test_finding_packages_imports_neither_them_nor_torch(install: Make) -> None:
    install()
    code = (
        f"import sys; sys.path.insert(0, {str(Path('site').resolve())!r}); "
        "from effc.specs import plugins; from effc.runtime.closure import closure; "
        "assert [m.kind for m in plugins.methods()] == ['fold.balance'], plugins.methods(); "
        "found = closure(['acme.fold.balance']); "
        "assert {'acme', 'acme._shared', 'effc.compiler.rule'} <= set(found), found; "
        "assert not {'torch', 'acme', 'importlib.metadata'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
