"""The store: published results read back equal, a crash leaves nothing half-made, damage is seen."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from effc.compiler.method import Outcome
from effc.compiler.rewrite import Edit
from effc.runtime import durable
from effc.runtime.journal import FolderJournal
from effc.runtime.lock import locked
from effc.runtime.store import Store
from effc.specs.diagnostic import EffcError

from .small import decoder, same

KEY = "0" * 64
OUTCOME = Outcome(decoder(), (Edit("write", "head", "all of it"),), {"errors": {"head": 0.25}})
ABOUT = {"recipe": "r", "stage": "s", "parts": {"method": "m"}}


def test_published_model_reads_back_bit_for_bit(tmp_path: Path) -> None:
    made = Store(tmp_path / "s").publish(KEY, OUTCOME, ABOUT)
    found = Store(tmp_path / "s").get(KEY)
    assert found is not None
    assert found.model.is_meta, "weights are read when needed, not before"
    assert same(found.model, OUTCOME.model)
    assert found.model.ties() == {"head.weight": "embedding.weight"}
    assert found.model.tokenizer == OUTCOME.model.tokenizer
    assert (found.log, found.measures, found.about) == (list(OUTCOME.log), OUTCOME.measures, ABOUT)
    assert found.fingerprint == made.fingerprint


def test_an_object_is_a_file_that_safetensors_reads(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish(KEY, OUTCOME, ABOUT)
    name = store.record(KEY)["tensors"]["embedding.weight"][0]  # type: ignore[index]
    weight = OUTCOME.model.tensors()["embedding.weight"]
    assert torch.equal(load_file(store.objects.path(name))["tensor"], weight.detach())


def test_equal_tensors_are_kept_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish(KEY, OUTCOME, ABOUT)
    count = len(list(store.objects.folder.glob("*/*")))
    store.publish("1" * 64, Outcome(decoder()), ABOUT)
    assert len(list(store.objects.folder.glob("*/*"))) == count
    store.publish("2" * 64, Outcome(decoder(seed=1)), ABOUT)
    assert len(list(store.objects.folder.glob("*/*"))) > count


def test_fingerprint_is_of_content_and_not_of_how_it_was_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.publish(KEY, OUTCOME, ABOUT)
    second = store.publish("1" * 64, Outcome(decoder()), ABOUT | {"stage": "other"})
    third = store.publish("2" * 64, Outcome(decoder(seed=1)), ABOUT)
    assert first.fingerprint == second.fingerprint != third.fingerprint


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Crash at the n-th call that changes the disk."""

    def arm(n: int) -> None:
        calls = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls >= n:
                    raise Crash
                return real(*args, **kwargs)

            return call

        for name in ("fsync", "replace", "unlink", "link"):
            monkeypatch.setattr(durable.os, name, counted(getattr(os, name)))
        monkeypatch.setattr(durable, "write", counted(durable.write))

    return arm


@pytest.mark.parametrize(("bundled", "steps"), [(False, 40), (True, 15)], ids=["objects", "bundle"])
def test_a_crash_at_every_step_leaves_the_whole_result_or_none(
    tmp_path: Path,
    crash_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    bundled: bool,
    steps: int,
) -> None:
    small = Outcome(decoder(layers=1))
    names = {name: name for name in small.model.tensors()} if bundled else None
    finished, n = False, 0
    while not finished:
        n += 1
        folder = tmp_path / str(n)
        crash_at(n)
        try:
            Store(folder).publish(KEY, small, ABOUT, names)
            finished = True
        except Crash:
            pass
        monkeypatch.undo()
        found = Store(folder).get(KEY)
        assert found is None or same(found.model, small.model)
        again = Store(folder).publish(KEY, small, ABOUT, names)
        assert same(again.model, small.model), f"goes on after a crash at step {n}"
    assert n > steps, f"only {n} steps were tried"


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "E601"), (errno.EROFS, "E602")])
def test_a_full_or_read_only_disk_is_said_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    store = Store(tmp_path)
    real, count = durable.write, 0

    def write(file: Any, content: Any) -> None:
        nonlocal count
        count += 1
        if count == 12:
            raise OSError(number, os.strerror(number))
        real(file, content)

    monkeypatch.setattr(durable, "write", write)
    with pytest.raises(EffcError) as caught:
        store.publish(KEY, OUTCOME, ABOUT)
    assert caught.value.diagnostics[0].code == code
    assert os.strerror(number) in caught.value.diagnostics[0].render()
    assert store.get(KEY) is None
    assert not list(store.aside.iterdir()), "what was begun is taken away"
    assert same(store.publish(KEY, OUTCOME, ABOUT).model, OUTCOME.model)


def test_a_real_limit_on_file_size_is_said(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; import torch\n"
        "from effc.runtime.store import Store; from effc.specs.diagnostic import EffcError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "store = Store(Path(sys.argv[1]))\n"
        "store.objects.keep_tensor(torch.zeros(64))\n"
        "try: store.objects.keep_tensor(torch.zeros(4096))\n"
        "except EffcError as e: print(e.diagnostics[0].code, len(list(store.aside.iterdir())))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout.split() == ["E601", "0"], run.stderr


def test_a_changed_tensor_is_refused_dropped_and_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish(KEY, OUTCOME, ABOUT)
    path = store.objects.path(store.record(KEY)["tensors"]["norm.weight"][0])  # type: ignore[index]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = Store(tmp_path).get(KEY)
    assert found is not None
    with pytest.raises(EffcError) as caught:
        found.model.materialize()
    assert caught.value.diagnostics[0].code == "E603"
    assert Store(tmp_path).get(KEY) is None, "the next run makes it again"


def test_a_changed_manifest_counts_as_missing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish(KEY, OUTCOME, ABOUT)
    path = tmp_path / "results" / f"{KEY}.json"
    path.write_text(path.read_text().replace("0.25", "0.05"))
    assert store.get(KEY) is None


def test_another_folder_is_not_taken_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "format").write_text("effc store 9\n")
    with pytest.raises(EffcError) as caught:
        Store(tmp_path)
    assert caught.value.diagnostics[0].code == "E604"


def test_gc_keeps_what_results_need_and_drops_the_rest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish(KEY, OUTCOME, ABOUT)
    store.publish("1" * 64, Outcome(decoder(seed=1)), ABOUT)
    os.utime(tmp_path / "results" / f"{KEY}.json", (0, 0))
    store.work("2" * 64).save("layer-0", {"x": torch.zeros(2)}, {})
    assert store.gc()["objects"] == 0, "nothing is superfluous yet"
    assert store.work("2" * 64).done("layer-0"), "a stopped stage can still go on"
    needed = sum(store.files_of(store.record("1" * 64) or {}).values())
    gone = store.gc(keep=needed)
    assert (gone["results"], gone["journals"]) == (1, 1)
    assert store.get(KEY) is None
    kept = store.get("1" * 64)
    assert kept is not None
    assert same(kept.model, decoder(seed=1))


def test_journal_units_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = FolderJournal(tmp_path / "w")
    assert not journal.done("layer-0")
    journal.save("layer-0", {"a": torch.arange(3), "b": torch.zeros(0, 2)}, {"errors": {"x": 0.5}})
    tensors, data = journal.read("layer-0")
    assert torch.equal(tensors["a"], torch.arange(3))
    assert tensors["b"].shape == (0, 2)
    assert data == {"errors": {"x": 0.5}}
    monkeypatch.setattr(durable.os, "replace", lambda *_: (_ for _ in ()).throw(Crash()))
    with pytest.raises(Crash):
        journal.save("layer-0", {"a": torch.arange(9)}, {})
    assert journal.read("layer-0")[1] == data, "the last whole state stays"
    path = tmp_path / "w" / "units" / "layer-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert not journal.done("layer-0"), "one that is cut short counts as never made"
    assert journal.units() == []


def test_journal_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no name of a unit"):
        FolderJournal(tmp_path).save("../outside", {}, {})


def test_two_processes_take_turns_and_the_second_is_told(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from effc.runtime.lock import locked\n"
        "with locked(Path(sys.argv[1]), print, lambda: False):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
    )
    path = tmp_path / "key"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        told: list[str] = []

        def stop() -> bool:
            if told and child.poll() is None:
                child.stdin.write("\n")  # type: ignore[union-attr]
                child.stdin.flush()  # type: ignore[union-attr]
                child.wait(10)
            return False

        with locked(path, told.append, stop) as waited:
            assert waited
        assert told == [f"process {child.pid}"]


def test_waiting_for_a_lock_can_be_stopped(tmp_path: Path) -> None:
    quiet: Callable[[str], None] = lambda who: None  # noqa: E731
    with locked(tmp_path / "key", quiet, lambda: False), pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with locked(tmp_path / "key", quiet, lambda: True):
            raise AssertionError("the lock was held twice")
