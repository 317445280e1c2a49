"""How a model came to be: told into an artefact when it is exported, and read back by `effc explain`."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effc.compiler.plan_text import table
from effc.dsl.resolved import flat_names, text_of
from effc.runtime import artifact
from effc.runtime.catalogue import catalogue
from effc.runtime.compiled import Compiled, ExpectRun, StageRun
from effc.runtime.kernel_table import kernel_lines, kernels_of
from effc.runtime.kernel_texts import kernel_texts
from effc.runtime.kernel_ways import way_lines, ways_of
from effc.runtime.report import page
from effc.runtime.report_words import many
from effc.runtime.score_table import score_lines
from effc.runtime.store import Store
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.units import fmt_bytes, fmt_seconds

if TYPE_CHECKING:
    from effc.passes.lower.gpu import Rows

LIBRARIES = ("effc", "torch", "numpy", "safetensors", "tokenizers")
_EDITS_SHOWN = 40
_USE = re.compile(r"^[\"']?use\b", re.MULTILINE)
"""A recipe with parts in other files, which are joined into the text that an artefact keeps."""


def story_of(compiled: Compiled, expects: Sequence[ExpectRun], model: str, store: Store) -> artifact.Story:
    """What an export of `model` tells: recipe, lock, edits and the report as far as the run has come."""
    ancestors = compiled.recipe.ancestors(model) | {model}
    made = [s for s in compiled.stages if s.name in ancestors]
    record = compiled.as_json() | {
        "stages": [s.as_json() for s in made],
        "expects": [e.as_json() for e in expects],
        "kernels": {"model": model, **kernels_of(compiled.models[model])},
    }
    texts, chosen = kernel_texts(compiled.models[model])
    source = compiled.recipe.source
    joined = source is not None and bool(_USE.search(source.text))
    return artifact.Story(
        recipe=text_of(compiled.recipe, catalogue()) if joined else source.text if source else None,
        lock={
            **({"names": flat_names(compiled.recipe)} if joined else {}),
            "recipe": compiled.recipe.name,
            "model": model,
            "params": record["params"],
            "tiny": compiled.tiny,
            "libraries": dict(_libraries()),
            "stages": [_locked(s, store) for s in made],
            "kernels": chosen,
        },
        edits=tuple((s.name, *entry) for s in made for entry in s.log),
        report=record,
        page=page(record),
        kernels=texts,
    )


def _locked(stage: StageRun, store: Store) -> dict[str, Any]:
    """What decides a stage's content, and what was measured on it."""
    about = (store.record(stage.key) or {}).get("about", {}) if stage.key else {}
    return {
        "name": stage.name,
        "method": stage.method,
        "inputs": list(stage.inputs),
        "key": stage.key,
        "fingerprint": stage.fingerprint,
        "parts": about.get("parts"),
        "params": stage.cost.params,
        "bytes": stage.cost.bytes,
        "loss": dict(stage.loss),
    }


def _libraries() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def explained(folder: Path, stage: str | None, rows: Rows | None = None) -> dict[str, Any]:
    """A stage of an artefact: what it did, with which arguments, what it selected, what it promised.

    `rows` names the launches of a GPU in place of the C program's kernels (see `kernels_of`).

    Raises:
        EffcError: E683 when the artefact has no such stage or tells nothing; what reading it refuses.
    """
    told = artifact.story(folder)
    stages = {s["name"]: s for s in (told.report or {}).get("stages", ()) if isinstance(s, Mapping)}
    name = stage or str(told.lock.get("model", ""))
    if name not in stages:
        raise EffcError(
            Diagnostic(
                "E683",
                f"`{folder}` tells nothing about a stage called `{name}`",
                help=f"it has: {', '.join(stages) or 'no stages'}",
            )
        )
    locked: Mapping[str, Any] = next((s for s in told.lock.get("stages", ()) if s["name"] == name), {})
    edits = [list(edit[1:]) for edit in told.edits if edit[0] == name]
    told_more: dict[str, Any] = {"parts": locked.get("parts"), "log": edits}
    if name == told.lock.get("model"):
        model = artifact.read(folder)
        told_more |= {"kernels": kernels_of(model, rows), "ways": [] if rows else ways_of(model)}
        told_more["on"] = "a GPU" if rows else "a CPU"
    return dict(stages[name]) | told_more


def explained_text(record: Mapping[str, Any]) -> str:
    """The same for people."""
    return "\n".join(_lines(record))


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    source = f" of {record['inputs'][0]}" if record.get("inputs") else ""
    yield f"{record['name']}: {record['method']}{source}"
    yield f"  {fmt_bytes(record['bytes'])}, made in {fmt_seconds(record['seconds'])}"
    arguments = (record.get("parts") or {}).get("arguments") or {}
    if arguments:
        yield "arguments"
        yield from (f"  {key} = {value}" for key, value in arguments.items())
    contract = record.get("contract") or {}
    if contract.get("fidelity"):
        error = contract.get("error")
        words = "not measured" if error is None else f"measured {error:.3g}"
        verdict = {True: ", held", False: ", NOT held", None: ""}[contract.get("held")]
        yield f"contract {contract['fidelity']}: error {words}{verdict}"
    if record.get("selected"):
        yield "touched"
        yield from ("  " + line for line in table(record["selected"], left=3))
    if record.get("errors"):
        worst = sorted(record["errors"].items(), key=lambda item: -item[1])[:5]
        yield "largest errors"
        yield from ("  " + line for line in table([(p, f"{e:.3g}") for p, e in worst], left=1))
    if scores := (record.get("measures") or {}).get("scores"):
        yield "scores"
        yield from ("  " + line for line in score_lines(scores))
    if (kernels := record.get("kernels")) is not None:
        if kernels["rows"]:
            yield f"kernels, on {record['on']}"
            yield from ("  " + line for line in table(kernel_lines(kernels), left=4))
        else:
            kind = "C program" if record["on"] == "a CPU" else "Triton kernels"
            yield f"no {kind}, so torch runs the model: {kernels['why']}"
    if record.get("ways"):
        yield "how kernels go about rows on this machine, with the same bits each way"
        yield from ("  " + line for line in table(way_lines(record["ways"]), left=4))
    if record["log"]:
        yield many(len(record["log"]), "edit")
        yield from ("  " + line for line in table(record["log"][:_EDITS_SHOWN], left=3))
        if len(record["log"]) > _EDITS_SHOWN:
            yield f"  and {len(record['log']) - _EDITS_SHOWN} more (--json has all)"
