"""Check C kernels: values, poisoned results, members in turns; bounds and arithmetic by sanitizers.

    python -m effc.kernels.cpu.check < jobs.json

A job is {"op": "quant_linear.cpu", "spec": {...}, "isa": "avx2", "text": null or text to check in place of
what is emitted}; the answers come in the order of the jobs, a line of JSON each. Every job is a process of
its own, because a kernel that fails may take its process with it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from effc.kernels.cpu.build import MORE_FLAGS
from effc.kernels.cpu.case import Case, Inside
from effc.kernels.cpu.entry import launch, team
from effc.kernels.cpu.isa import Isa
from effc.kernels.cpu.sanitize import sanitizing, unloaded
from effc.kernels.cpu.turns import turns
from effc.kernels.differs import differs
from effc.kernels.kernel import KernelSpec

SECONDS = 120
"""that one job may take; a kernel that waits for nobody takes longer"""


class Op(Protocol):
    """What a module has whose kernels are checked."""

    def parse(self, data: Mapping[str, Any]) -> KernelSpec: ...
    def emit(self, spec: KernelSpec) -> str: ...
    def cases(self, spec: KernelSpec) -> Iterator[Case]: ...


def run(
    jobs: Sequence[Mapping[str, Any]], sanitized: bool = False, seconds: float = 1200, flags: str = ""
) -> list[str]:
    """For each job the first thing that is wrong, in words; "" when nothing is.

    `flags` go to the compiler besides, such as `-DTILES_IN_C`: plain C in the place of matrix units.

    Raises:
        RuntimeError: there are no sanitizers, or the process fails; its last words.
    """
    more = sanitizing() if sanitized else {}
    if isinstance(more, str):
        raise RuntimeError(more)
    more = more | {MORE_FLAGS: f"{more.get(MORE_FLAGS, '')} {flags}"}
    done = subprocess.run(
        [sys.executable, "-m", "effc.kernels.cpu.check"], input=json.dumps(list(jobs)), capture_output=True,
        text=True, env={**os.environ, **more}, timeout=seconds, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-12:]))
    return [str(json.loads(line)) for line in done.stdout.splitlines()]


def wrong(op: Op, spec: KernelSpec, text: str | None, isa: Isa) -> str:
    """What is wrong with the kernel that `text` is, in words."""
    text = text or op.emit(spec)
    for case in op.cases(spec):
        first: dict[str, Tensor] | None = None
        for name, members, crew in _runs(isa):
            with ExitStack() as stack:
                found = _call(case, text, spec.op, isa, members, crew(stack))
            for result, due in case.due.items():
                if words := differs(found[result], due, case.tolerance):
                    return f"{case.label}, {name}: {result}{words}"
                if first is not None and not torch.equal(found[result], first[result]):
                    return f"{case.label}, {name}: {result} has other bits than by one member"
            first = first or found
    return ""


def _runs(isa: Isa) -> Iterator[tuple[str, int, Callable[[ExitStack], int]]]:
    """Ways to share the work: its name, members, and the team to be entered."""
    yield "one member", 1, lambda _: team(isa)
    yield "two in turns", 2, lambda stack: stack.enter_context(turns(isa))
    yield "two in turns backwards", 2, lambda stack: stack.enter_context(turns(isa, backwards=True))
    yield "three in turns", 3, lambda stack: stack.enter_context(turns(isa))
    yield "two members", 2, lambda _: team(isa)


def _call(case: Case, text: str, op: str, isa: Isa, members: int, crew: int) -> dict[str, Tensor]:
    """The results of one call, which were poisoned before."""
    tensors = {name: value.clone() for name, value in case.given.items() if isinstance(value, Tensor)}
    for name in (*case.due, *case.scratch):
        tensors[name].view(torch.uint8).fill_(0xFF)  # no number, or minus one
    values: list[Tensor | int | None] = []
    for name, value in case.given.items():
        if isinstance(value, Inside):
            whole = tensors[value.whole]
            values.append(whole.data_ptr() + value.at * whole.element_size())
        else:
            values.append(tensors[name] if isinstance(value, Tensor) else value)
    launch(text, op, isa, members, *values, crew=crew)
    return {name: tensors[name] for name in case.due}


_REPORT = re.compile(r"(ERROR: AddressSanitizer: [^\n(]*|runtime error: [^\n]*)")


def isolated(work: Callable[[], str]) -> str:
    """What `work` says in a process of its own; the sanitizer's or the system's words where it dies."""
    sys.stdout.flush()
    read, write = os.pipe()
    with tempfile.TemporaryFile() as spoken:
        child = os.fork()
        if child == 0:
            os.dup2(spoken.fileno(), 2)
            signal.alarm(SECONDS)
            try:
                answer = work()
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(write, answer.encode()[:60000])
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            words = pipe.read().decode()
        _, status = os.waitpid(child, 0)
        spoken.seek(0)
        said = spoken.read().decode(errors="replace")
    if found := _REPORT.search(said):
        return found.group(1).strip()
    if status:
        return f"the process ended with {os.waitstatus_to_exitcode(status)}: {said[-300:]}"
    return words


def main() -> int:
    unloaded()
    torch.set_num_threads(1)
    for job in json.load(sys.stdin):
        op = cast(Op, importlib.import_module(f"effc.kernels.{job['op']}"))
        spec, isa = op.parse(job["spec"]), Isa(job["isa"])
        print(json.dumps(isolated(partial(wrong, op, spec, job.get("text"), isa))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
