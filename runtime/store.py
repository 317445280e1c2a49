"""Store: results by key, tensors by content.

    .effc/format                      the version of this layout
          objects/ab/ab12...          a tensor (safetensors with one entry) or a file, named by its BLAKE3
          bundles/ab12....safetensors all weights of a result that only exports use; shared with an export
          results/KEY.json            what a stage left: structure, objects, log, measures, parts of the key
          work/KEY/                   journal of a stage that is running or was stopped
          locks/                      one writer for each key; a shared lock of every compile, alone for gc
          aside/                      files not yet published

A result is published by one rename, after everything it names is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from effc.compiler.graph_json import from_json, to_json
from effc.compiler.method import Outcome
from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.rewrite import Edit
from effc.runtime import durable, lock
from effc.runtime.bundles import Bundles
from effc.runtime.journal import FolderJournal
from effc.runtime.key import canonical
from effc.runtime.objects import Entry, Objects, identity_of
from effc.specs.diagnostic import Diagnostic, EffcError

FORMAT = "effc store 1\n"


@dataclass(frozen=True)
class Result:
    """A published stage. `model` reads its weights from the store when they are needed."""

    key: str
    model: Model
    log: Sequence[Edit]
    measures: Mapping[str, Any]
    fingerprint: str
    """Content of the model: structure, tensors, tokenizer."""
    about: Mapping[str, Any]
    """Recipe, binding and parts of the key it was made under."""

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.model, self.log, self.measures)


class Store:
    """A folder of results; see the top of this file for what lies where."""

    def __init__(self, folder: Path) -> None:
        """Opens or prepares the folder; nothing is written before the first result.

        Raises:
            EffcError: E604 when the folder holds something else or another format.
        """
        self.folder = Path(folder).absolute()
        self.results, self.works = self.folder / "results", self.folder / "work"
        self.aside = self.folder / "aside"
        self.objects = Objects(self.folder / "objects", self.aside, self.works)
        self.bundles = Bundles(self.folder / "bundles", self.aside)
        self._refuse_other()

    # -- results

    def get(self, key: str) -> Result | None:
        """The result under a key; None when there is none or part of it is missing or damaged."""
        record = self.record(key)
        if record is None or "graph" not in record:
            return None
        if not all(self.objects.whole(*entry) for entry in _objects_of(record)):
            return None
        if (bundle := record.get("bundle")) and not self.bundles.whole(bundle):
            return None
        with suppress(OSError):
            os.utime(self._result(key))  # last use, for gc
        model = from_json(record["graph"])
        for name, entry in record["tensors"].items():
            lazy = self.bundles.lazy(bundle, name, entry) if bundle else self.objects.lazy(entry)
            model.weights[name] = lazy
        if record["tokenizer"] is not None:
            files = {name: self.objects.file(entry[0]) for name, entry in record["tokenizer"].items()}
            model.tokenizer = TokenizerFiles(files)
        model.beside = {name: self.objects.lazy(entry) for name, entry in record.get("beside", {}).items()}
        model.facts = dict(record["facts"])
        log = [Edit(*entry) for entry in record["log"]]
        return Result(key, model, log, record["measures"], record["fingerprint"], record["about"])

    def publish(
        self,
        key: str,
        outcome: Outcome,
        about: Mapping[str, Any],
        bundled: Mapping[str, str] | None = None,
    ) -> Result:
        """Keep what a stage left. Until the last rename nothing under `key` is visible.

        `bundled` are the names that an export writes the weights under; then they are kept in its file.

        Raises:
            EffcError: E601 when the disk is full, E602 when it cannot be written, E405 for a model that JSON
                cannot express.
        """
        self._begin()
        model = outcome.model
        files = model.tokenizer.files if model.tokenizer else None
        graph = to_json(model)
        bundle, kept = self.bundles.keep(model, bundled) if bundled else (None, {})
        record = {
            "graph": graph,
            "tensors": {n: kept[n] if bundle else self.objects.keep(model, n) for n in model.tensors()},
            **({"bundle": bundle} if bundle else {}),
            "tokenizer": _kept(self.objects, files),
            **_beside({name: self.objects.keep_lazy(lazy) for name, lazy in model.beside.items()}),
            "facts": _plain(model.facts),
            "log": [[edit.verb, edit.path, edit.detail] for edit in outcome.log],
            "measures": _plain(outcome.measures),
            "about": dict(about),
        }
        record["fingerprint"] = _content(record)
        self.keep(key, record)
        found = self.get(key)
        assert found is not None, "what was just published can be read"
        return found

    def keep(self, key: str, record: dict[str, Any]) -> None:
        """Publish a manifest, by one rename."""
        record["digest"] = _digest(record)
        durable.publish_json(self._result(key), record, self.aside)

    def record(self, key: str) -> dict[str, Any] | None:
        """The manifest of a result; None when there is none or it was changed on disk."""
        try:
            record = json.loads(self._result(key).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(record, dict) or record.get("digest") != _digest(record):
            return None
        return record

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every readable manifest with its key, the one used last first."""
        paths = sorted(self.results.glob("*.json"), key=lambda p: (-p.stat().st_mtime, p.name))
        for path in paths:
            if (record := self.record(path.stem)) is not None:
                yield path.stem, record

    def forget(self, key: str) -> None:
        """Drop a result; its objects go with the next gc."""
        self._result(key).unlink(missing_ok=True)

    def files_of(self, record: Mapping[str, Any]) -> dict[Path, int]:
        """Everything on disk that a manifest needs, with its bytes."""
        objects = {self.objects.path(name): size for name, size in _objects_of(record)}
        return objects | self.bundles.sizes(record.get("bundle"))

    # -- running stages

    def work(self, key: str, saved: Callable[[str], None] = lambda unit: None) -> FolderJournal:
        """The journal of the stage with this key; it outlives a killed run."""
        self._begin()
        return FolderJournal(self.works / key, saved)

    @contextmanager
    def writing(self, key: str, waiting: Callable[[str], None], stop: Callable[[], bool]) -> Iterator[bool]:
        """Be the one process that works on a key; gives whether it had to wait, and should look again."""
        self._begin()
        with lock.locked(self.folder / "locks" / key, waiting, stop) as waited:
            yield waited

    @contextmanager
    def open(self, alone: bool = False, stop: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Use the store; `alone` gives False when another process uses it."""
        self._begin()
        with lock.shared(self.folder / "locks" / "store", alone) as got:
            yield got

    # -- the folder

    def _result(self, key: str) -> Path:
        return self.results / f"{key}.json"

    def _refuse_other(self) -> None:
        try:
            found = (self.folder / "format").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        except OSError as problem:
            raise durable.refused(problem, self.folder) from problem
        if found != FORMAT:
            note = f"it says {found[:40].strip()!r}, this effc writes {FORMAT.strip()!r}"
            advice = "give another folder with `--store DIR`, or remove this one"
            title = f"`{self.folder}` is no store of this version"
            raise EffcError(Diagnostic("E604", title, (), (note,), advice))

    def _begin(self) -> None:
        """Prepare the folder on the first write."""
        mark = self.folder / "format"
        if not mark.is_file():
            durable.publish(mark, lambda file: durable.write(file, FORMAT.encode()), self.aside)
            ignore = self.folder / ".gitignore"
            durable.publish(ignore, lambda file: durable.write(file, b"*\n"), self.aside)

    # -- cleaning

    def gc(self, keep: int | None = None) -> dict[str, int]:
        """Drop what no result needs; with `keep`, first results not used for long, down to that many bytes.

        Returns what went: results, objects, journals, bytes. The caller holds the store alone.
        """
        gone = {"results": 0, "objects": 0, "journals": 0, "bytes": 0}
        kept: dict[Path, int] = {}
        for key, record in list(self.records()):
            needed = self.files_of(record)
            if keep is not None and sum((kept | needed).values()) > keep:
                self.forget(key)
                gone["results"] += 1
            else:
                kept |= needed
        for path in [*self.objects.folder.glob("*/*"), *self.bundles.folder.glob("*")]:
            if path not in kept:
                gone["bytes"] += path.stat().st_size
                gone["objects"] += 1
                path.unlink()
        for work in list(self.works.glob("*")):
            if keep is not None or self._result(work.name).is_file():
                gone["bytes"] += sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
                gone["journals"] += 1
                shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(self.aside, ignore_errors=True)
        for path in list((self.folder / "locks").glob("*")):
            if path.name != "store":  # nobody else is here, so nobody holds one
                path.unlink()
        return gone


def _objects_of(record: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(name, bytes on disk) of every object that a manifest needs."""
    tensors = {} if record.get("bundle") else record["tensors"]
    tokenizer = record["tokenizer"] or {}
    entries = (*tensors.values(), *tokenizer.values(), *record.get("beside", {}).values())
    return [(e[0], e[1]) for e in entries]


def content_of(model: Model, tensor: Callable[[str], str]) -> str:
    """The fingerprint of a model that is not in a store; `tensor` gives each tensor's own."""
    tokenizer = model.tokenizer.files if model.tokenizer else {}
    record = {
        "graph": to_json(model),
        "tensors": {name: [tensor(name)] for name in model.tensors()},
        "tokenizer": {name: [blake3(content).hexdigest()] for name, content in tokenizer.items()} or None,
        **_beside({name: [identity_of(lazy.read())] for name, lazy in model.beside.items()}),
    }
    return _content(record)


def _kept(objects: Objects, files: Mapping[str, bytes] | None) -> dict[str, Entry] | None:
    return None if files is None else {name: objects.keep_file(content) for name, content in files.items()}


def _content(record: Mapping[str, Any]) -> str:
    files = {name: entry[0] for name, entry in (record["tokenizer"] or {}).items()}
    tensors = {name: entry[0] for name, entry in record["tensors"].items()}
    beside = [{name: entry[0] for name, entry in record[key].items()} for key in ("beside",) if key in record]
    return hashlib.sha256(canonical([record["graph"], tensors, files, *beside]).encode()).hexdigest()


def _beside(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Poolers and task heads that travel with a model; most have none, and their manifests say nothing."""
    return {"beside": dict(entries)} if entries else {}


def _digest(record: Mapping[str, Any]) -> str:
    """Over the manifest itself, so that a change on disk is seen."""
    text = json.dumps({k: v for k, v in record.items() if k != "digest"}, sort_keys=True)
    return blake3(text.encode()).hexdigest()


def _plain(data: Any) -> Any:
    """Through JSON and back, so that what is published equals what is read; keys become strings."""
    return json.loads(json.dumps(data))
