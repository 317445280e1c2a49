"""The difference of two models: sizes, and each tensor that changed, moved away or changed its shape."""

from __future__ import annotations

import torch

from effc.compiler.assemble import assemble
from effc.compiler.blocks import Embedding, Linear, Norm
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.runtime.diff import diff_models, diff_recipes, diff_text


def model(width: int = 8) -> Model:
    gm = assemble(
        Embedding(vocab=16, width=width), [], Norm(width=width), Linear(in_features=width, out_features=16)
    )
    made = Model(gm)
    for i, (name, tensor) in enumerate(made.tensors().items()):
        made.place(name, torch.full_like(tensor, i + 1.0, device="cpu"))
    return made


def test_equal_models_have_no_difference() -> None:
    record = diff_models(model(), model())
    assert record["tensors"] == []
    assert record["equal"] == 3
    assert "3 tensors are equal" in diff_text(record)


def test_a_changed_tensor_is_named_with_its_relative_distance() -> None:
    left = model()
    rewriter = Rewriter(left)
    rewriter.write("head", "weight", left.tensors()["head.weight"] * 1.01)
    record = diff_models(left, rewriter.done())
    (change,) = record["tensors"]
    assert (change["name"], change["what"]) == ("head.weight", "values")
    assert abs(change["relative"] - 0.01) < 1e-6
    assert record["equal"] == 2


def test_shapes_are_not_compared_number_by_number() -> None:
    record = diff_models(model(8), model(12))
    assert {change["what"] for change in record["tensors"]} == {"shape"}
    assert record["cost"]["params"] == [8 * 33, 12 * 33]
    assert "+50.0%" in diff_text(record)


def test_recipes_differ_in_the_lines_that_changed() -> None:
    assert diff_recipes("a\nb\n", "a\nb\n", ("x", "y")) == []
    assert diff_recipes("a\nb\n", "a\nc\n", ("x", "y"))[-2:] == ["-b", "+c"]
