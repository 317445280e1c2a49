"""Calibration layer by layer: resumed runs end alike, lazy models stay lazy, hidden states spill to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Calibrate
from effc.compiler.weights import resident
from effc.passes.prune.depth import Depth
from effc.passes.prune.wanda import Wanda
from effc.passes.quantize.gptq import GPTQ
from effc.passes.reparam.low_rank import LowRank
from effc.passes.tie.recursive import Recursive
from effc.runtime import hidden
from effc.runtime.calibrate import calibrate
from effc.runtime.hidden import Hidden
from effc.runtime.journal import FolderJournal
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref
from tests.passes.tiny_models import Sequences, blank, filled, on_meta

CODE = Ref("code")
METHODS = [
    GPTQ(data=CODE, bits=4, group=16, rules=({"on": "head", "bits": 8},)),  # type: ignore[arg-type]
    GPTQ(data=CODE, bits=3, scheme="asymmetric", select=("mlp",), rules=({"on": "embedding", "bits": 6},)),  # type: ignore[arg-type]
    Wanda(data=CODE, pattern="2:4"),
    LowRank(data=CODE, rank=6, metric="activation", select=("mlp.up", "attention.o")),
]
IDS = ["gptq with head", "gptq with table", "wanda", "low rank"]


def context(model: Model, **more: object) -> Context:
    return Context(seed=5, data={"data": Sequences(model, count=9, length=8)}, **more)  # type: ignore[arg-type]


def stopped_after(layers: int) -> Callable[[], bool]:
    """Asks to stop at the boundary behind this many layers."""
    asked = iter([False] * (layers - 1) + [True])
    return lambda: next(asked)


def same(a: Model, b: Model) -> bool:
    left, right = a.materialize().tensors(), b.materialize().tensors()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("method", METHODS, ids=IDS)
@pytest.mark.parametrize("layers", [1, 4])
def test_a_stopped_run_goes_on_where_it_was(method: Calibrate, layers: int, tmp_path: Path) -> None:
    model = filled(blank(layers=4))
    whole = calibrate(method, model, context(model))
    with pytest.raises(KeyboardInterrupt):
        calibrate(method, model, context(model, journal=FolderJournal(tmp_path), stop=stopped_after(layers)))
    journal = FolderJournal(tmp_path)
    assert [unit for unit in journal.units() if unit.startswith("layer-")] == [
        f"layer-{i}" for i in range(layers)
    ]
    resumed = calibrate(method, model, context(model, journal=journal))
    assert same(resumed.model, whole.model)
    assert resumed.model.ties() == whole.model.ties()
    assert resumed.model.roles == whole.model.roles
    assert [str(e) for e in resumed.log] == [str(e) for e in whole.log]
    assert resumed.measures == whole.measures


def test_a_finished_layer_is_not_solved_again(tmp_path: Path) -> None:
    model = filled(blank(layers=2))
    calibrate(METHODS[0], model, context(model, journal=FolderJournal(tmp_path)))
    seen: list[str] = []

    class Told(GPTQ):
        def rewrite_layer(self, rw, paths, statistics):  # type: ignore[no-untyped-def]
            seen.extend(paths)
            return super().rewrite_layer(rw, paths, statistics)

    calibrate(Told(**dict(METHODS[0])), model, context(model, journal=FolderJournal(tmp_path)))
    assert seen == []


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_lazy_model_is_never_whole_in_memory(method: Calibrate, tmp_path: Path) -> None:
    model = filled(blank(layers=4))
    whole = calibrate(method, model, context(model)).model
    lazy = on_meta(model)
    lazy.weights = {name: resident(tensor) for name, tensor in model.tensors().items()}
    held: list[int] = []
    told: list[Model] = []

    class Watched(type(method)):  # type: ignore[misc]
        def rewrite_layer(self, rw: Rewriter, paths, statistics):  # type: ignore[no-untyped-def]
            held.append(_layers_present(rw.model))
            told.append(rw.model)
            return super().rewrite_layer(rw, paths, statistics)

    watched = Watched(**dict(method))
    streamed = calibrate(watched, lazy, context(lazy, journal=FolderJournal(tmp_path))).model
    assert max(held) == 1
    assert _layers_present(streamed) == 0
    assert lazy.is_meta
    assert same(streamed, whole)


def _layers_present(model: Model) -> int:
    return len(
        {n.split(".")[1] for n, t in model.tensors().items() if n.startswith("layers.") and not t.is_meta}
    )


@pytest.mark.parametrize("method", [METHODS[0], Depth(data=CODE, keep=2)], ids=["gptq", "depth"])
def test_spilled_states_give_the_same_numbers(
    method: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = filled(blank(layers=4))
    monkeypatch.setattr("effc.runtime.calibrate.TOKENS", 16)
    held = calibrate(method, model, context(model))
    written: list[str] = []
    monkeypatch.setattr(hidden, "LIMIT", 0)
    spilled = calibrate(
        method, model, context(model, workdir=tmp_path, progress=lambda *_: written.extend(_files(tmp_path)))
    )
    assert len(set(written)) == 5
    assert _files(tmp_path) == []
    assert same(spilled.model, held.model)
    assert spilled.measures == held.measures


def _files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_come_back_from_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    states = Hidden(tmp_path, limit=100)
    given = [torch.randn(2, 3, 4).to(dtype) + i for i in range(4)]
    for number, tensor in enumerate(given):
        states.put(number, tensor)
    assert len(list(tmp_path.iterdir())) >= 1
    assert all(torch.equal(states.get(n), given[n]) for n in states)
    states.put(0, given[3])
    assert torch.equal(states.get(0), given[3])
    states.drop()
    assert list(tmp_path.iterdir()) == []


def test_shared_layers_are_packed_once() -> None:
    model = filled(blank(layers=4))
    rw = Rewriter(model)
    Recursive(loops=2).rewrite(rw)
    looped = rw.done()
    small = calibrate(GPTQ(data=CODE, bits=4), looped, context(looped)).model
    assert small.ties()["layers.2.mlp.up.packed"] == "layers.0.mlp.up.packed"
    assert len({name for name in small.tensors() if name.endswith("mlp.up.packed")}) == 2


def test_progress_counts_layers() -> None:
    model = filled(blank(layers=3))
    told: list[tuple[int, int, str]] = []
    calibrate(Depth(data=CODE, keep=2), model, context(model, progress=lambda *a: told.append(a)))
    assert told == [(1, 3, "layer"), (2, 3, "layer"), (3, 3, "layer")]


def test_data_without_sequences_is_refused() -> None:
    model = filled(blank(layers=2))
    empty = Sequences(model, count=0)
    with pytest.raises(EffcError, match="E610"):
        calibrate(METHODS[2], model, Context(data={"data": empty}))
