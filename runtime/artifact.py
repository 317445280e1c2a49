"""Artefact: the folder NAME.effc that holds a compiled model and how it came to be; nothing in it runs.

    manifest.json            every other file with its size and BLAKE3
    model.json               graph, roles, ties, architecture, config, facts (compiler/graph_json.py)
    model.safetensors        the weights, packed as they are; several files with an index where they are large
    beside.safetensors       poolers and task heads of the source, where it had some
    recipe.effc, lock.json, edits.json, report.json, report.html    where they were given
    tokenizer.json, ...      tokenizer, generation settings, chat template
    kernels/                 generated kernels for reading; the runtime emits its own and never runs these

Loading checks every file but the weights against the manifest and all of model.json against itself and the
headers of the weights; `check` also hashes the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from effc.compiler.checkpoint import parse_json, read_folder, read_header, within
from effc.compiler.checkpoint_write import write_file, write_folder
from effc.compiler.graph_json import from_json, to_json
from effc.compiler.importer import TOKENIZER_FILES
from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.weights import resident
from effc.runtime.fingerprints import hash_of
from effc.specs.diagnostic import Diagnostic, EffcError

FORMAT = 1
MANIFEST = "manifest.json"
STRUCTURE = "model.json"
BESIDE = "beside.safetensors"
MAX_JSON = 16 << 20
MAX_MANIFEST = 4 << 20
MAX_TOKENIZER = 128 << 20
MAX_FILES = 10_000
_HASH = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True)
class Story:
    """How a model came to be, as far as it is known."""

    recipe: str | None = None
    """The recipe's text."""
    lock: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprints of models and data, versions of methods and libraries, seeds."""
    edits: tuple[tuple[str, str, str, str], ...] = ()
    """(stage, verb, path, detail) of every edit."""
    report: Mapping[str, Any] | None = None
    page: str | None = None
    """The report as HTML."""
    kernels: Mapping[str, str] = field(default_factory=dict)
    """File name -> text of a generated kernel, for reading."""

    def files(self) -> dict[str, bytes]:
        found = {"lock.json": _pretty(self.lock), "edits.json": _pretty([list(e) for e in self.edits])}
        if self.recipe is not None:
            found["recipe.effc"] = self.recipe.encode()
        if self.report is not None:
            found["report.json"] = _pretty(self.report)
        if self.page is not None:
            found["report.html"] = self.page.encode()
        return found | {f"kernels/{name}": text.encode() for name, text in self.kernels.items()}


def is_artifact(folder: Path) -> bool:
    """Does the folder say that it is an artefact?"""
    return (folder / MANIFEST).is_file() and (folder / STRUCTURE).is_file()


def write(model: Model, folder: Path, story: Story | None = None) -> None:
    """Write a model as an artefact in `folder`, which does not exist yet; weights pass through one by one.

    Raises:
        EffcError: E405 when the model holds modules that JSON cannot express.
    """
    structure = to_json(model) | {"facts": _plain(model.facts)}
    folder.mkdir()
    tensors = {n: model.weights[n] if t.is_meta else resident(t) for n, t in model.tensors().items()}
    write_folder(folder, tensors)
    if model.beside:
        write_file(folder / BESIDE, model.beside)
    contents = (story or Story()).files() | {STRUCTURE: _pretty(structure)}
    if model.tokenizer is not None:
        contents |= model.tokenizer.files
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    table = {str(p.relative_to(folder)): [p.stat().st_size, hash_of(p)] for p in listed}
    (folder / MANIFEST).write_bytes(_pretty({"format": FORMAT, "files": table}))


def read(folder: Path) -> Model:
    """The model in an artefact, weights still on disk. Nothing in the folder is trusted.

    Raises:
        EffcError: E414 to E418 for files, E406 for the graph, E443 when a file is not the one that the
            manifest lists, E444 when structure and weights disagree.
    """
    listed = manifest(folder)
    if STRUCTURE not in listed:
        _refuse("E444", folder, f"the manifest does not list {STRUCTURE}")
    value = parse_json(_content(folder, STRUCTURE, listed, MAX_JSON), folder / STRUCTURE)
    model = from_json(value)
    facts = value.get("facts", {})
    if not isinstance(facts, Mapping) or len(facts) > 1000:
        _refuse("E444", folder, "`facts` is no table")
    model.facts = dict(facts)
    weights = read_folder(folder)
    unlisted = sorted({ref.file.name for ref in weights.values()} - listed.keys())
    if unlisted:
        _refuse("E443", folder, f"{unlisted[0]} is not in the manifest")
    due = model.tensors()
    problems = [f"`{name}` is missing" for name in due if name not in weights]
    problems += [f"`{name}` belongs to no module" for name in weights if name not in due]
    problems += [
        f"`{name}` is {list(ref.shape)} {ref.dtype}, the graph has {list(due[name].shape)} {due[name].dtype}"
        for name, ref in weights.items()
        if name in due and (ref.shape != tuple(due[name].shape) or ref.dtype != due[name].dtype)
    ]
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise EffcError(
            Diagnostic(
                "E444", f"the weights of `{folder.name}` do not fit its graph", notes=(*problems[:8], *more)
            )
        )
    model.weights = {name: ref.lazy() for name, ref in weights.items()}
    if BESIDE in listed:
        model.beside = {n: ref.lazy() for n, ref in read_header(_regular(folder, BESIDE)).items()}
    files = {n: _content(folder, n, listed, MAX_TOKENIZER) for n in TOKENIZER_FILES if n in listed}
    model.tokenizer = TokenizerFiles(files) if files else None
    return model


def manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, BLAKE3) of what the artefact lists, names checked, sizes compared.

    Raises:
        EffcError: E443 when a listed file is missing or of another size, E444 for a malformed manifest.
    """
    path = _regular(folder, MANIFEST)
    if path.stat().st_size > MAX_MANIFEST:
        _refuse("E444", folder, f"the manifest has {path.stat().st_size} bytes")
    value = parse_json(path.read_bytes(), path)
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        _refuse("E444", folder, f"the manifest is not of format {FORMAT}")
    table = value.get("files")
    if not isinstance(table, Mapping) or len(table) > MAX_FILES:
        _refuse("E444", folder, f"`files` of the manifest is no table of at most {MAX_FILES} entries")
    found: dict[str, tuple[int, str]] = {}
    for name, entry in table.items():
        match entry:
            case [int(size), str(digest)] if type(size) is int and size >= 0 and _HASH.match(digest):
                found[name] = (size, digest)
            case _:
                _refuse("E444", folder, f"the manifest has no size and hash for {name[:80]!r}")
        actual = _regular(folder, name).stat().st_size
        if actual != size:
            _refuse("E443", folder, f"{name[:80]} has {actual} bytes, the manifest says {size}")
    return found


def check(folder: Path) -> list[Diagnostic]:
    """Every file that differs from the manifest, weights included; empty when the artefact is whole.

    Raises:
        EffcError: as `manifest`.
    """
    return [
        Diagnostic("E443", f"`{name}` is not the file that the manifest lists", notes=(f"in {folder}",))
        for name, (_, digest) in manifest(folder).items()
        if hash_of(_regular(folder, name)) != digest
    ]


def story(folder: Path) -> Story:
    """What the artefact tells about itself; kernels as text.

    Raises:
        EffcError: as `read` for the files it reads.
    """
    listed = manifest(folder)

    def text(name: str) -> str | None:
        if name not in listed:
            return None
        return _content(folder, name, listed, MAX_JSON).decode(errors="replace")

    def value(name: str, kind: type) -> Any:
        if name not in listed:
            return None
        found = parse_json(_content(folder, name, listed, MAX_JSON), folder / name)
        if not isinstance(found, kind):
            _refuse("E444", folder, f"{name} holds {type(found).__name__}, not {kind.__name__}")
        return found

    edits = value("edits.json", list) or []
    if not all(isinstance(e, list) and len(e) == 4 and all(isinstance(w, str) for w in e) for e in edits):
        _refuse("E444", folder, "edits.json holds something else than edits")
    kernels = {n.removeprefix("kernels/"): str(text(n)) for n in listed if n.startswith("kernels/")}
    return Story(
        text("recipe.effc"),
        value("lock.json", dict) or {},
        tuple((e[0], e[1], e[2], e[3]) for e in edits),
        value("report.json", dict),
        text("report.html"),
        kernels,
    )


def _content(folder: Path, name: str, listed: Mapping[str, tuple[int, str]], limit: int) -> bytes:
    """A file as the manifest lists it."""
    from blake3 import blake3

    size, digest = listed[name]
    if size > limit:
        _refuse("E444", folder, f"{name} has {size} bytes, at most {limit} make sense")
    content = _regular(folder, name).read_bytes()
    if blake3(content).hexdigest() != digest:
        _refuse("E443", folder, f"{name} was changed after the artefact was written")
    return content


def _regular(folder: Path, name: str) -> Path:
    """A regular file of the folder, one level deep at most."""
    words = name.split("/")
    plain = all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,150}", w) for w in words)
    if len(words) > 2 or not plain or (len(words) == 2 and words[0] != "kernels"):
        _refuse("E416", folder, f"{name[:80]!r} is no file of an artefact")
    path = within(folder, name)
    if not path.is_file():
        _refuse("E443", folder, f"{name} is missing")
    return path


def _refuse(code: str, folder: Path, why: str) -> NoReturn:
    raise EffcError(Diagnostic(code, f"`{folder.name}` is no artefact that can be loaded", notes=(why,)))


def _pretty(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON holds them."""
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain
