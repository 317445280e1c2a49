"""A model's kernels as an artefact keeps them: a text to read, and in the lock what it was emitted from.

What runs is emitted by the installed effc from the model's own structure, never read from an artefact. So
a text that was edited, or that another version wrote, changes nothing but what is reported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from effc.compiler.model import Model
from effc.kernels.program.emit import emit
from effc.kernels.program.settle import kernels
from effc.kernels.quant_linear import emit_c
from effc.passes.lower.decoder import Unlowered, lower

PROGRAM = "program.c"
"""File in kernels/: the C program of a decoding step."""


def kernel_texts(model: Model) -> tuple[dict[str, str], dict[str, Any]]:
    """File -> text, and the lock's entry: the program's key, and the spec of each kernel by its key.

    A spec pins whatever changes the order of a sum. `ways` are what is left to each machine to measure, by
    kernel: they change no bit.

    A model without a C program has no text, and the entry says why.
    """
    try:
        if not hasattr(model.gm, "head"):
            raise Unlowered("the model has no head that could write text")
        plan = lower(model).plan
    except Unlowered as reason:
        return {}, {"why": str(reason)}
    text, _ = emit(plan)
    specs = {spec.key: json.loads(spec.describe()) for call in plan.calls for spec in call.specs}
    entry = {"program": _key(text), "specs": specs}
    free = {key: list(emit_c.NAMES) for key in kernels(plan)}
    return {PROGRAM: text}, entry | ({"ways": free} if free else {})


def differences(texts: Mapping[str, str], locked: Any, model: Model) -> list[str]:
    """How kept kernels differ from those that run, in words; [] also for an artefact that keeps none."""
    ours, entry = kernel_texts(model)
    told = locked if isinstance(locked, Mapping) else {}
    found = []
    for name, text in sorted(texts.items()):
        if name not in ours:
            found.append(f"kernels/{name[:80]} is no kernel of this model")
        elif text != ours[name]:
            edited = told.get("program") == entry.get("program") or told.get("program") != _key(text)
            by = "was edited" if edited else "was written by another version of effc"
            found.append(f"kernels/{name} {by}")
    specs = told.get("specs")
    if isinstance(specs, Mapping) and specs != entry.get("specs", {}):
        chosen = entry.get("specs", {})
        new = sorted(set(chosen) - set(specs))
        words = f", which it lacks: {', '.join(new)}" if new else ""
        found.append(f"the lock names other kernels than are chosen here{words}")
    return found


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
