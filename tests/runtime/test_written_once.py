"""A result that only exports use is on disk once; no edit of the export makes a wrong result of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effc.compiler import checkpoint_write
from effc.runtime.artifact import check
from effc.runtime.cache import ls, why_miss
from effc.runtime.consumer import Answer
from effc.runtime.exports import artifact
from effc.runtime.front import parse
from effc.runtime.load import load
from effc.specs.diagnostic import EffcError

from .workplace import RECIPE, Workplace

ARTIFACT = 'export small as artifact("out/small.effc")\n'
HF = 'export heal2 as hf("out/thin")\n'
STORED = "out/small.effc/model.safetensors"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """Artefacts are read again in this process, which is quicker."""

    def ask(kind: str, place: Path, ids: Tensor) -> Answer:
        with torch.no_grad():
            return Answer(load(place).materialize()(ids).float(), torch.empty(0), "the same process")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(artifact, "ask", ask)
    return Workplace(tmp_path)


def bundles(work: Workplace) -> list[Path]:
    return sorted(work.store.bundles.folder.glob("*"))


def same(first: Path, second: Path) -> bool:
    """One file under two names."""
    return os.path.samefile(first, second)


def test_store_and_artifact_share_the_bytes(work: Workplace) -> None:
    first = work.run(RECIPE + ARTIFACT)
    (bundle,) = bundles(work)
    assert same(bundle, work.folder / STORED)
    sizes = {row["stage"]: row["bytes"] for row in ls(work.store)}
    assert sizes["small"] >= bundle.stat().st_size, "what is shared counts once, and counts"
    second = work.run(RECIPE + ARTIFACT)
    assert work.names("start") == ["artifact of small"]
    assert second.stage("small").fingerprint == first.stage("small").fingerprint
    assert same(bundle, work.folder / STORED)
    assert check(work.folder / "out/small.effc") == []


def test_the_form_in_which_a_result_is_kept_is_no_part_of_its_content(work: Workplace) -> None:
    plain = work.run()
    assert bundles(work) == []
    shutil.rmtree(work.store.folder)
    bundled = work.run(RECIPE + ARTIFACT)
    assert [s.fingerprint for s in bundled.stages] == [s.fingerprint for s in plain.stages]


def test_a_hugging_face_folder_shares_them_too(work: Workplace) -> None:
    pytest.importorskip("transformers")
    work.run(RECIPE + "heal2 = adapt.full(thin, data = code, steps = 2, batch = 2)\n" + HF)
    (bundle,) = bundles(work)
    assert same(bundle, work.folder / "out/thin/model.safetensors")


def test_what_another_stage_takes_stays_in_objects_that_it_shares(work: Workplace) -> None:
    work.run(RECIPE + ARTIFACT.replace("small", "thin"))
    assert bundles(work) == []


def test_two_exports_of_one_model_share_one_file(work: Workplace) -> None:
    work.run(RECIPE + ARTIFACT + ARTIFACT.replace("out/", "more/"))
    (bundle,) = bundles(work)
    assert same(bundle, work.folder / STORED)
    assert same(bundle, work.folder / STORED.replace("out/", "more/"))


def test_a_removed_export_is_made_again_from_the_store(work: Workplace) -> None:
    work.run(RECIPE + ARTIFACT)
    shutil.rmtree(work.folder / "out")
    work.run(RECIPE + ARTIFACT)
    assert work.names("start") == ["artifact of small"]
    assert same(bundles(work)[0], work.folder / STORED)


@pytest.mark.parametrize("quietly", [False, True])
def test_an_export_edited_in_place_is_a_miss_and_no_wrong_hit(work: Workplace, quietly: bool) -> None:
    whole = work.run(RECIPE + ARTIFACT).stage("small").fingerprint
    edited = work.folder / STORED
    before = edited.stat()
    with edited.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    if quietly:  # as if nothing had happened: the hash tells when the file is read
        os.utime(edited, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(EffcError) as caught:
            work.run(RECIPE + ARTIFACT)
        assert caught.value.diagnostics[0].code == "E603"
    else:
        rows = {
            row["stage"]: row["hit"] for row in why_miss(parse(work.write(RECIPE + ARTIFACT)), work.store)
        }
        assert rows == {"thin": True, "heal": True, "small": False, "side": True}
    again = work.run(RECIPE + ARTIFACT)
    assert work.names("start") == ["small", "artifact of small"]
    assert again.stage("small").fingerprint == whole
    assert check(work.folder / "out/small.effc") == []
    assert same(bundles(work)[0], edited)


def test_an_export_replaced_by_another_leaves_the_result(work: Workplace) -> None:
    work.run(RECIPE + ARTIFACT)
    work.run(RECIPE + ARTIFACT, "steps=6")
    assert len(bundles(work)) == 2
    work.run(RECIPE + ARTIFACT)
    assert work.names("start") == ["artifact of small"], "the earlier result is still there"


def test_a_result_whose_export_an_expect_stops_stays_in_the_store(work: Workplace) -> None:
    fails = "expect small.bytes < 1 kB\n"
    assert work.run(RECIPE + fails + ARTIFACT).exit_code == 3
    assert not (work.folder / "out").exists()
    (bundle,) = bundles(work)
    assert bundle.stat().st_nlink == 1
    work.run(RECIPE + ARTIFACT)
    assert work.names("start") == ["artifact of small"]
    assert same(bundle, work.folder / STORED)


def test_where_systems_cannot_link_the_export_is_a_copy(
    work: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(checkpoint_write.os, "link", refuse)
    work.run(RECIPE + ARTIFACT)
    (bundle,) = bundles(work)
    assert not same(bundle, work.folder / STORED)
    assert bundle.read_bytes() == (work.folder / STORED).read_bytes()
    assert check(work.folder / "out/small.effc") == []


def test_gc_drops_a_bundle_with_its_result_and_the_export_stays(work: Workplace) -> None:
    work.run(RECIPE + ARTIFACT)
    assert work.store.gc()["objects"] == 0
    work.store.gc(keep=0)
    assert bundles(work) == []
    assert check(work.folder / "out/small.effc") == []
    load(work.folder / "out/small.effc").materialize()


def test_a_stage_added_later_reads_what_was_bundled(work: Workplace) -> None:
    more = (
        RECIPE.replace("side  =", "other =") + "last = adapt.full(heal, data = code, steps = 1, batch = 1)\n"
    )
    work.run(more + 'export last as artifact("out/last.effc")\n')
    work.run(
        more + 'down = prune.magnitude(last, sparsity = 10%)\nexport down as artifact("out/down.effc")\n'
    )
    assert "last" in work.names("cached")
    load(work.folder / "out/down.effc").materialize()


def test_files_of_a_user_are_never_linked(work: Workplace) -> None:
    work.run(RECIPE + ARTIFACT)
    copied = 'effc 1\nrecipe c\nmodel m = load("out/small.effc")\nexport m as artifact("out/copy.effc")\n'
    work.run(copied)
    assert not same(work.folder / STORED, work.folder / "out/copy.effc/model.safetensors")
