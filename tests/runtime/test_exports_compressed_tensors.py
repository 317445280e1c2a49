"""Packed folders that transformers loads through compressed-tensors compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from effc.compiler.architecture import architecture
from effc.compiler.blocks import QuantLinear
from effc.compiler.importer import build
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.quantize.rtn import RTN
from effc.runtime.exports.compressed_tensors import CompressedTensors, words
from effc.specs.diagnostic import EffcError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}


def made(family: str = "llama", dtype: torch.dtype = torch.float32, **config: object) -> Model:
    classes = architecture(family).classes[:1]
    model = build(
        architecture(family), {"model_type": family, "architectures": list(classes), **SIZES, **config}, dtype
    )
    dice = torch.Generator().manual_seed(0)
    for name, tensor in model.tensors().items():
        value = torch.randn(tensor.shape, generator=dice) / 8 + ("norm" in name)
        model.place(name, torch.nn.Parameter(value.to(dtype), requires_grad=False))
    return model


def packed(model: Model, **fields: object) -> Model:
    rw = Rewriter(model)
    RTN(**fields).rewrite(rw)
    return rw.done()


def test_transformers_computes_the_same_from_mixed_bits(tmp_path: Path) -> None:
    rules = ({"on": "layers[0].mlp.*", "bits": 8, "group": "channel"}, {"on": "attention.v", "skip": True})
    model = packed(made(tie_word_embeddings=True), bits=4, group=16, rules=rules)
    place = tmp_path / "small"
    verdict = CompressedTensors(path=str(place)).publish(model)
    assert verdict.error < 1e-4
    config = json.loads((place / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.self_attn.v_proj" in config["ignore"]
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {4, 8}


@pytest.mark.claim
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", ["channel", 32])
def test_transformers_computes_the_same(bits: int, scheme: str, group: str | int, tmp_path: Path) -> None:
    model = packed(made(dtype=torch.bfloat16), bits=bits, scheme=scheme, group=group)
    CompressedTensors(path=str(tmp_path / "small")).publish(model)


@pytest.mark.claim
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_transformers_computes_the_same_in_other_families(family: str, tmp_path: Path) -> None:
    model = packed(made(family, head_dim=16), bits=4, group=32, scheme="asymmetric")
    CompressedTensors(path=str(tmp_path / "small")).publish(model)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_codes_and_zero_points_are_the_formats_own(bits: int, scheme: str) -> None:
    model = packed(made(), bits=bits, scheme=scheme, group=8)
    unit = model.module("layers.0.mlp.down")
    assert isinstance(unit, QuantLinear)
    tensors = dict(words(unit))
    q, scale, zero = unit.unpack()
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], bits, q.shape), q)
    assert torch.equal(tensors["weight_scale"], scale)
    if zero is not None:
        assert torch.equal(
            unpack_from_int32(tensors["weight_zero_point"], bits, zero.shape, packed_dim=0), zero
        )


def codes(model: Model) -> list[tuple[str, str]]:
    problems = CompressedTensors(path="x").refuses(model)
    return [(problem.code, " ".join((problem.title, *problem.notes))) for problem in problems]


def test_what_it_cannot_express_is_named() -> None:
    for model, words_ in (
        (made(), "needs packed weights"),
        (packed(made(), bits=4, group="tensor"), "one scale for the whole tensor"),
        (packed(made(), bits=8, select=("embedding",)), "the format packs linears alone"),
        (
            packed(made(), bits=8, scheme="asymmetric", rules=({"on": "mlp.*", "bits": 4},)),
            "beside weights packed in another way",
        ),
    ):
        (found,) = codes(model)
        assert found[0] == "E553"
        assert words_ in found[1]


def test_a_model_that_its_config_cannot_say_is_refused(tmp_path: Path) -> None:
    rw = Rewriter(packed(made(), bits=4, group=16))
    rw.swap("layers.1.mlp", made(intermediate_size=48).module("layers.1.mlp"))
    with pytest.raises(EffcError) as caught:
        CompressedTensors(path=str(tmp_path / "x")).publish(rw.done())
    assert "where the config gives" in caught.value.diagnostics[0].notes[0]
    assert not list(tmp_path.iterdir())
