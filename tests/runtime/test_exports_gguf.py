"""GGUF files hold the very weights, and llama.cpp computes the same from them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.rewrite import Rewriter
from effc.compiler.sharing import tie
from effc.passes.quantize.rtn import RTN
from effc.runtime.exports import _gguf_model as layout
from effc.runtime.exports.gguf import Gguf, stored
from effc.runtime.load import load
from effc.specs.diagnostic import EffcError

D, F = 64, 96


def tokenizer(split: pre_tokenizers.PreTokenizer | None = None) -> TokenizerFiles:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        ["def add(a, b):\n    return a + b\n", "for item in items:\n    print(item)\n"] * 4, trainer
    )
    settings = json.dumps({"eos_token": "<|end|>", "chat_template": "{{ messages }}"})
    return TokenizerFiles(
        {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": settings.encode()}
    )


def llama(tied: bool = True, architecture: str = "llama", **attention: object) -> Model:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    given = {"width": D, "heads": 4, "kv_heads": 2, "head_dim": 16, "rope": rope} | attention

    def layer() -> dict[str, torch.nn.Module]:
        return {
            "norm1": Norm(width=D),
            "attention": Attention(**given),
            "norm2": Norm(width=D),
            "mlp": MLP(width=D, hidden=F),
        }

    files = tokenizer()
    vocab = len(Tokenizer.from_str(files.files["tokenizer.json"].decode()).get_vocab()) + 5
    head = Linear(in_features=D, out_features=vocab)
    gm = assemble(Embedding(vocab=vocab, width=D), [layer(), layer()], Norm(width=D), head)
    if tied:
        tie(gm, "head.weight", "embedding.weight")
    model = Model(gm, architecture=architecture, config={"max_position_embeddings": 64}, tokenizer=files)
    dice = torch.Generator().manual_seed(0)
    for name, tensor in model.tensors().items():
        value = torch.randn(tensor.shape, generator=dice) / (8 if tensor.dim() > 1 else 16) + ("norm" in name)
        model.place(name, torch.nn.Parameter(value, requires_grad=False))
    return model


def packed(bits: int, **fields: object) -> Model:
    rw = Rewriter(llama(tied=False))
    RTN(bits=bits, **({"group": 32} | fields)).rewrite(rw)
    return rw.done()


def test_llama_cpp_computes_the_same_from_half_precision(tmp_path: Path) -> None:
    export = Gguf(path=str(tmp_path / "m.gguf"))
    verdict = export.publish(llama())
    assert verdict.error < 5e-3
    assert verdict.greedy == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.claim
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_computes_the_same_from_blocks(kind: str, tied: bool, tmp_path: Path) -> None:
    verdict = Gguf(path=str(tmp_path / "m.gguf"), type=kind).publish(llama(tied))
    assert verdict.greedy is not None
    assert verdict.greedy > 0.8


@pytest.mark.claim
@pytest.mark.parametrize("bits", [4, 8])
def test_llama_cpp_computes_the_same_from_packed_weights(bits: int, tmp_path: Path) -> None:
    Gguf(path=str(tmp_path / "m.gguf")).publish(packed(bits))


@pytest.mark.claim
@pytest.mark.parametrize(
    ("architecture", "attention"), [("qwen2", {"bias": True}), ("qwen3", {"qk_norm": 1e-6, "head_dim": 32})]
)
def test_llama_cpp_computes_the_same_in_other_layouts(
    architecture: str, attention: dict[str, object], tmp_path: Path
) -> None:
    Gguf(path=str(tmp_path / "m.gguf")).publish(llama(False, architecture, **attention))


@pytest.mark.parametrize("bits", [4, 8])
def test_matching_packed_weights_are_written_without_loss(bits: int, tmp_path: Path) -> None:
    model, place = packed(bits), tmp_path / "m.gguf"
    Gguf(path=str(place)).write(model, place)
    tensors = {tensor.name: tensor for tensor in package.GGUFReader(place).tensors}
    for entry in layout.entries(model):
        kind = layout.kind_of(entry, "f16")
        assert tensors[entry.name].tensor_type.name == kind
        if kind == f"Q{bits}_0":
            got = package.quants.dequantize(tensors[entry.name].data, tensors[entry.name].tensor_type)
            rows = layout.returned(torch.from_numpy(np.array(got)), entry.heads)
            assert torch.equal(rows, entry.module.dense())


def test_the_file_says_what_a_reader_needs(tmp_path: Path) -> None:
    model, place = llama(), tmp_path / "m.gguf"
    Gguf(path=str(place), type="q4_0").write(model, place)
    reader = package.GGUFReader(place)
    field = {name: value.contents() for name, value in reader.fields.items()}
    vocab = model.module("embedding").vocab
    assert field["general.architecture"] == "llama"
    assert field["llama.attention.head_count_kv"] == 2
    assert len(field["tokenizer.ggml.tokens"]) == vocab
    assert field["tokenizer.ggml.tokens"][-1] == f"[PAD{vocab - 1}]"
    assert field["tokenizer.ggml.pre"] == "gpt-2"
    assert field["tokenizer.chat_template"] == "{{ messages }}"
    assert field["tokenizer.ggml.tokens"][field["tokenizer.ggml.eos_token_id"]] == "<|end|>"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in kinds


def test_reading_back_gives_the_weights(tmp_path: Path) -> None:
    model, place = llama(), tmp_path / "m.gguf"
    Gguf(path=str(place)).write(model, place)
    for name, tensor in stored(place, model).materialize().tensors().items():
        assert torch.equal(tensor, tensor.half().float()) or "norm" in name
        assert torch.allclose(tensor, model.tensors()[name], atol=1e-3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: llama(architecture="gpt2"), "the architecture gpt2"),
        (lambda: packed(3), "3 bits"),
        (lambda: packed(4, group=16), "groups of 16"),
        (lambda: packed(4, scheme="asymmetric"), "symmetric"),
        (lambda: llama(window=8), "window of 8"),
        (lambda: llama(cap=5.0), "a cap"),
    ],
)
def test_what_it_cannot_express_is_named(model: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(EffcError) as caught:
        Gguf(path=str(tmp_path / "m.gguf")).publish(model())
    assert all(item.code == "E553" for item in caught.value.diagnostics)
    assert words in caught.value.diagnostics[0].notes[0]
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_divide_are_refused_only_for_blocks() -> None:
    odd = llama(head_dim=12)
    assert not Gguf(path="m.gguf").refuses(odd)
    (problem,) = Gguf(path="m.gguf", type="q8_0").refuses(odd)
    assert "rows of 48" in problem.notes[0]


def test_a_tokenizer_it_cannot_hold_is_refused() -> None:
    model = llama()
    model.tokenizer = tokenizer(pre_tokenizers.Whitespace())
    (problem,) = Gguf(path="m.gguf").refuses(model)
    assert "splits text" in problem.notes[0]
    model.tokenizer = None
    assert "no tokenizer.json" in Gguf(path="m.gguf").refuses(model)[0].notes[0]


@pytest.mark.claim
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_the_zoo_model_continues_with_the_same_tokens(kind: str, tmp_path: Path) -> None:
    verdict = Gguf(path=str(tmp_path / "pylm.gguf"), type=kind).publish(load("zoo:pylm"))
    assert verdict.greedy == 1.0
