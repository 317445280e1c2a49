"""Compile kernels for Hopper, once for each text, and hold what they take against tests/golden/kernels/.

A result is kept in the user's cache under the text of the kernel, the version of Triton and the code that
launches it and reads machine code, so that a second run compiles only what changed. What the interpreter
says is kept under the text, the version and all code of the floors that cases are made of.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from effc.kernels.gpu import check
from effc.kernels.kernel import KernelSpec
from effc.specs import user_cache

LANES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
"""Processes that work at once where results are kept."""
GOLDEN = Path(__file__).parents[2] / "golden" / "kernels"


def compiled(op: str, specs: Sequence[KernelSpec], version: str, path: str = "", kept: bool = False) -> Any:
    """label -> what each kernel of each launch takes, with the Triton of `version`, found first in `path`.

    With `kept`, results of earlier runs are used, and those of this run kept.
    """
    module = importlib.import_module(f"effc.kernels.{op}")
    jobs = [{"op": op, "spec": spec.model_dump(mode="json"), "text": module.emit(spec)} for spec in specs]
    launches = Path(str(module.__file__)).read_text()
    keys = [_key(job, version, launches) for job in jobs]
    names = [f"compiled-{op}-{spec.key}-{version}.json" for spec in specs]
    found = _asked("compile", jobs, names, keys, path) if kept else check.run("compile", jobs, path)
    assert {one["triton"] for answer in found for one in answer} <= {version}
    return {
        f"{title(spec)} {one['label']} {one['name']}": one
        for spec, answer in zip(specs, found, strict=True)
        for one in answer
    }


def interpreted(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `check.run("interpret", jobs)` says of each job; of those that were asked before, what it said."""
    version = importlib.metadata.version("triton")
    keys = [_digest(json.dumps(job), version, _floors()) for job in jobs]
    names = [f"interpreted-{job['op']}-{key}.json" for job, key in zip(jobs, keys, strict=True)]
    return [str(one) for one in _asked("interpret", jobs, names, keys)]


def _asked(
    mode: check.Mode,
    jobs: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    keys: Sequence[str],
    path: str = "",
) -> list[Any]:
    """What was kept of each job, or its answer now, which is kept; lanes take jobs as they are free."""
    found = [user_cache.read(name, key) for name, key in zip(names, keys, strict=True)]
    missing = iter([i for i, one in enumerate(found) if one is None])

    def work(lane: int) -> None:
        for i in missing:
            found[i] = check.run(mode, [jobs[i]], path, lane=lane)[0]
            user_cache.write(names[i], keys[i], found[i])

    with ThreadPoolExecutor(LANES) as pool:
        for done in [pool.submit(work, lane) for lane in range(LANES)]:
            done.result()
    return found


@cache
def _floors() -> str:
    """All code of kernels and of the floors below."""
    root = Path(__file__).parents[3]
    floors = (root / floor for floor in ("specs", "compiler", "kernels"))
    return _digest(*(path.read_text() for floor in floors for path in sorted(floor.rglob("*.py"))))


def title(spec: KernelSpec) -> str:
    """The fields that are not what they are by default, those of tiles left out."""
    words = [
        f"{name}={value}" for name, value in spec.model_dump(mode="json", exclude_defaults=True).items()
        if name != "tiles"
    ]  # fmt: skip
    return " ".join(words).replace("'", "")


def golden(op: str, version: str) -> dict[str, Any]:
    """label -> the golden numbers of a version; none when there are none yet."""
    place = GOLDEN / f"{op}.json"
    whole: dict[str, Any] = json.loads(place.read_text()) if place.is_file() else {}
    return dict(whole.get(version, {}))


def differences(op: str, version: str, found: Any, update: bool) -> list[str]:
    """How kernels differ from the golden numbers; with `update` these become the golden numbers."""
    fields = ("registers", "shared", "loop", "each")
    now = {label: {name: one[name] for name in fields} for label, one in found.items()}
    if update:
        place = GOLDEN / f"{op}.json"
        whole = json.loads(place.read_text()) if place.is_file() else {}
        whole[version] = golden(op, version) | now
        place.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    due = golden(op, version)
    return [f"{label}: {one}, not {due.get(label)}" for label, one in now.items() if due.get(label) != one]


def _key(job: Any, version: str, launches: str) -> str:
    folder = Path(check.__file__).parent
    code = "".join((folder / f"{name}.py").read_text() for name in ("hopper", "resources"))
    return _digest(json.dumps(job), version, launches, code, inspect.getsource(check.compile))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]
