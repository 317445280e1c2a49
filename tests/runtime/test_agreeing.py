"""Arguments that contradict each other are told by `effc check`, at the arguments, without torch in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from effc.runtime import agreeing
from effc.runtime.catalogue import catalogue
from effc.runtime.cli import main
from effc.specs.recipe import Call, Ref


def recipe(folder: Path, *stages: str) -> Path:
    lines = ["effc 1", 'model base = load("zoo:pylm")', 'data code = corpus("python-stdlib")', *stages]
    lines += [f'export {stages[-1].partition(" ")[0]} as artifact("out/x.effc")'] if stages else []
    path = folder / "r.effc"
    path.write_text("\n".join(lines) + "\n")
    return path


WRONG = {
    "an argument of the other router": ("tie.mor(base, router = token, alpha = 0.2)", "alpha has no say"),
    "of the router that is the default": ("tie.mor(base, balance = bias)", "balance has no say"),
    "capacities that rise": ("tie.mor(base, recursions = 2, capacity = [50%, 100%])", "must fall"),
    "capacities of fewer loops": ("tie.mor(base, capacity = [100%])", "1 shares for 3 recursions"),
    "keys that are not there": (
        "tie.mor(base, recursions = 2, capacity = [90%, 50%], kv = share_first)",
        "first capacity must be 100%",
    ),
    "more experts than there are": ("moe.upcycle(base, experts = 2, top_k = 4)", "there are 2 experts"),
    "no middle": ("linearize.vig(base, dwconv = 4)", "has no middle"),
    "in a part": (
        "adapt.full(base, data = code, steps = 2, optimizer = sgd(momentum = 0, nesterov = true))",
        "needs momentum above 0",
    ),
    "in a part of a part's place": (
        "distill.logits(base, teacher = base, data = code, steps = 2, schedule = wsd(form = exp))",
        "`final` above 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_checking_tells_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    call, words = WRONG[name]
    assert main(["check", str(recipe(tmp_path, f"one = {call}"))]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "error[E325]" in said or "error[E202]" in said
    assert "r.effc:4:" in said, "it stands where it was written"


def test_all_problems_are_told_at_once_and_answers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stages = "one = tie.mor(base, balance = bias)", "two = moe.upcycle(one, experts = 2, top_k = 4)"
    path = recipe(tmp_path, *stages, "three = moe.upcycle(base, experts = 4, top_k = 2)")
    assert main(["check", str(path)]) == 1
    first = capsys.readouterr().err
    assert "balance has no say" in first
    assert "there are 2 experts" in first
    monkeypatch.setattr(agreeing, "_ask", lambda questions: pytest.fail("it was asked before"))
    assert main(["check", str(path)]) == 1
    assert capsys.readouterr().err == first


def test_a_child_answers_where_torch_is_not_there(tmp_path: Path) -> None:
    catalogue()
    code = (
        "import sys; from effc.runtime.cli import main; code = main(['check', sys.argv[1]]);"
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    path = recipe(tmp_path, f"one = tie.mor(base, router = token, alpha = 0.{os.getpid()}1)")  # asked anew
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "alpha has no say with router = token" in done.stderr


def test_calls_survive_the_way_to_the_child() -> None:
    inner = Call("train.optimizer.sgd", {"momentum": 0.0, "nesterov": True})
    slope = Call("depth", {"first": 1.0, "last": 4.0})
    call = Call(
        "x.y",
        {
            "a": (1, 2.5, "w"),
            "b": {"on": "mlp", "bits": 8},
            "c": Ref("code", "train"),
            "d": inner,
            "e": slope,
        },
    )
    assert agreeing.read(agreeing.written(call)) == call


def test_a_child_that_breaks_off_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreeing, "_torch_is_here", lambda: False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert agreeing._ask([{"role": "method", "call": {}}]) == []
