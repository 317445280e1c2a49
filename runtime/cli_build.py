"""`effc plan` and `effc compile`: check, plan, run, report."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effc.dsl.read import Checked
from effc.runtime import front, hash_ahead
from effc.specs.diagnostic import Diagnostic

if TYPE_CHECKING:
    from effc.compiler.plan import Plan
    from effc.runtime.compiled import Compiled

CONTRACT_FAILED = 3


def plan(options: argparse.Namespace) -> int:
    """Print what every stage will cost; several settings give one plan each."""
    from effc.compiler.plan_text import plan_text

    records = [_planned(each, options) for each in front.checked(options.recipe, options.params)]
    if options.json:
        _print_json(records)
    else:
        print("\n".join(plan_text(record) for record in records), end="")
    return 0


def compile(options: argparse.Namespace) -> int:
    """Plan, then run; exit code 3 when an `expect` or a contract did not hold."""
    from effc.runtime.progress import observer
    from effc.runtime.report import write
    from effc.runtime.summary import summary

    found = front.checked(options.recipe, options.params)
    if not options.tiny:
        hash_ahead.begin([each.recipe for each in found], options.store)
    _import_all()
    planned = [_planned(each, options, weights=True) for each in found]
    watch = observer(json_lines=options.json, quiet=options.quiet)
    records, failed = [], False
    for each, expected in zip(found, planned, strict=True):
        result = front.compile(each.recipe, options.store, options.device, options.tiny, [watch])
        record = result.as_json(expected) | _about(each, expected)
        record["warnings"] = [*expected["warnings"], *record["warnings"]]
        record["kernels"] = _kernels(result)
        _finish_exports(record)
        pages = [options.store / "reports" / f"{_named(each)}.html"]
        for page in pages if options.report is None else [*pages, options.report]:
            write(record, page)
        records.append(record)
        failed = failed or result.exit_code != 0
        if not options.json:
            _say(result.warnings)
            _say(result.problems)
            print(summary(record), end="")
            print(f"{'report':<7}{pages[0]}")
    if options.json:
        _print_json(records)
    return CONTRACT_FAILED if failed else 0


def _import_all() -> None:
    """What every run imports, in a process that begins with it: no garbage collection looks at it again."""
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import effc.compiler.plan
        import effc.runtime.run
        import effc.runtime.sources  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()


def _kernels(result: Compiled) -> dict[str, Any]:
    """Which kernel runs each node of the smallest model to be exported that was made, or of the last one."""
    from effc.runtime.kernel_table import kernels_of

    made = {stage.name for stage in result.stages}
    shown = [e.model for e in result.exports if e.model in made] or [result.stages[-1].name]
    smallest = min(shown, key=lambda name: result.stage(name).cost.bytes)
    return {"model": smallest, **kernels_of(result.models[smallest])}


def _planned(each: Checked, options: argparse.Namespace, weights: bool = False) -> dict[str, Any]:
    from effc.runtime.machine import chosen_target, disk_free

    target = chosen_target(options.target, options.device)
    made = front.plan(each.recipe, options.store, target, options.device, options.tiny, weights)
    if not options.json:
        _say((*each.warnings, *made.warnings))
    told = [warning.as_json() for warning in (*each.warnings, *made.warnings)]
    about = {"warnings": told, "settings": dict(each.settings), "disk_free": disk_free(options.store)}
    return made.as_json() | about | {"torch": _by_torch(made)}


def _by_torch(made: Plan) -> dict[str, str]:
    """Exported models with a recurrent state that no C program runs, and why."""
    from effc.runtime.kernel_table import kernels_of

    exported = dict.fromkeys(e.model for e in made.recipe.exports if made.stage(e.model).cost.state_bytes)
    reasons = {name: kernels_of(made.models[name]).get("why", "") for name in exported}
    return {name: why for name, why in reasons.items() if why}


def _about(each: Checked, expected: dict[str, Any]) -> dict[str, Any]:
    """What the page says beside the numbers: when, where, from which text."""
    from datetime import datetime

    source = each.recipe.source
    return {
        "date": datetime.now().astimezone().isoformat(" ", "minutes"),
        "machine": expected["target"]["summary"],
        "settings": dict(each.settings),
        "text": source.text if source else "",
        "kernels": "Every operation ran on the reference path (torch); no generated kernel was used.",
    }


def _finish_exports(record: dict[str, Any]) -> None:
    """Size on disk, and for Hugging Face folders the command line that evaluates them."""
    from effc.runtime.harness import OFFLINE, evaluation
    from effc.specs.units import fmt_bytes

    for export in record["exports"]:
        place = Path(export["path"])
        if export["refused"] or not place.exists():
            continue
        files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
        export["size"] = fmt_bytes(sum(p.stat().st_size for p in files))
        if export["format"] in ("hf", "compressed_tensors"):
            export["evaluate"] = evaluation(place)
            export["evaluate_offline"] = OFFLINE if export["evaluate"] else None


def _named(each: Checked) -> str:
    """`shrink`, or `shrink-bits=3` in a sweep."""
    settings = "".join(f"-{name}={value}" for name, value in each.settings.items())
    return "".join(c if c.isalnum() or c in "-_=." else "_" for c in f"{each.recipe.name}{settings}")


def _say(diagnostics: Iterable[Diagnostic]) -> None:
    for diagnostic in diagnostics:
        print(diagnostic.render(), file=sys.stderr)


def _print_json(records: list[dict[str, Any]]) -> None:
    """One recipe is an object; a sweep is a list of them."""
    print(json.dumps(records[0] if len(records) == 1 else records, indent=2))
