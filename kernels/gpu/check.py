"""Check Triton kernels on a machine without a GPU: values, bounds, races, and what compiles for Hopper.

    python -m effc.kernels.gpu.check interpret < jobs.json
    python -m effc.kernels.gpu.check compile < jobs.json

A job is {"op": "quant_linear.gpu", "spec": {...}, "text": null or text to check in place of what is emitted,
"entry": absent, or the one function whose cases are interpreted}; jobs come as a list on a line, and the
answer is a list in their order. One process interprets or compiles, never both.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, Literal, Protocol, cast

import torch
from torch import Tensor

from effc.kernels.differs import differs
from effc.kernels.gpu.load import load
from effc.kernels.kernel import KernelSpec

Mode = Literal["interpret", "compile"]


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a kernel's module, and what it is to give."""

    label: str
    given: Mapping[str, Any]
    """Arguments, the results left out."""
    due: Callable[[], Mapping[str, Tensor]]
    """Results by the name of their argument, in higher precision."""
    tolerance: float
    """of the largest magnitude that is due, for results in float32"""
    weights: int = 0
    """Weights that one turn of the loop takes; 0 when instructions are not counted by weight."""
    entry: str = "launch"
    """Function of the module that is called."""


class Op(Protocol):
    """What a module has whose kernels are checked."""

    def parse(self, data: Mapping[str, Any]) -> KernelSpec: ...
    def emit(self, spec: KernelSpec) -> str: ...
    def cases(self, spec: KernelSpec) -> Iterator[Case]: ...
    def launches(self, spec: KernelSpec) -> Iterator[Case]: ...


def run(
    mode: Mode, jobs: Sequence[Mapping[str, Any]], path: str = "", seconds: float = 1200, lane: int = 0
) -> list[Any]:
    """The answers of a process of its own; `path` goes before the installed packages (another Triton).

    The process stays for the next jobs of its kind and lane, because torch and Triton take seconds to start.
    Each lane has one, so that threads that ask in lanes of their own do not wait for each other.

    Raises:
        RuntimeError: the process fails; its last words.
        TimeoutError: it gives no answer in time.
    """
    return _worker(mode, path, lane).answers(jobs, seconds)


class _Worker:
    """A process that reads jobs, a list on a line, and writes answers, a list on a line."""

    def __init__(self, mode: Mode, path: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = self.folder.name
        if mode == "interpret":
            environment["TRITON_INTERPRET"] = "1"
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, (path, environment.get("PYTHONPATH", "")))
            )
        self.words = Path(self.folder.name) / "stderr"
        with self.words.open("w") as words:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "effc.kernels.gpu.check", mode],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, env=environment,
            )  # fmt: skip
        self.readable = selectors.DefaultSelector()
        self.readable.register(cast(IO[bytes], self.process.stdout), selectors.EVENT_READ)
        atexit.register(self.end)

    def answers(self, jobs: Sequence[Mapping[str, Any]], seconds: float) -> list[Any]:
        to, back = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        try:
            to.write(json.dumps(list(jobs)).encode() + b"\n")
            to.flush()
            if not self.readable.select(seconds):
                raise TimeoutError(f"no answer in {seconds} seconds")
            line = back.readline()
            if not line:
                raise BrokenPipeError
            return cast(list[Any], json.loads(line))
        except BrokenPipeError:
            self.process.wait()
            words = self.words.read_text()
            self.end()
            raise RuntimeError("\n".join(words.splitlines()[-12:])) from None
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Stop the process; another one starts when there are jobs again."""
        _worker.cache_clear()
        atexit.unregister(self.end)
        self.process.kill()
        self.process.wait()
        self.readable.close()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                cast(IO[bytes], pipe).close()
        self.folder.cleanup()


@cache
def _worker(mode: Mode, path: str, lane: int) -> _Worker:
    return _Worker(mode, path)


def interpret(op: Op, spec: KernelSpec, text: str | None, entry: str | None = None) -> str:
    """The first thing that is wrong with a kernel, in words; "" when nothing is.

    Raises:
        ValueError: no case calls `entry`.
    """
    from effc.kernels.gpu.interpret import trusted

    module = load(text or op.emit(spec))
    called = False
    with trusted():
        for at, case in enumerate(op.cases(spec)):
            if entry is not None and case.entry != entry:
                continue
            called = True
            due = case.due()
            # Once as it is used, and in float32 too, where rounding hides nothing.
            for kind in (torch.bfloat16, torch.float32)[at > 0 :]:
                results = {name: torch.full(y.shape, torch.nan, dtype=kind) for name, y in due.items()}
                try:
                    getattr(module, case.entry)(**case.given, **results)
                except Exception as error:
                    return f"{case.label}: {_cause(error)}"
                tolerance = case.tolerance if kind is torch.float32 else 2**-8
                for name, y in due.items():
                    if words := differs(results[name], y, tolerance):
                        return f"{case.label}: {name}{words}"
    if not called:
        raise ValueError(f"no case of {op} calls `{entry}`")
    return ""


def compile(op: Op, spec: KernelSpec, text: str | None) -> list[dict[str, Any]]:
    """What every kernel of every launch takes, and what no kernel may do (`wrong`)."""
    from effc.kernels.gpu.hopper import compiled, version
    from effc.kernels.gpu.resources import resources

    module = load(text or op.emit(spec))
    found = []
    for case in op.launches(spec):
        results = {name: torch.empty(y.shape, dtype=torch.bfloat16) for name, y in case.due().items()}
        for kernel in compiled(partial(getattr(module, case.entry), **case.given, **results)):
            takes = resources(kernel)
            each = round(takes.each(case.weights), 2) if case.weights and takes.loop_products else None
            found.append(
                {
                    "label": case.label,
                    "triton": version(),
                    **takes.data(),
                    "each": each,
                    "together": takes.together(),
                    "wrong": takes.wrong(),
                }
            )
    return found


def _cause(error: BaseException) -> str:
    """The error behind the interpreter's own."""
    inner = error.__cause__ or error
    return f"{type(inner).__name__}: {inner}"


def main(mode: str) -> int:
    # Memory that `launch` takes for itself holds NaN until it is written.
    torch.use_deterministic_algorithms(True)
    filling: Any = torch.utils.deterministic
    filling.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    answers_to, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for line in sys.stdin:
        answers: list[Any] = []
        for job in json.loads(line):
            op = cast(Op, importlib.import_module(f"effc.kernels.{job['op']}"))
            spec = op.parse(job["spec"])
            given = op, spec, job.get("text")
            answers.append(interpret(*given, job.get("entry")) if mode == "interpret" else compile(*given))
        print(json.dumps(answers), file=answers_to, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
