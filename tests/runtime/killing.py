"""Kill runs at chosen moments. One process imports everything, then forks a child for each run.

A child counts the moments that matter: every sync, rename and link on the disk, every event of the run. It
kills itself with SIGKILL at the one it is told: no handler runs, nothing is flushed. To be quick, exports
are verified in the same process, and trainings save behind every step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

SERVER = r"""
import json, os, signal, sys, traceback
import jinja2, torch, torch._dynamo  # optimizers import the last when they are made
import effc.runtime.fit, effc.runtime.calibrate, effc.runtime.run
import effc.runtime.training_state as state
from effc.runtime import cli, cli_build, progress, report
from effc.runtime.catalogue import catalogue
from effc.runtime.closure import fingerprint
from effc.runtime.consumer import Answer
from effc.runtime.exports import artifact
from effc.runtime.load import load
from effc.specs import user_cache
torch.set_num_threads(1)
cache = str(user_cache.folder())
state._EVERY, state._SHARE = 0.0, 1e9

def ask(kind, place, ids):
    with torch.no_grad():
        return Answer(load(place).materialize()(ids).float(), torch.empty(0), "the same process")

artifact.ask = ask
catalogue()
fingerprint(["effc.runtime.fit", "effc.runtime.calibrate", "effc.passes.quantize.gptq"], docstrings=False)

def armed(kill_at, counted):
    count = 0
    def moment():
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if counted:
            with open(counted, "w") as file:
                file.write(str(count))
    def before(name):
        real = getattr(os, name)
        def call(*args, **kwargs):
            if not str(args[0]).startswith(cache):  # compiled kernels outlive the run that makes them
                moment()
            return real(*args, **kwargs)
        setattr(os, name, call)
    for name in ("fsync", "replace", "link"):
        before(name)
    quiet = progress.observer
    def observer(*args, **kwargs):
        show = quiet(*args, **kwargs)
        def see(event):
            moment()
            show(event)
        return see
    progress.observer = observer

def child(job):
    out = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.chdir(job["folder"])
    armed(job["kill_at"], job["count"])
    code = cli.main(job["argv"])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    pids = []
    for job in json.loads(line):
        pid = os.fork()
        if pid == 0:
            try:
                child(job)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)
"""


class Killer:
    """Runs `effc` in forked children of a warm process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log.txt"

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def run(self, *argv: str, kill_at: int = 0) -> int:
        """The exit code of one run; -9 when it was killed."""
        return self._start([self._job(argv, kill_at)])[0]

    def together(self, *runs: Sequence[str]) -> list[int]:
        """Exit codes of runs side by side."""
        return self._start([self._job(argv, 0) for argv in runs])

    def moments(self, *argv: str) -> int:
        """How many moments a whole run has."""
        count = self.folder / "count.txt"
        job = self._job(argv, 0) | {"count": str(count)}
        assert self._start([job]) == [0], self.log.read_text()
        return int(count.read_text())

    def _job(self, argv: Sequence[str], kill_at: int) -> dict[str, object]:
        places = {"folder": str(self.folder), "log": str(self.log)}
        return {"argv": list(argv), "kill_at": kill_at, "count": "", **places}

    def _start(self, jobs: list[dict[str, object]]) -> list[int]:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(jobs) + "\n")
        self._server.stdin.flush()
        codes: list[int] = json.loads(self._read())
        return codes

    def _read(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline().strip()
        assert line, "the server ended"
        return line
