"""The training loop: it learns, leaves its inputs alone, resumes to the same bits, and says why it stops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler.method import Context, Optimizer
from effc.compiler.model import Model
from effc.passes.adapt.full import Full
from effc.runtime.data._packed import Packed
from effc.runtime.data.text import Text
from effc.runtime.evaluate import loss
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.parts.train.optimizer.lion import Lion
from effc.runtime.parts.train.optimizer.sgd import SGD
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref
from tests.runtime.doubles import Memory, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        body = "".join(f"def f{i * j % 7}(a{i}, b):\n    return a{i} + b\n" for j in range(20))
        (folder / f"{i}.py").write_text(f"# file {i}\n{body}")
    return Text(path=str(folder), seq=32).open(dict(tiny().tokenizer.files))  # type: ignore[union-attr]


def full(**more: Any) -> Full:
    return Full(**({"data": Ref("code"), "steps": 12, "batch": 4, "optimizer": AdamW(lr=3e-3)} | more))


def weights(model: Model) -> list[torch.Tensor]:
    return [t.clone() for t in model.tensors().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_heldout_loss_and_leaves_the_input_alone(
    data: Packed, precision: str, dtype: torch.dtype
) -> None:
    model = tiny(dtype=dtype)
    before, start = weights(model), loss(model, data)
    out = fit(full(precision=precision), model, Context(data={"data": data})).model
    assert loss(out, data) < start - 0.5
    assert same(weights(model), before)
    assert {t.dtype for t in out.tensors().values()} == {dtype}
    assert out.ties() == model.ties()


@pytest.mark.parametrize("optimizer", [AdamW(lr=3e-3), Lion(lr=3e-4), SGD(lr=0.1)])
@pytest.mark.parametrize("after", [1, 5, 11])
def test_a_stopped_training_ends_with_the_same_bits(data: Packed, optimizer: Optimizer, after: int) -> None:
    method = full(optimizer=optimizer)
    whole = fit(method, tiny(), Context(data={"data": data}, seed=3))
    journal, calls = Memory(), iter(range(1, 99))
    with pytest.raises(KeyboardInterrupt):
        fit(method, tiny(), Context(3, {"data": data}, journal=journal, stop=lambda: next(calls) == after))
    assert journal.units["training"][1]["step"] == after
    resumed = fit(method, tiny(), Context(3, {"data": data}, journal=journal))
    assert same(weights(whole.model), weights(resumed.model))
    assert whole.measures == resumed.measures


def test_parts_of_a_batch_add_up_to_the_batch(data: Packed) -> None:
    whole = fit(full(steps=3, precision="fp32"), tiny(), Context(data={"data": data}))
    parted = fit(full(steps=3, precision="fp32", accumulate=4), tiny(), Context(data={"data": data}))
    for a, b in zip(weights(whole.model), weights(parted.model), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_seed_decides_the_order(data: Packed) -> None:
    outs = [weights(fit(full(steps=3), tiny(), Context(seed, {"data": data})).model) for seed in (0, 0, 1)]
    assert same(outs[0], outs[1])
    assert not same(outs[0], outs[2])


def test_only_what_is_chosen_moves(data: Packed) -> None:
    model = tiny()
    out = fit(full(train=("layers[1].mlp.*",), steps=2), model, Context(data={"data": data})).model
    moved = {n for n, t in out.tensors().items() if not torch.equal(t, model.tensors()[n])}
    assert moved == {f"layers.1.mlp.{name}.weight" for name in ("gate", "up", "down")}
    body = full(train="body").trains(model)
    assert "embedding.weight" not in body
    assert "norm.weight" in body


def test_a_rate_of_zero_changes_nothing(data: Packed) -> None:
    model = tiny()
    for optimizer in (AdamW(lr=0), Lion(lr=0), SGD(lr=0)):
        out = fit(full(optimizer=optimizer, steps=2), model, Context(data={"data": data})).model
        assert same(weights(model), weights(out))


def test_a_loss_that_is_no_number_ends_the_training(data: Packed) -> None:
    model = tiny()
    model.place("norm.weight", torch.full((32,), float("nan")))
    with pytest.raises(EffcError, match="no longer a number at step 1") as caught:
        fit(full(), model, Context(data={"data": data}))
    assert caught.value.diagnostics[0].code == "E651"


def test_selectors_that_match_nothing_are_refused() -> None:
    with pytest.raises(EffcError) as caught:
        full(train=("layers[9].mlp.*",)).trains(tiny())
    assert caught.value.diagnostics[0].code == "E231"


def test_the_curve_has_at_most_two_hundred_points() -> None:
    from effc.runtime.curve import Curve

    curve = Curve(1000)
    for step in range(1000):
        curve.add(step, {"total": float(step)})
    told = curve.as_json()
    assert told["every"] == 5
    assert len(told["losses"]["total"]) == 200
    assert curve.ends() == (2.0, 997.0)


def test_checkpoints_keep_under_their_share_of_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from effc.runtime import training_state
    from effc.runtime.curve import Curve

    clock = [0.0]
    monkeypatch.setattr(training_state.time, "monotonic", lambda: clock[0])

    class Slow(Memory):
        def save(self, unit: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None:
            clock[0] += 2.0
            super().save(unit, tensors, data)

    journal = Slow()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    checkpoints = training_state.Checkpoints(journal, training_state.Moving({}, {}), optimizer, Curve(100))
    saved = []
    for step in range(1, 101):
        clock[0] += 1.0
        checkpoints.offer(step)
        if journal.units and (not saved or saved[-1] != journal.units["training"][1]["step"]):
            saved.append(journal.units["training"][1]["step"])
    assert saved == [10, 50, 90]
