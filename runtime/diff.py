"""`effc diff A B`: what differs between two recipes, or two models: structure, sizes, every tensor."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from effc.compiler.cost import count
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.compiler.plan_text import table
from effc.specs.units import fmt_bytes, fmt_count

_ROWS = 1 << 22
"""Numbers compared at once."""
_DIFFERENT = ("values", "shape", "dtype")


def diff_models(left: Model, right: Model, tensors: bool = False) -> dict[str, Any]:
    """Cost of both, and each tensor that differs (all with `tensors`).

    A tensor's difference is ||a - b|| / ||a||; it is absent where shapes differ or a side has no such name.
    """
    mine, theirs = left.tensors(), right.tensors()
    changes = []
    for name in dict.fromkeys((*mine, *theirs)):
        change = _compared(name, left, right, mine.get(name), theirs.get(name))
        if tensors or change["what"] != "equal":
            changes.append(change)
    return {
        "kind": "model",
        "cost": {key: [_costs(left)[key], _costs(right)[key]] for key in _costs(left)},
        "layers": [left.layers, right.layers],
        "tensors": changes,
        "equal": len(mine.keys() & theirs.keys()) - sum(c["what"] in _DIFFERENT for c in changes),
    }


def diff_text(record: dict[str, Any]) -> str:
    """A difference of models for people."""
    lines = list(table([("", "left", "right", "change"), *_cost_rows(record)], left=1))
    if record["tensors"]:
        rows = [(c["name"], c["what"], c["left"], c["right"], _relative(c)) for c in record["tensors"]]
        lines += ["", *table([("tensor", "differs in", "left", "right", "relative"), *rows], left=4)]
    lines += ["", f"{record['equal']} tensors are equal"]
    return "\n".join(lines)


def diff_recipes(left: str, right: str, names: tuple[str, str]) -> list[str]:
    """Unified difference of two canonical recipe texts; empty when they mean the same."""
    before, after = left.splitlines(), right.splitlines()
    return list(difflib.unified_diff(before, after, names[0], names[1], lineterm=""))


def _costs(model: Model) -> dict[str, int]:
    cost = count(model, ATTENDED)
    return {
        "params": cost.params,
        "bytes": cost.bytes,
        "flops_per_token": cost.flops_per_token,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "state_bytes": cost.state_bytes,
    }


def _cost_rows(record: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    for key, (a, b) in record["cost"].items():
        words = fmt_bytes if "bytes" in key else fmt_count
        change = f"{100 * (b - a) / a:+.1f}%" if a and a != b else ""
        yield key.replace("_", " "), words(a), words(b), change
    a, b = record["layers"]
    yield "layers", str(a), str(b), f"{b - a:+d}" if a != b else ""


def _compared(name: str, left: Model, right: Model, a: Tensor | None, b: Tensor | None) -> dict[str, Any]:
    change: dict[str, Any] = {"name": name, "left": _kind(a), "right": _kind(b), "relative": None}
    if a is None or b is None:
        return change | {"what": "only right" if a is None else "only left"}
    if a.shape != b.shape:
        return change | {"what": "shape"}
    relative = _distance(_values(left, name, a), _values(right, name, b))
    what = "dtype" if a.dtype != b.dtype else "equal" if relative == 0 else "values"
    return change | {"what": what, "relative": relative}


def _values(model: Model, name: str, tensor: Tensor) -> Tensor:
    """The tensor with its numbers; a lazy one is read and not kept."""
    return model.weights[name].read() if tensor.is_meta else tensor


def _distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||a||, in pieces; infinite when only a is zero."""
    apart = whole = 0.0
    pairs = zip(a.reshape(-1).split(_ROWS), b.reshape(-1).split(_ROWS), strict=True)
    for x, y in pairs:
        wide = x.detach().to(torch.float64)
        apart += float((wide - y.detach().to(torch.float64)).square().sum())
        whole += float(wide.square().sum())
    if whole == 0:
        return 0.0 if apart == 0 else float("inf")
    return float((apart / whole) ** 0.5)


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return ""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _relative(change: dict[str, Any]) -> str:
    value = change["relative"]
    return "" if value is None else f"{value:.2e}"
