"""Ctrl-C in a terminal: `effc compile` ends within two seconds, exits 130 and says how to go on.

Seconds are those that the process works, so that others on the machine do not count.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .workplace import Workplace

EFFC = "import sys; from effc.runtime.cli import main; sys.exit(main())"
TINY = ("compile", "t.effc", "--store", "store", "--tiny")
LONG = ("compile", "t.effc", "--store", "store", "-p", "steps=2000")


def interrupted(argv: tuple[str, ...], folder: Path, due: str, pause: float) -> tuple[int, float, str]:
    """Exit code, seconds of work from Ctrl-C to the end, and what was said; Ctrl-C comes `pause` seconds
    after `due`.

    As from a terminal, the signal goes to the whole group: to processes that effc started, too.
    """
    command = [sys.executable, "-c", EFFC, *argv]
    with subprocess.Popen(
        command,
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith(due):
                break
        else:
            raise AssertionError(f"never said {due!r}: {said}")
        time.sleep(pause)
        before = worked(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        said += process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, used.ru_utime + used.ru_stime - before, said


def worked(pid: int) -> float:
    """Seconds that a process and those it waited for have used the processor."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in after_name[11:15]) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("argv", "line", "pause"),
    [(TINY, "base: done", 0.0), (LONG, "heal: distill", 0.0), (LONG, "heal: distill", 0.7)],
)
def test_an_interrupt_ends_a_compile_soon(
    argv: tuple[str, ...], line: str, pause: float, tmp_path: Path
) -> None:
    Workplace(tmp_path).write()
    code, seconds, said = interrupted(argv, tmp_path, line, pause)
    assert code == 130, said
    assert seconds < 2
    assert said.endswith("effc: interrupted; the same command goes on from the last finished unit\n")
    assert "Traceback" not in said
