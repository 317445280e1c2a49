"""Compare what an export wrote with what it was to write, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from effc.compiler.checkpoint import TensorRef, read_folder, read_header, read_json
from effc.compiler.model import Model
from effc.compiler.weights import LazyTensor
from effc.specs.diagnostic import Diagnostic, EffcError

_SAID_OTHERWISE = {"dtype", "torch_dtype", "_name_or_path"}
"""Keys of a config that its tensors say better, or that say nothing about them."""


def same_config(path: Path, due: Mapping[str, Any]) -> None:
    """Raises EffcError E414 for a file that is no JSON, E552 when it says something else."""
    found = read_json(path)
    if found != dict(due):
        keys = sorted(k for k in {*found, *due} if found.get(k) != due.get(k))
        _refuse(path, f"`{keys[0]}` of {path.name} is {found.get(keys[0])!r}, not {due.get(keys[0])!r}")


def same_layout(folder: Path, due: Mapping[str, LazyTensor]) -> dict[str, TensorRef]:
    """Compare headers, and the index where there is one, with the names, shapes and dtypes that are due.

    `folder` is one in the layout of Hugging Face, or a single file. Returns where each tensor lies.

    Raises:
        EffcError: E414 to E418 for files that cannot be read, E552 when they hold other tensors.
    """
    found = read_folder(folder) if folder.is_dir() else read_header(folder)
    odd = sorted(found.keys() ^ due.keys())
    if odd:
        _refuse(folder, f"`{odd[0]}` is {'not due' if odd[0] in found else 'missing'}")
    for name, lazy in due.items():
        ref = found[name]
        if (ref.shape, ref.dtype) != (lazy.shape, lazy.dtype):
            was, now = (f"{list(t.shape)} {t.dtype}" for t in (lazy, ref))
            _refuse(folder, f"`{name}` is {now}, not {was}")
    return found


def same_form(source: Model, config: Mapping[str, Any], due: Mapping[str, LazyTensor]) -> Path | None:
    """The folder of a loaded model, where it has this config and tensors of these names, shapes, dtypes."""
    folders = {lazy.stored.file.parent for lazy in source.weights.values() if lazy.stored is not None}
    if len(folders) != 1 or not (path := next(iter(folders)) / "config.json").is_file():
        return None
    before = read_json(path)
    if any(before.get(key) != config.get(key) for key in {*before, *config} - _SAID_OTHERWISE):
        return None
    found = {name: (ref.shape, ref.dtype) for name, ref in read_folder(path.parent).items()}
    return path.parent if found == {name: (t.shape, t.dtype) for name, t in due.items()} else None


def same_tensors(folder: Path, due: Mapping[str, LazyTensor]) -> None:
    """The same, and every number. Raises EffcError as `same_layout` does."""
    for name, ref in same_layout(folder, due).items():
        if not torch.equal(ref.read().view(-1).view(torch.uint8), _bytes(due[name])):
            _refuse(folder, f"`{name}` holds other numbers than the model")


def _bytes(lazy: LazyTensor) -> torch.Tensor:
    return lazy.read().detach().contiguous().view(-1).view(torch.uint8)


def _refuse(place: Path, why: str) -> None:
    raise EffcError(
        Diagnostic(
            "E552",
            f"what was written to {place.name} is not the model",
            notes=(why,),
            help="nothing was published; run it again, and look after the disk if it happens twice",
        )
    )
