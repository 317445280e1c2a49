"""How kernels of the C program go about rows on this machine, as `effc bench` and `effc explain` tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from effc.compiler.model import Model
from effc.kernels.cpu.isa import Isa, available
from effc.kernels.cpu.ways import words
from effc.kernels.program.settle import kernels, known
from effc.kernels.quant_linear import emit_c
from effc.passes.lower.decoder import Unlowered, lower


def ways_of(model: Model) -> list[dict[str, str]]:
    """How kernels of the C program go about rows on this processor: `kernel`, `rows`, `way` and `why`.

    All ways give the same bits. They are measured when a program is first loaded here; [] where there is one.
    """
    isa = available()[0]
    try:
        plan = lower(model).plan if hasattr(model.gm, "head") else None
    except Unlowered:
        plan = None
    if plan is None or isa is not Isa.AMX:
        return []
    found, names = known(plan, isa), ("kernel", "rows", "way", "why")
    lines = [
        (f"quant_linear_{key}", *line)
        for key in kernels(plan)
        for line in words(emit_c.NAMES, emit_c.usual(), found.get(key))
    ]
    return [dict(zip(names, line, strict=True)) for line in lines]


def way_lines(ways: Sequence[Mapping[str, str]]) -> list[tuple[str, str, str, str]]:
    """The same as rows of a table; a kernel is named once."""
    named = [way["kernel"] for way in ways]
    return [
        ("" if i and named[i - 1] == way["kernel"] else way["kernel"], way["rows"], way["way"], way["why"])
        for i, way in enumerate(ways)
    ]
