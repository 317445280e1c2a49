"""Ctrl-C in a terminal: `effc compile` ends within two seconds, exits 130 and says how to go on."""

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
    """Exit code, seconds from Ctrl-C to the end, and what was said; Ctrl-C comes `pause` seconds after `due`.

    As from a terminal, the signal goes to the whole group: to processes that effc started, too.
    """
    command = [sys.executable, "-c", EFFC, *argv]
    with subprocess.Popen(
        command,
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
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
        start = time.perf_counter()
        os.killpg(process.pid, signal.SIGINT)
        said += process.stderr.read()
        code = process.wait(60)
        return code, time.perf_counter() - start, said


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
