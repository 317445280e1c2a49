"""`effc verify`: is an artefact or export what was written, and does it measure what was measured?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from effc.compiler.checkpoint import read_folder
from effc.compiler.cost import count
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.runtime import artifact
from effc.runtime.consumer import ask
from effc.runtime.exports._mark import MARK, changed, get
from effc.runtime.exports.hf import Hf
from effc.runtime.kernel_texts import differences
from effc.runtime.load import load
from effc.specs.diagnostic import Diagnostic, EffcError

LOSS_TOLERANCE = 5e-3
"""Relative difference of a loss that another machine's arithmetic may make."""

_SAME = "a fresh process computes the same"


def verify(folder: Path, deep: bool = False) -> dict[str, Any]:
    """Check files by hash, structure against weights, size against the lock; `deep` also measures the losses
    again and loads the folder in a fresh process.

    Returns {"artefact", "holds", "checks": [{"what", "holds", "detail"}]}.

    Raises:
        EffcError: when the folder is neither an artefact nor an export at all (E44x).
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        help = "give the folder of an artefact or of another export"
        raise EffcError(Diagnostic("E441", f"`{folder}` {what}", help=help))
    if not artifact.is_artifact(folder) and (folder / MARK).is_file():
        checks = [*_exported(folder, deep)]
        return {"artefact": str(folder), "holds": all(c["holds"] for c in checks), "checks": checks}
    checks = [_check("files are those of the manifest", *_files(folder))]
    if checks[0]["holds"]:
        model = artifact.read(folder)
        told = artifact.story(folder)
        locked = _locked(told.lock)
        checks.append(_check("structure and weights fit", True, f"{len(model.tensors())} tensors"))
        checks += [*_sizes(model, locked), *_kernels(model, told)]
        if deep:
            model.materialize()
            checks += [*_losses(model, told, locked), _consumed(folder, model)]
    return {"artefact": str(folder), "holds": all(c["holds"] is not False for c in checks), "checks": checks}


def verify_text(record: Mapping[str, Any]) -> str:
    """A line for each check."""
    words = {True: "holds", False: "FAILS", None: "-"}
    lines = [f"{words[c['holds']]:<7}{c['what']}: {c['detail']}" for c in record["checks"]]
    what = "artefact" if artifact.is_artifact(Path(record["artefact"])) else "export"
    end = f"the {what} is what it says" if record["holds"] else f"the {what} is NOT what it says"
    return "\n".join([*lines, end])


def _files(folder: Path) -> tuple[bool, str]:
    changed = artifact.check(folder)
    if changed:
        return False, "; ".join(d.title for d in changed)
    return True, f"{len(artifact.manifest(folder))} files"


def _exported(folder: Path, deep: bool) -> Iterator[dict[str, Any]]:
    """The checks of a folder in the format of another tool."""
    mark = get(folder)
    kind, odd = str(mark.get("export")), changed(folder, mark)
    table = mark.get("files", {})
    yield _check(
        "files are those of the export", bool(table) and not odd, ", ".join(odd) or f"{len(table)} files"
    )
    if odd or not table:
        return
    try:
        weights = read_folder(folder)
        yield _check("headers and index of the weights", True, f"{len(weights)} tensors")
        if kind == "hf":
            fitting = load(folder)
            yield _check("config and weights fit", True, f"{len(fitting.tensors())} tensors")
            if deep:
                verdict = Hf(path=str(folder)).verify(folder, fitting)
                yield _check(_SAME, True, f"{verdict.consumer}, error {verdict.error:.1e}")
        elif deep and kind == "compressed_tensors":
            answer = ask("compressed_tensors", folder, torch.arange(16).view(1, 16))
            finite = bool(answer.logits.isfinite().all())
            yield _check("a fresh process runs it", finite, f"{answer.version}, logits are finite")
    except EffcError as problem:
        yield _check("it can be loaded", False, problem.diagnostics[0].title)


def _locked(lock: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the lock says about the exported model."""
    name = lock.get("model")
    stages = lock.get("stages")
    found = (
        [s for s in stages if isinstance(s, dict) and s.get("name") == name]
        if isinstance(stages, list)
        else []
    )
    return found[0] if found else {}


def _sizes(model: Model, locked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cost = count(model, ATTENDED)
    for key, value in (("params", cost.params), ("bytes", cost.bytes)):
        told = locked.get(key)
        detail = f"{value}" if told in (None, value) else f"{value}, the lock says {told}"
        yield _check(key, None if told is None else told == value, detail)


def _kernels(model: Model, told: artifact.Story) -> Iterator[dict[str, Any]]:
    """Whether what is kept for reading is what runs. It never runs itself, so no difference is a failure."""
    if told.kernels or told.lock.get("kernels"):
        odd = differences(told.kernels, told.lock.get("kernels"), model)
        files = ", ".join(f"kernels/{name}" for name in told.kernels) or "no file, as there is no C program"
        yield _check("kernels are those that run here", None if odd else True, "; ".join(odd) or files)


def _losses(model: Model, told: artifact.Story, locked: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Losses on the data of the recipe, as far as it can be opened here."""
    losses = locked.get("loss") or {}
    if not losses or told.recipe is None or told.lock.get("tiny"):
        return
    from effc.compiler.around import REPORTED
    from effc.dsl.read import read
    from effc.runtime.bind import spec_of
    from effc.runtime.catalogue import catalogue
    from effc.runtime.evaluate import loss
    from effc.specs.source import Source

    plain = told.lock.get("names") or {}
    for name, before in losses.items():
        what = f"loss({name})"
        try:
            recipe = read(Source("recipe.effc", told.recipe), catalogue(), ()).recipe
            data = spec_of("data", recipe.stage(plain.get(name, name)).call).open(
                dict(model.tokenizer.files) if model.tokenizer else {}
            )
        except (EffcError, KeyError) as problem:
            yield _check(what, None, f"its data cannot be opened here: {problem}".partition("\n")[0])
            continue
        length = data.batch("heldout", [0]).ids.shape[1]
        now = loss(model, data, "heldout", max(1, REPORTED // length))
        same = math.isclose(now, before, rel_tol=LOSS_TOLERANCE)
        yield _check(
            what, same, f"{now:.5f}, then {before:.5f}; {LOSS_TOLERANCE:.1%} may differ between machines"
        )


def _consumed(folder: Path, model: Model) -> dict[str, Any]:
    from effc.runtime.exports.artifact import Artifact

    try:
        verdict = Artifact(path=str(folder)).verify(folder, model)
    except EffcError as problem:
        return _check(_SAME, False, problem.diagnostics[0].title)
    detail = f"{verdict.consumer}, error {verdict.error:.1e}"
    return _check(_SAME, True, detail)


def _check(what: str, holds: bool | None, detail: str) -> dict[str, Any]:
    return {"what": what, "holds": holds, "detail": detail}
