"""Safetensors files and indexes that lie: each is refused with a code, soon, before anything is allocated."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import save_file

from effc.runtime.load import load
from tests.trust.hostile import Spoil, entry, raw, refused, sound, tensors

INDEX = "model.safetensors.index.json"


def _sparse(folder: Path) -> None:
    """A header of 2 GB that takes no room on disk."""
    raw(folder, b"{", length=2 << 30)
    os.truncate(folder / "model.safetensors", (2 << 30) + 8)


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)


def _grown(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 64)


def _endless(folder: Path) -> None:
    raw(folder, b"{" + b'"t":{},' * 6_000_000 + b'"u":{}}')


def _crowded(folder: Path) -> None:
    raw(folder, "{" + ",".join(f'"t{i}":{{}}' for i in range(400_000)) + "}")


def _twins(folder: Path) -> None:
    one = json.dumps(entry([1], [0, 4]))
    raw(
        folder,
        "{" + ",".join([f'"a{i}": {one}' for i in range(50_000)] + [f'"a49999": {one}']) + "}",
        b"\0" * 4,
    )


HEADERS: dict[str, Spoil] = {
    "empty file": lambda f: (f / "model.safetensors").write_bytes(b"") and None,
    "seven bytes": lambda f: (f / "model.safetensors").write_bytes(b"\1" * 7) and None,
    "length 2^64 - 1": lambda f: raw(f, b"{}", length=2**64 - 1),
    "length 2^63": lambda f: raw(f, b"{}", length=2**63),
    "length beyond the file": lambda f: raw(f, b"{}", length=1000),
    "length 0": lambda f: raw(f, b"{}", length=0),
    "header of 2 GB": _sparse,
    "not JSON": lambda f: raw(f, b"{'a': 1}"),
    "not UTF-8": lambda f: raw(f, b'{"\xff\xfe": 1}'),
    "a list": lambda f: raw(f, b"[1, 2, 3]"),
    "nested 100,000 deep": lambda f: raw(f, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "an endless number": lambda f: raw(f, '{"a": ' + "9" * 100_000 + "}"),
    "NaN": lambda f: raw(f, b'{"a": NaN}'),
    "a name twice": lambda f: raw(f, '{"a": 1, "a": 1}'),
    "a name twice among 50,000": _twins,
    "400,000 empty entries": _crowded,
    "48 MB of entries": _endless,
    "no offsets": lambda f: raw(f, {"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "negative offset": lambda f: raw(f, {"a": entry([1], [-4, 0])}, b"\0" * 4),
    "offsets reversed": lambda f: raw(f, {"a": entry([1], [4, 0])}, b"\0" * 4),
    "three offsets": lambda f: raw(f, {"a": entry([1], [0, 2, 4])}, b"\0" * 4),
    "offsets beyond the file": lambda f: raw(f, {"a": entry([100], [0, 400])}, b"\0" * 4),
    "offsets of 2^62": lambda f: raw(f, {"a": entry([2**60], [0, 2**62])}, b"\0" * 4),
    "fractional offsets": lambda f: raw(f, {"a": entry([1], [0.0, 4.0])}, b"\0" * 4),
    "negative size": lambda f: raw(f, {"a": entry([-1, -1], [0, 4])}, b"\0" * 4),
    "boolean size": lambda f: raw(f, {"a": entry([True], [0, 4])}, b"\0" * 4),
    "sizes that overflow": lambda f: raw(f, {"a": entry([2**40, 2**40, 4], [0, 4])}, b"\0" * 4),
    "shape and bytes differ": lambda f: raw(f, {"a": entry([2], [0, 4])}, b"\0" * 4),
    "a hundred dimensions": lambda f: raw(f, {"a": entry([1] * 100, [0, 4])}, b"\0" * 4),
    "unknown dtype": lambda f: raw(f, {"a": entry([1], [0, 4], "F33")}, b"\0" * 4),
    "a dtype that is a list": lambda f: raw(f, {"a": entry([1], [0, 4], ["F32"])}, b"\0" * 4),
    "overlap": lambda f: raw(f, {"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, b"\0" * 12),
    "the same bytes twice": lambda f: raw(f, {"a": entry([2], [0, 8]), "b": entry([2], [0, 8])}, b"\0" * 8),
    "a gap": lambda f: raw(f, {"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, b"\0" * 12),
    "cut short": _truncated,
    "bytes behind the end": _grown,
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    folder = sound(tmp_path / "model")
    HEADERS[case](folder)
    with refused("E414", "E415"):
        load(folder)


def _indexed(folder: Path, table: object) -> None:
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def _doubled(folder: Path) -> None:
    _indexed(
        folder,
        dict.fromkeys(tensors(), "model-00001-of-00001.safetensors") | {"lm_head.weight": "b.safetensors"},
    )
    save_file({"lm_head.weight": tensors()["lm_head.weight"]}, folder / "b.safetensors")


def _linked(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    os.rename(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)


def _linked_shard(folder: Path) -> None:
    _indexed(folder, dict.fromkeys(tensors(), "s.safetensors"))
    outside = folder.parent / "outside.safetensors"
    os.rename(folder / "model-00001-of-00001.safetensors", outside)
    (folder / "s.safetensors").symlink_to(outside)


def _looped(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def _pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def _device(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/dev/zero")


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")


INDEXES: dict[str, Spoil] = {
    "shard above the folder": lambda f: _indexed(f, {"a": "../outside.safetensors"}),
    "shard by absolute path": lambda f: _indexed(f, {"a": "/etc/passwd"}),
    "shard in a folder": lambda f: _indexed(f, {"a": "x/../../y.safetensors"}),
    "shard with a NUL": lambda f: _indexed(f, {"a": "a\0.safetensors"}),
    "shard that is a pickle": lambda f: _indexed(f, {"a": "pytorch_model.bin"}),
    "shard that is a number": lambda f: _indexed(f, {"a": 7}),
    "shard that is missing": lambda f: _indexed(f, {"a": "gone.safetensors"}),
    "tensor in no shard": lambda f: _indexed(f, {"ghost": "model-00001-of-00001.safetensors"}),
    "tensor in two shards": _doubled,
    "a list": lambda f: _indexed(f, ["model-00001-of-00001.safetensors"]),
    "no shards": lambda f: _indexed(f, {}),
    "link out of the folder": _linked,
    "shard linked out of the folder": _linked_shard,
    "link to itself": _looped,
    "a pipe": _pipe,
    "a folder": _folder,
    "an endless device": _device,
    "a pickle alone": _pickled,
}


@pytest.mark.parametrize("case", INDEXES)
def test_files_that_are_not_what_they_should_be_are_refused(case: str, tmp_path: Path) -> None:
    folder = sound(tmp_path / "model")
    INDEXES[case](folder)
    with refused("E415", "E416", "E417", "E418"):
        load(folder)


def test_the_sound_folder_loads(tmp_path: Path) -> None:
    assert not load(sound(tmp_path / "model")).materialize().is_meta


def test_a_file_cut_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    folder = sound(tmp_path / "model")
    model = load(folder)
    os.truncate(folder / "model.safetensors", 2000)
    with refused("E415"):
        model.materialize()
