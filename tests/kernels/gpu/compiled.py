"""Compile kernels for Hopper, once for each text, and hold what they take against tests/golden/kernels/.

A result is kept in the user's cache under the text of the kernel, the version of Triton and the code that
reads machine code, so that a second run compiles only what changed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effc.kernels.gpu import check
from effc.kernels.kernel import KernelSpec
from effc.specs import user_cache

AT_ONCE = 2
"""Specs that one process compiles before their results are kept."""
GOLDEN = Path(__file__).parents[2] / "golden" / "kernels"


def compiled(op: str, specs: Sequence[KernelSpec], version: str, path: str = "", kept: bool = False) -> Any:
    """label -> what each kernel of each launch takes, with the Triton of `version`, found first in `path`.

    With `kept`, results of earlier runs are used, and those of this run kept.
    """
    module = importlib.import_module(f"effc.kernels.{op}")
    jobs = [{"op": op, "spec": spec.model_dump(mode="json"), "text": module.emit(spec)} for spec in specs]
    keys = [_key(job, version) for job in jobs]
    names = [f"compiled-{op}-{spec.key}-{version}.json" for spec in specs]
    found = [user_cache.read(name, key) if kept else None for name, key in zip(names, keys, strict=True)]
    missing = [i for i, one in enumerate(found) if one is None]
    for todo in (missing[i : i + AT_ONCE] for i in range(0, len(missing), AT_ONCE)):
        for i, answer in zip(todo, check.run("compile", [jobs[i] for i in todo], path), strict=True):
            assert {one["triton"] for one in answer} == {version}
            if kept:
                user_cache.write(names[i], keys[i], answer)
            found[i] = answer
    return {
        f"{title(spec)} {one['label']} {one['name']}": one
        for spec, answer in zip(specs, found, strict=True)
        for one in answer or ()
    }


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


def _key(job: Any, version: str) -> str:
    folder = Path(check.__file__).parent
    code = "".join((folder / f"{name}.py").read_text() for name in ("check", "hopper", "resources"))
    return hashlib.sha256("\0".join((json.dumps(job), version, code)).encode()).hexdigest()[:32]
