"""Bad input that the cards of methods name, where no other test of a method has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from effc.compiler.method import Batch, Context, Method
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.adapt.full import Full
from effc.passes.adapt.lora import Lora
from effc.passes.distill.logits import Logits
from effc.passes.distill.offline import Offline
from effc.passes.grow.stack import Stack
from effc.passes.merge.linear import Linear
from effc.passes.merge.slerp import Slerp
from effc.passes.merge.task_arithmetic import TaskArithmetic
from effc.passes.merge.ties import Ties
from effc.passes.prune.magnitude import Magnitude
from effc.passes.prune.wanda import Wanda
from effc.passes.quantize.gptq import GPTQ
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.low_rank import LowRank
from effc.passes.tie.recursive import Recursive
from effc.runtime.data.text import Text
from effc.runtime.fit import fit
from effc.runtime.merge import merge
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.parts.train.optimizer.lion import Lion
from effc.runtime.parts.train.optimizer.sgd import SGD
from effc.runtime.parts.train.schedule.cosine import Cosine
from effc.runtime.parts.train.schedule.wsd import WSD
from effc.runtime.stage import run_stage
from effc.specs.base import Spec
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref

from .tiny_models import Sequences, blank, filled

BASE, CODE = Ref("base"), Ref("code")
FORMS: dict[str, Any] = {"data": CODE, "steps": 1}


def packed(model: Model) -> Model:
    rw = Rewriter(model)
    RTN(bits=8).rewrite(rw)
    return rw.done()


def codes(method: Method, *models: Model) -> list[str]:
    return [d.code for d in method.refuses(models[0], models[1:])]


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        (Full, FORMS | {"steps": 0}),
        (Full, {"steps": 1}),
        (Full, FORMS | {"batch": 0}),
        (Lora, FORMS | {"rank": 0}),
        (Lora, FORMS | {"alpha": 0.0}),
        (Lora, FORMS | {"dropout": 1.0}),
        (Logits, FORMS),
        (Offline, FORMS | {"teacher": BASE, "k": 0}),
        (Stack, {"factor": 1}),
        (Slerp, {"t": 1.5}),
        (Slerp, {"t": -0.1}),
        (TaskArithmetic, {}),
        (TaskArithmetic, {"base": BASE, "lambda_": 0.0}),
        (Ties, {}),
        (Ties, {"base": BASE, "lambda_": 0.0}),
        (Ties, {"base": BASE, "density": 0.0}),
        (Ties, {"base": BASE, "density": 1.1}),
        (Magnitude, {"sparsity": 1.0}),
        (Magnitude, {"pattern": "3:4"}),
        (Wanda, {"sparsity": 0.5}),
        (GPTQ, {"bits": 4}),
        (GPTQ, {"data": CODE, "damp": 0.0}),
        (GPTQ, {"data": CODE, "damp": 0.2}),
        (LowRank, {"rank": 0}),
        (Recursive, {"loops": 1}),
        (AdamW, {"lr": -1.0}),
        (SGD, {"momentum": 1.0}),
        (Lion, {"lr": 1.0}),
        (Cosine, {"warmup": 1.0}),
        (Text, {"path": "x", "seq": 4}),
        (WSD, {"decay": 1.5}),
    ],
)
def test_values_out_of_range_or_missing_are_refused(method: type[Spec], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        method.model_validate(wrong)


def test_packed_weights_neither_train_nor_mix(tiny: Model) -> None:
    small = packed(tiny)
    assert codes(Full(**FORMS), small) == ["E323"]
    assert codes(Full(train=("norm",), **FORMS), small) == []
    assert codes(Logits(teacher=BASE, **FORMS), small, tiny) == ["E323"]
    assert codes(Offline(teacher=BASE, k=8, **FORMS), small, tiny) == ["E323"]
    for method, more in ((Linear(), ()), (Slerp(), ()), (Ties(base=BASE), (small,))):
        assert codes(method, small, small, *more) == ["E453"]
    assert codes(TaskArithmetic(base=BASE), small, small) == ["E453"]


def test_a_training_of_nothing_is_refused(tiny: Model) -> None:
    problem, *rest = Full(train=(), **FORMS).refuses(tiny, ())
    assert (problem.code, problem.about, rest) == ("E650", "train", [])
    assert "would train nothing" in problem.title

    class Empty(Sequences):
        def size(self, split: str) -> int:
            return 0

        def batch(self, split: str, indices: Sequence[int]) -> Batch:
            raise AssertionError("there is none")

    with pytest.raises(EffcError, match=r"E650.*no token to train on"):
        fit(Full(**FORMS), tiny, Context(data={"data": Empty(tiny)}))


@pytest.mark.parametrize("method", [Wanda(data=CODE), GPTQ(data=CODE)], ids=["wanda", "gptq"])
def test_a_module_that_never_ran_is_named(method: Wanda | GPTQ, tiny: Model) -> None:
    path = "layers.0.mlp.up"
    with pytest.raises(EffcError, match=rf"E421.*{path} never ran on the calibration data"):
        method.rewrite_layer(Rewriter(tiny), [path], {})


def test_a_model_given_twice_is_told(tiny: Model) -> None:
    other = filled(blank(), 5)
    (problem,) = TaskArithmetic(base=BASE).refuses(tiny, (other, tiny, filled(blank(), 6)))
    assert (problem.code, problem.severity) == ("W452", "warning")
    assert "numbers 1 and 3" in problem.notes[0]
    assert not TaskArithmetic(base=BASE).refuses(tiny, (other, tiny)), "the base may be one of them"
    twice = merge(
        TaskArithmetic(base=BASE), (tiny, tiny), Context(models={"base": other})
    ).model.materialize()
    name = "norm.weight"
    want = 2 * tiny.tensors()[name] - other.tensors()[name]
    assert torch.allclose(twice.tensors()[name], want, atol=1e-5)


@pytest.mark.parametrize("method", [TaskArithmetic(base=BASE, weight=(1, 2)), Ties(base=BASE, weight=(1, 2))])
def test_the_base_has_no_weight_of_its_own(method: TaskArithmetic | Ties, tiny: Model) -> None:
    models, start = [filled(blank(), 1), filled(blank(), 2)], tiny
    assert codes(method, *models, start) == []
    assert codes(method, *models, filled(blank(), 3), start) == ["E452"]
    assert run_stage(method, models, Context(models={"base": start})).log
