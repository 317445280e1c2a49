"""`effc cache ls | why-miss | gc`: what the store holds, why a stage would run again, and cleaning up."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.quantity import to_base
from effc.specs.units import fmt_bytes, fmt_seconds

if TYPE_CHECKING:
    from effc.runtime.store import Store
    from effc.specs.recipe import Recipe

Row = dict[str, Any]


def cache(options: argparse.Namespace) -> int:
    """The command. Returns 0; refusals raise EffcError."""
    from effc.runtime.store import Store

    store = Store(options.store)
    if options.action == "ls":
        return _print(options, ls(store), ls_text)
    if options.action == "gc":
        return _print(options, gc(store, _bytes(options.keep)), gc_text)
    if options.recipe is None:
        advice = "write `effc cache why-miss RECIPE [STAGE]`"
        raise EffcError(Diagnostic("E680", "there is no recipe to explain", help=advice))
    found = []
    for recipe in _recipes(options.recipe, options.params):
        found += why_miss(recipe, store, options.device or "cpu", options.tiny, options.stage)
    return _print(options, found, why_text)


# ---- ls


def ls(store: Store) -> list[Row]:
    """A row for every result, the one used last first, and one for every stage that was stopped."""
    rows = []
    now = time.time()
    for key, record in store.records():
        about = record["about"]
        rows.append(
            {
                "key": key,
                "recipe": about.get("recipe", ""),
                "stage": about.get("stage", ""),
                "method": about.get("method", ""),
                "bytes": sum(store.files_of(record).values()),
                "used": max(0.0, now - (store.results / f"{key}.json").stat().st_mtime),
                "units": None,
            }
        )
    for work in sorted(store.works.glob("*")):
        units = store.work(work.name).units()
        if units and not (store.results / f"{work.name}.json").is_file():
            size = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
            used = max(0.0, now - work.stat().st_mtime)
            rows.append({"key": work.name, "recipe": "", "stage": "", "method": "", "bytes": size,
                         "used": used, "units": units})  # fmt: skip
    return rows


def ls_text(rows: list[Row]) -> str:
    """Aligned columns; a stage that was stopped says how far it is."""
    if not rows:
        return "the store is empty"
    lines = [("key", "recipe", "stage", "method", "bytes", "last used")]
    for row in rows:
        method = row["method"] if row["units"] is None else f"stopped behind {row['units'][-1]}"
        used = f"{fmt_seconds(row['used'])} ago"
        lines.append((row["key"][:12], row["recipe"], row["stage"], method, fmt_bytes(row["bytes"]), used))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


# ---- why-miss


def why_miss(
    recipe: Recipe, store: Store, device: str = "cpu", tiny: bool = False, stage: str | None = None
) -> list[Row]:
    """For every stage, or one: is it in the store, and else which parts of its key differ?

    Runs no stage. Behind a stage that would run, nothing is known until it has: its content decides.

    Raises:
        EffcError: E205 when there is no such stage; E4 and E62 when models or data cannot be read.
    """
    import torch

    from effc.runtime.bind import method_of
    from effc.runtime.reports import kept_report
    from effc.runtime.run import Run, deterministic
    from effc.runtime.tiny import shrink

    stages = [b.name for b in recipe.bindings if b.keyword == "stage"]
    if stage is not None and stage not in stages:
        known = ", ".join(stages) or "none"
        raise EffcError(Diagnostic("E205", f"there is no stage `{stage}`", notes=(f"stages: {known}",)))
    run = Run(shrink(recipe, store.folder) if tiny else recipe, store, torch.device(device), tiny=tiny)
    rows: list[Row] = []
    with deterministic():
        for binding in run.recipe.bindings:
            if binding.keyword == "model":
                run.models[binding.name], run.fingerprints[binding.name] = run.opening.model(
                    binding, run.models
                )
            if binding.keyword != "stage":
                continue
            missing = [
                r.name for r in run.recipe.inputs_of(binding) if r.name in stages and r.name not in run.models
            ]
            if missing:
                rows.append(
                    {"stage": binding.name, "hit": False, "key": None, "because": missing[0], "differs": []}
                )
                continue
            data = run.opening.data_of(binding, run.models[binding.call.models[0].name])
            key, parts = run.key(binding, method_of(binding.call), data)
            if (result := store.get(key)) is not None:
                run.models[binding.name], run.fingerprints[binding.name] = result.model, result.fingerprint
            hit = result is not None or kept_report(store, key) is not None
            differs = [] if hit else _nearest(store, recipe.name, binding.name, parts)
            rows.append({"stage": binding.name, "hit": hit, "key": key, "because": None, "differs": differs})
    return [row for row in rows if stage in (None, row["stage"])]


def why_text(rows: list[Row]) -> str:
    """A paragraph a stage."""
    return "\n".join(line for row in rows for line in _why(row))


def _why(row: Row) -> Iterable[str]:
    name = row["stage"]
    if row["hit"]:
        yield f"{name}: in the store under {row['key'][:12]}"
    elif row["because"]:
        yield f"{name}: not known before `{row['because']}` has run, whose content is part of its key"
    elif row["differs"] is None:
        yield f"{name}: not in the store, and nothing like it was ever made there"
    else:
        yield f"{name}: not in the store; against the nearest result these parts of the key differ:"
        for part in row["differs"]:
            yield f"  {part['part']}: now {_short(part['now'])}, then {_short(part['then'])}"


def _nearest(store: Store, recipe: str, stage: str, parts: Mapping[str, Any]) -> list[Row] | None:
    """How the parts differ from those of the most similar result of the same method; None without one."""
    from effc.runtime.key import differing

    best: tuple[tuple[int, int], list[tuple[str, Any, Any]]] | None = None
    for _, record in store.records():
        about = record["about"]
        if about.get("method") != parts["method"]:
            continue
        found = differing(parts, about["parts"])
        other = (about.get("recipe"), about.get("stage")) != (recipe, stage)
        rank = (int(other), len(found))
        if found and (best is None or rank < best[0]):
            best = (rank, found)
    return None if best is None else [{"part": p, "now": a, "then": b} for p, a, b in best[1]]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-8:]}"


# ---- gc


def gc(store: Store, keep: int | None = None) -> dict[str, int]:
    """Clean the store, and the places of its exports from what killed ones left there.

    Raises:
        EffcError: E606 while another process uses it.
    """
    with store.open(alone=True) as alone:
        if not alone:
            advice = "wait until it ends, then run this again"
            title = f"another process uses `{store.folder}`"
            raise EffcError(Diagnostic("E606", title, help=advice))
        from effc.runtime.exports._aside import sweep

        left = sum(sweep(target, older=True) for target in _exported(store))
        return {**store.gc(keep), "exports": left}


def _exported(store: Store) -> set[Path]:
    """Where the reports in the store say that exports went, as seen from the working directory."""
    found: set[Path] = set()
    for report in (store.folder / "reports").glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            exports = json.loads(report.read_bytes())["exports"]
            found |= {Path(export["path"]) for export in exports if export["path"]}
    return found


def gc_text(gone: Mapping[str, int]) -> str:
    """What went, as a sentence."""
    words = {
        "results": "results",
        "objects": "objects",
        "journals": "journals",
        "exports": "half-written exports",
    }
    counted = ", ".join(
        f"{gone[name]} {word}" for name, word in words.items() if name != "exports" or gone[name]
    )
    return f"dropped {counted}: {fmt_bytes(gone['bytes'])}"


# ---- the command line


def _print(options: argparse.Namespace, data: Any, words: Any) -> int:
    print(json.dumps(data, indent=2) if options.json else words(data), file=sys.stdout)
    return 0


def _recipes(path: Path, params: list[str]) -> list[Recipe]:
    from effc.dsl.read import read_file
    from effc.runtime.catalogue import catalogue

    return [checked.recipe for checked in read_file(path, catalogue(), params)]


def _bytes(text: str | None) -> int | None:
    """`2 GB`, `500MiB` or plain bytes. Raises EffcError E680 for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    size = to_base(float(found[1]), found[2] or "B", "bytes") if found else None
    if size is None:
        advice = "write a size such as `2 GB` or `500 MiB`"
        raise EffcError(Diagnostic("E680", f"`--keep {text}` is no size", help=advice))
    return int(size)
