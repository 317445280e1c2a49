"""The quickstart at full size, killed thirty times: it always ends with the bytes of a run never killed."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from blake3 import blake3

from effc.runtime.store import Store
from tests.claims import Measured

RECIPE = Path(__file__).parents[2] / "specs" / "recipes" / "quickstart.effc"
COMMAND = (sys.executable, "-m", "effc", "compile", str(RECIPE), "--store", "store", "--json")
EXPORTED = ("small.effc/model.safetensors", "small.effc/model.json", "thin-hf/model.safetensors")
TRAINING, LAYERS, EXPORTS = "heal", "small", ("hf of heal", "artifact of small")
KILLS = 30
SHARES = {TRAINING: 0.9, LAYERS: 0.7, **dict.fromkeys(EXPORTS, 0.25)}
"""Phase -> how often a run that comes to it is killed in it, else one in two; every run exports again."""
DEPTH = {TRAINING: 0.3}
"""Phase -> the share of its usual time within which a kill comes, else all of it: a long one gets several."""


@dataclass
class Run:
    """One process and what it is at: the stage or export that began last."""

    folder: Path
    phase: str = "beginning"
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> how long it took, for those that were finished."""
    steps: dict[str, int] = field(default_factory=dict)
    """Phase -> units done when the process ended."""

    def to_the_end(self, dice: random.Random | None = None, usual: Mapping[str, float] | None = None) -> bool:
        """Whether the run ended by itself; with `dice` it is killed at some moment of some phase."""
        timer: threading.Timer | None = None
        begun = time.monotonic()
        said: list[str] = []
        with subprocess.Popen(
            COMMAND, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if not line.startswith("{"):
                    said.append(line)
                    continue
                event = json.loads(line)
                if event["event"] == "start":
                    self.phase, begun = event["name"], time.monotonic()
                    if dice and usual and timer is None and dice.random() < SHARES.get(self.phase, 0.5):
                        moment = dice.uniform(0, DEPTH.get(self.phase, 1.0) * usual.get(self.phase, 1.0))
                        timer = threading.Timer(moment, process.kill)
                        timer.start()
                elif event["event"] == "progress":
                    self.steps[event["name"]] = event["done"]
                elif event["event"] in ("done", "export") and event["name"] == self.phase:
                    self.seconds[self.phase] = time.monotonic() - begun
                    self.phase = f"behind {self.phase}"
            code = process.wait()
        if timer is not None:
            timer.cancel()
        assert code in (0, -9), "".join(said)
        return code == 0


def ends(folder: Path) -> dict[str, str]:
    """Fingerprint of every stage, and the hashes of the exported models."""
    records = Store(folder / "store").records()
    found = {record["about"]["stage"]: record["fingerprint"] for _, record in records}
    return found | {name: blake3((folder / "out" / name).read_bytes()).hexdigest() for name in EXPORTED}


def fresh(folder: Path) -> None:
    for name in ("store", "out"):
        shutil.rmtree(folder / name, ignore_errors=True)


@pytest.mark.claim
def test_the_quickstart_killed_thirty_times_ends_with_the_same_bytes(
    tmp_path: Path, measured: Measured
) -> None:
    """A run is killed, taken up from the store it left, killed again, until it ends; then anew."""
    first = Run(tmp_path)
    assert first.to_the_end()
    whole, usual = ends(tmp_path), first.seconds
    assert {TRAINING, LAYERS, *EXPORTS} <= usual.keys()
    dice, moments, ended = random.Random(30), [], 0
    fresh(tmp_path)
    while True:
        run = Run(tmp_path)
        if run.to_the_end(dice if len(moments) < KILLS else None, usual):
            ended += 1
            assert ends(tmp_path) == whole, f"after kills at {moments}"
            if len(moments) >= KILLS:
                break
            fresh(tmp_path)
        else:
            moments.append((run.phase, run.steps.get(run.phase, 0)))
            print(f"killed in {run.phase}, {moments[-1][1]} units done", file=sys.stderr)
    hit = Counter(phase for phase, _ in moments)
    assert len({units for phase, units in moments if phase == TRAINING}) >= 5, "at different steps"
    assert len({units for phase, units in moments if phase == LAYERS}) >= 2, "behind different layers"
    assert sum(hit[export] for export in EXPORTS) >= 3, hit
    measured("resume", "kills of the quickstart, all resumed to equal bytes", len(moments), above=KILLS - 1)
    measured("resume", "runs that ended between them", ended, above=0)
