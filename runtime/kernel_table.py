"""Which kernel runs each node of a model, and why not a faster one; equal layers are one row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from effc.compiler.model import Model
from effc.kernels.gpu.launches import Launch
from effc.kernels.program.call import Call
from effc.passes.lower.decoder import Unlowered, lower
from effc.passes.lower.gpu import launches
from effc.runtime.decoder import device_of, launched

if TYPE_CHECKING:
    from effc.passes.lower.gpu import Rows

_LAYER = re.compile(r"^layers\.(\d+)\.?")
Row = tuple[str, str, str, str]


def kernels_of(model: Model, launched_rows: Rows | None = None) -> dict[str, Any]:
    """`rows` of `where`, `nodes`, `kernel` and `why`; without a program none, and `why` there is none.

    The C program's, or the launches of the GPU that the weights are on. With `launched_rows` those that a GPU
    would have if linear layers multiplied such rows; no weights and no GPU are needed.

    Raises:
        EffcError: E504 when launches are asked for and Triton is not installed.
    """
    try:
        if not hasattr(model.gm, "head"):
            raise Unlowered("the model has no head that could write text")
        calls: Sequence[Call | Launch]
        if launched_rows is not None:
            calls = launches(model, torch.device("meta"), launched_rows).launches
        elif device_of(model).type == "cuda":
            calls = launched(model).launches
        else:
            calls = lower(model).plan.calls
    except Unlowered as reason:
        return {"rows": [], "why": str(reason)}
    names = ("where", "nodes", "kernel", "why")
    return {"rows": [dict(zip(names, row, strict=True)) for row in _rows(calls)]}


def kernel_lines(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The rows as text, under a heading."""
    heads = ("where", "node", "kernel", "why not a faster one")
    return [heads, *((r["where"], r["nodes"], r["kernel"], r["why"]) for r in found["rows"])]


def _rows(calls: Sequence[Call | Launch]) -> list[Row]:
    """Rows of runs of equal layers; what stands outside layers is named whole."""
    groups: list[tuple[int | None, list[tuple[str, str, str]]]] = []
    for call in calls:
        layer = call.layer
        if not groups or groups[-1][0] != layer:
            groups.append((layer, []))
        groups[-1][1].append((_nodes(call), _kernel(call), call.why))
    rows: list[Row] = []
    start = 0
    while start < len(groups):
        end = start
        while (
            end + 1 < len(groups)
            and groups[end + 1][1] == groups[start][1]
            and groups[end + 1][0] is not None
        ):
            end += 1
        first, last = groups[start][0], groups[end][0]
        where = "" if first is None else f"layer {first}" if first == last else f"layers {first}-{last}"
        rows += [(where, *row) for row in groups[start][1]]
        start = end + 1
    return rows


def _nodes(call: Call | Launch) -> str:
    """`attention.q, k, v`: the nodes of a call, within their layer."""
    inside = [_LAYER.sub("", path) for path in call.paths]
    heads = [path.rpartition(".")[0] for path in inside]
    if len(inside) > 1 and len(set(heads)) == 1 and heads[0]:
        return f"{heads[0]}." + ", ".join(path.rpartition(".")[2] for path in inside)
    return ", ".join(inside) if inside else "(between nodes)"


def _kernel(call: Call | Launch) -> str:
    """The kernel with its key, as the program's text calls it, or the keys of a launch."""
    if isinstance(call, Launch):
        return " ".join((call.op, *(spec.key for spec in call.specs)))
    found = re.search(r"\b(\w+)\(", call.text)
    name = found.group(1) if found else call.op
    return name if name.startswith(call.op) else call.op
