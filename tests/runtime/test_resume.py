"""Kill a run at any moment: the same command goes on and ends with the bytes of one never killed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from effc.runtime.store import Store

from .killing import Killer
from .workplace import RECIPE, Workplace

TEXT = RECIPE + 'export small as artifact("out/small.effc")\n'
COMMAND = ("compile", "t.effc", "--store", "store")
WEIGHTS = ("model.safetensors", "model.json")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    monkeypatch.chdir(tmp_path)
    place = Workplace(tmp_path)
    place.write(TEXT)
    return place


@pytest.fixture
def killer(work: Workplace) -> Iterator[Killer]:
    with Killer(work.folder) as ready:
        yield ready


def ends(folder: Path) -> dict[str, str]:
    """Fingerprint of every stage, and the hashes of the exported model."""
    found = {
        record["about"]["stage"]: record["fingerprint"] for _, record in Store(folder / "store").records()
    }
    for name in WEIGHTS:
        found[name] = blake3((folder / "out" / "small.effc" / name).read_bytes()).hexdigest()
    return found


def fresh(folder: Path) -> None:
    """Forget all that was made."""
    for name in ("store", "out"):
        shutil.rmtree(folder / name, ignore_errors=True)


def killed_and_resumed(killer: Killer, moment: int, whole: dict[str, str]) -> None:
    fresh(killer.folder)
    code = killer.run(*COMMAND, kill_at=moment)
    assert code == -9, killer.log.read_text()[-2000:]
    assert killer.run(*COMMAND) == 0, f"after moment {moment}: {killer.log.read_text()[-2000:]}"
    assert ends(killer.folder) == whole, f"killed at moment {moment}"
    left = [p.name for p in (killer.folder / "out").iterdir() if p.name.startswith(".")]
    assert left == [], "what a killed export left is removed by the next one"


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(work: Workplace, killer: Killer) -> None:
    total = killer.moments(*COMMAND)
    whole = ends(work.folder)
    assert set(whole) == {"thin", "heal", "small", "side", *WEIGHTS}
    draw = random.Random(20)
    for part in range(5):  # one moment in each fifth of the run: loading, training, layers, export, rest
        killed_and_resumed(killer, draw.randint(part * total // 5 + 1, (part + 1) * total // 5), whole)


@pytest.mark.claim
def test_a_run_killed_at_thirty_moments_goes_on_to_the_same_bytes(work: Workplace, killer: Killer) -> None:
    total = killer.moments(*COMMAND)
    whole = ends(work.folder)
    for moment in random.Random(30).sample(range(1, total + 1), 30):
        killed_and_resumed(killer, moment, whole)


def test_runs_in_two_stores_and_one_killed_export_the_same_bytes(work: Workplace, killer: Killer) -> None:
    def exported() -> dict[str, bytes]:
        return {name: (work.folder / "out" / "small.effc" / name).read_bytes() for name in WEIGHTS}

    total = killer.moments(*COMMAND)
    whole, first = ends(work.folder), exported()
    (work.folder / "store").rename(work.folder / "elsewhere")
    shutil.rmtree(work.folder / "out")
    assert killer.run(*COMMAND) == 0, killer.log.read_text()[-2000:]
    assert exported() == first
    killed_and_resumed(killer, total // 2, whole)
    assert exported() == first


def test_a_run_killed_again_and_again_still_ends(work: Workplace, killer: Killer) -> None:
    killer.moments(*COMMAND)
    whole = ends(work.folder)
    fresh(work.folder)
    codes = [-9]
    while codes[-1] == -9 and len(codes) < 60:
        codes.append(killer.run(*COMMAND, kill_at=70))
    assert codes[-1] == 0, "every try gets further than the one before"
    assert len(codes) > 3
    assert ends(work.folder) == whole


def test_two_runs_on_one_store_share_the_work(work: Workplace, killer: Killer) -> None:
    killer.moments(*COMMAND)
    whole = ends(work.folder)
    fresh(work.folder)
    killer.log.unlink()
    assert killer.together(COMMAND, COMMAND) == [0, 0]
    assert ends(work.folder) == whole
    told = killer.log.read_text()
    assert told.count("taken from the store") == 4, told
    assert told.count("heal: distill.logits") == 1, told
