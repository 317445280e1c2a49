"""Fresh models of other blocks: gates, layer norms and factors on branches as fields of `new(...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effc.compiler.blocks import Norm
from effc.compiler.blocks.gated_attention import GatedAttention as GatedBlock
from effc.compiler.cost import count
from effc.compiler.exporter import inexpressible
from effc.compiler.model import Model
from effc.dsl import check as checking
from effc.dsl import scope
from effc.dsl.files import Reader
from effc.dsl.text import parse
from effc.runtime.bind import made
from effc.runtime.catalogue import catalogue
from effc.runtime.models.new import New
from effc.specs.source import Source

TOKENIZER = str(Path(__file__).parents[2] / "specs" / "zoo" / "pylm")
SIZES = "layers = 3, width = 32, hidden = 48, heads = 4, dtype = fp32"
IDS = torch.arange(24).view(2, 12)


def checked(more: str, family: str = "llama") -> tuple[Any, list[Any]]:
    """The call in a recipe, and what is wrong with it."""
    text = f"""effc 1
recipe fresh "one model"
model fresh = new({family}, tokenizer = "{TOKENIZER}", {SIZES}{", " if more else ""}{more})
expect fresh.bytes >= 0
"""
    document, problems = parse(Source("example", text))
    recipe = checking.check(scope.build(document, {}, problems, Reader(parse)), catalogue(), problems)
    found = [b.call for b in recipe.bindings if b.name == "fresh"]
    return (found[0] if found else None), [p for p in problems if p.severity == "error"]


def model(more: str, family: str = "llama", tiny: bool = False) -> Model:
    call, wrong = checked(more, family)
    assert not wrong, "\n".join(p.render() for p in wrong)
    source = made(New, call)
    assert isinstance(source, New)
    return source.open({}, tiny).materialize()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "more",
    [
        "attention = gated_attention()",
        "attention = gated_attention(kind = element, position = after_o)",
        "norm = layer_norm()",
        "norm = layer_norm(bias = false, eps = 1e-6)",
        "residual = residual_scale(lambda = learned)",
        "residual = residual_scale(lambda = inv_depth, norm = remove)",
        "attention = gated_attention(), norm = layer_norm(), residual = residual_scale()",
    ],
)
def test_a_fresh_model_of_other_blocks_runs_and_is_the_same_again(more: str, family: str) -> None:
    first, second = model(more, family), model(more, family)
    with torch.no_grad():
        out = first(IDS)
        assert torch.equal(out, second(IDS))
    assert bool(out.isfinite().all())
    assert inexpressible(first)
    assert first.tokenizer is not None
    small = model(more, family, tiny=True)
    assert {type(u) for _, u in small.units()} == {type(u) for _, u in first.units()}


def test_blocks_are_those_that_were_asked_for() -> None:
    plain = count(model(""))
    gated = model("attention = gated_attention(kind = element)")
    assert count(gated).params == plain.params + 3 * 32 * 32
    assert all(isinstance(gated.module(f"layers.{n}.attention"), GatedBlock) for n in range(3))
    gates: Any = gated.module("layers.1.attention.gate")
    assert 0.01 < float(gates.weight.std()) < 0.03
    normed = model("norm = layer_norm(eps = 1e-4)", "qwen3")
    forms = {path: unit.form for path, unit in normed.units() if isinstance(unit, Norm)}
    assert {form for path, form in forms.items() if ".attention." not in path} == {"layer"}
    assert {form for path, form in forms.items() if ".attention." in path} <= {"rms"}
    first: Any = normed.module("layers.0.norm1")
    assert (first.eps, bool(first.bias.any()), bool((first.weight == 1).all())) == (1e-4, False, True)
    scaled: Any = model("residual = residual_scale(lambda = 0.25)").module("layers.2.mlp_scale")
    assert scaled.factor == 0.25
    learned: Any = model("residual = residual_scale(lambda = learned)").module("layers.2.mlp_scale")
    assert learned.weight.tolist() == [1.0]
    bare = model("residual = residual_scale(norm = remove)")
    assert [path for path, unit in bare.units() if isinstance(unit, Norm)] == ["norm"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("attention = gated_atention()", "did you mean `gated_attention`?"),
        ("attention = layer_norm()", "write norm = layer_norm(...)"),
        ("attention = gated_attention(kind = heads)", "kind"),
        ("norm = layer_norm(eps = 0)", "eps"),
        ("residual = residual_scale(lambda = -1)", "lambda"),
        ("norm = 3", "norm"),
    ],
)
def test_wrong_blocks_are_told_at_their_place(more: str, words: str) -> None:
    _, wrong = checked(more)
    assert wrong, more
    said = "\n".join(p.render() for p in wrong)
    assert words in said
    assert "example:3:" in said
