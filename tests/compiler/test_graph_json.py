"""Structure survives JSON for every family; malformed JSON is refused, never run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from effc.compiler.blocks import Linear
from effc.compiler.blocks.quant_linear import QuantLinear
from effc.compiler.graph_json import from_json, to_json
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.show import rows, show
from effc.specs.diagnostic import EffcError

Ids = Callable[..., torch.Tensor]


def test_every_family_comes_back(family: Model, ids: Ids) -> None:
    data = json.loads(json.dumps(to_json(family)))
    back = from_json(data)
    assert back.is_meta
    assert to_json(back) == data
    assert back.roles == family.roles
    assert back.ties() == family.ties()
    for name, tensor in family.tensors().items():
        back.place(name, tensor)
    assert torch.equal(back(ids(family)), family(ids(family)))


def test_only_units_that_differ_are_listed(tiny: Model) -> None:
    rw = Rewriter(tiny, "test")
    rw.swap("layers.1.mlp.up", QuantLinear(in_features=32, out_features=48, bits=4, group=16))
    data = to_json(rw.done())
    assert [p for p in data["modules"] if p.count(".") > 2] == ["layers.1.mlp.up"]
    back = from_json(json.loads(json.dumps(data)))
    assert isinstance(back.module("layers.1.mlp.up"), QuantLinear)
    assert [n.meta["origin"] for n in back.gm.graph.nodes if n.target == "layers.1.mlp"] == ["test"]


def _set(data: Any, path: str, value: Any) -> None:
    *most, last = [int(p) if p.lstrip("-").isdigit() else p for p in path.split("/")]
    for part in most:
        data = data[part]
    data[last] = value


BAD: dict[str, tuple[str, Any, str]] = {
    "format": ("format", 2, "`format` is not 1"),
    "no nodes": ("nodes", [], "do not begin with ids"),
    "nodes a word": ("nodes", "abc", "no list"),
    "op": ("nodes/3", ["call", "os.system", [0]], "node 3 is not understood"),
    "code in a path": ("modules/x;import os", {"type": "Scale", "factor": 1.0}, "no module path"),
    "quote in a path": ('modules/a".b', {"type": "Scale", "factor": 1.0}, "no module path"),
    "attribute": ("modules/layers.0.forward", {"type": "Scale", "factor": 1.0}, "reserved word 'forward'"),
    "keyword": ("modules/layers.0.import", {"type": "Scale", "factor": 1.0}, "reserved word 'import'"),
    "private": ("modules/_modules", {"type": "Scale", "factor": 1.0}, "no module path"),
    "unknown type": ("modules/norm", {"type": "Popen"}, "no unit of type 'Popen'"),
    "the base": ("modules/norm", {"type": "Unit"}, "no unit of type 'Unit'"),
    "argument": ("modules/norm/hook", "x", "no argument 'hook'"),
    "missing": ("modules/norm", {"type": "Norm"}, "missing"),
    "huge": ("modules/norm/width", 2**40, "width cannot be"),
    "negative": ("modules/norm/width", -1, "width cannot be"),
    "bool for int": ("modules/norm/width", True, "width cannot be"),
    "nan": ("modules/norm/eps", float("nan"), "eps cannot be"),
    "dtype": ("modules/norm/dtype", "object", "dtype is one of"),
    "heads": ("modules/layers.0.attention/kv_heads", 3, "do not divide"),
    "rope": (
        "modules/layers.0.attention/rope",
        {"rope_type": "evil", "rope_theta": 1},
        "rope_type is one of",
    ),
    "rope theta": ("modules/layers.0.attention/rope/rope_theta", "1e4", "must be a number"),
    "forward reference": ("nodes/3/2", [40], "not before it"),
    "negative reference": ("nodes/3/2", [-1], "not before it"),
    "float reference": ("nodes/3/2", [1.0], "not before it"),
    "step as stream": ("nodes/3/2", [1], "takes x alone"),
    "no step": ("nodes/2/2", [0], r"takes \(x, step\)"),
    "twice": ("nodes/4", ["block", "embedding", [0, 1], ""], "node 4 is not understood"),
    "early output": ("nodes/5", ["output", [2]], "node 5 is not understood"),
    "uncalled": ("modules/other", {"type": "Scale", "factor": 1.0}, "called by no node"),
    "tie to nothing": ("ties", {"head.weight": "gone.weight"}, "cannot be tied"),
    "tie of shapes": ("ties", {"head.weight": "norm.weight"}, "cannot be tied"),
    "tie of numbers": ("ties", {"head.weight": 3}, "no table of names"),
    "tie of code": ("ties", {"head.forward": "norm.weight"}, "cannot be tied"),
    "role": ("roles/head", ["boss", None], "no role"),
    "role path": ("roles/nowhere", ["head", None], "no role"),
    "config": ("config", [1], "wrong type"),
    "widths": ("modules/norm/width", 16, "do not fit each other"),
    "a head of another width": ("modules/head/in_features", 33, "do not fit each other|cannot be tied"),
    "no embedding": ("modules/embedding", {"type": "Norm", "width": 32}, r"takes x alone"),
    "no width": ("modules/layers.0.attention/head_dim", 0, "none may be 0"),
    "endless rope": ("modules/layers.0.attention/rope/rope_theta", float("inf"), "rope cannot be"),
    "a part of another shape": (
        "modules/layers.0.mlp.up",
        {"type": "Linear", "in_features": 32, "out_features": 47},
        "does not fit its block",
    ),
    "a part of nothing": (
        "modules/layers.0.mlp.side",
        {"type": "Scale", "factor": 1.0},
        "no part of its block",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_json_is_refused(tiny: Model, case: str) -> None:
    path, value, words = BAD[case]
    data = copy.deepcopy(to_json(tiny))
    _set(data, path, value)
    with pytest.raises(EffcError, match=words):
        from_json(data)


def test_show_folds_like_layers(tiny: Model) -> None:
    text = show(tiny)
    assert text.count("Attention") == 1
    assert "layers.0..2.attention" in text
    assert "x 3" in text
    assert "tied: head.weight = embedding.weight" in text
    assert sum(row.params for row in rows(tiny)) == sum(t.numel() for t in tiny.tensors().values())
    rw = Rewriter(tiny, "test")
    rw.swap("layers.1.mlp.up", Linear(in_features=32, out_features=48, bias=True))
    lines = show(rw.done()).splitlines()
    assert next(line for line in lines if line.startswith("layers.1.mlp")).split()[-1] == "test"
