"""Open models: a Hugging Face folder, `zoo:NAME`, `hf:org/name` from the local cache, an artefact."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch

from effc.compiler.importer import import_folder
from effc.compiler.model import Model
from effc.compiler.placed import placed
from effc.runtime.artifact import is_artifact, read
from effc.runtime.bind import spec_of
from effc.runtime.models._source import ModelSource
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.recipe import Call

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")


def open_model(call: Call, models: Mapping[str, Model], tiny: bool = False, planned: bool = False) -> Model:
    """The model that `load(...)`, `new(...)` or `adapter(...)` means; weights stay where they are.

    `tiny`: a small random copy in its place. `planned`: the structure is enough, weights may be missing.

    Raises:
        EffcError: those of the source; they point at the call where they have no place of their own.
    """
    source: ModelSource = spec_of("model", call)
    try:
        return source.outline(models, tiny) if planned else source.open(models, tiny)
    except EffcError as error:
        found = (replace(d, about=d.about or "path") for d in error.diagnostics)
        raise EffcError(*(placed(d, call) for d in found)) from error


def load(
    where: str | Path, dtype: str | None = None, revision: str | None = None, weights: bool = True
) -> Model:
    """A model by folder, `zoo:NAME` or `hf:org/name`; its weights are read when needed.

    `weights = False`: a folder that holds config.json alone will do (see `import_folder`).

    Raises:
        EffcError: E441 when there is no such folder, E442 when the local cache lacks the model, and those of
            reading it (`import_folder`).
    """
    text = str(where)
    wanted = DTYPES[dtype] if dtype else None
    if text.startswith("zoo:"):
        return import_folder(_zoo(text.removeprefix("zoo:")), wanted)
    if text.startswith("hf:"):
        folder, root = _cached(text.removeprefix("hf:"), revision or "main")
        return import_folder(folder, wanted, root, weights)
    folder = Path(text)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        help = "give a folder with config.json and safetensors, an artefact, `zoo:NAME` or `hf:org/name`"
        raise EffcError(Diagnostic("E441", f"`{text[:200]}` {what}, and a model is a folder", help=help))
    if is_artifact(folder):
        return read(folder)
    return import_folder(folder, wanted, None, weights)


def zoo() -> list[str]:
    """The models shipped with effc."""
    found = files("effc.specs.zoo").iterdir()
    return sorted(p.name for p in found if p.joinpath("config.json").is_file())


def _zoo(name: str) -> Path:
    if name not in zoo():
        help = f"it has {', '.join(f'zoo:{n}' for n in zoo())}"
        raise EffcError(Diagnostic("E441", f"the zoo has no model `{name[:60]}`", help=help))
    return Path(str(files("effc.specs.zoo").joinpath(name)))


def _cached(name: str, revision: str) -> tuple[Path, Path]:
    """The snapshot folder of a model in the local Hugging Face cache, and the folder its links lead into."""
    org, _, short = name.partition("/")
    if not (_NAME.match(org) and _NAME.match(short) and _NAME.match(revision)):
        help = "write hf:org/name, and revision = a branch, a tag or a commit"
        raise EffcError(Diagnostic("E442", f"`hf:{name[:120]}` names no model", help=help))
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    root = cache / f"models--{org}--{short}"
    reference = root / "refs" / revision
    commit = revision
    if reference.is_file():
        with reference.open("rb") as file:
            commit = file.read(100).decode(errors="replace").strip()
    folder = root / "snapshots" / commit
    if not _NAME.match(commit) or not folder.is_dir():
        command = f"hf download {name} --revision {revision}"
        raise EffcError(
            Diagnostic(
                "E442",
                f"`{name}` at `{revision}` is not in the local cache, and effc never downloads",
                notes=(f"looked in {folder}",),
                help=f"run: {command}",
            )
        )
    return folder, root
