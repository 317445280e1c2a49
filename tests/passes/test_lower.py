"""Lowering: the C program of a model computes what the model computes, however the work is shared out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.kernels.cpu.isa import Isa, available
from effc.kernels.program.call import Split
from effc.kernels.program.emit import emit
from effc.passes.lower.decoder import Unlowered, lower
from effc.passes.quantize.rtn import RTN
from effc.runtime.decoder import ProgramDecoder, TorchDecoder, decoder, ready
from effc.runtime.generate import generate
from effc.specs.diagnostic import EffcError
from tests.compiler.conftest import FAMILIES, V, fill

LENGTH, BATCH = 9, 3


def padded() -> tuple[Tensor, Tensor]:
    """ids and mask [B, T] of sequences of 9, 5 and 8 tokens, padded on the left."""
    ids = torch.randint(0, V, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, :4], mask[2, :1] = False, False
    return ids, mask


def quantized(bits: int = 4, **more: object) -> Model:
    """A llama with packed weights; its head is 8 bits and tied to the table."""
    rules = [{"on": "head", "bits": 8}, {"on": "layers[0]", "bits": 8}]
    method = RTN.model_validate({"bits": bits, "group": 16, "rules": rules} | more)
    rw = Rewriter(fill(FAMILIES["llama"]()), method.kind)
    method.rewrite(rw)
    return rw.done()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "neox"])
def test_a_program_gives_the_logits_of_its_model(name: str) -> None:
    model = fill(FAMILIES[name]())
    ids, mask = padded()
    ours = ProgramDecoder(ready(model, threads=2), BATCH, LENGTH + 6)
    due = TorchDecoder(model, LENGTH + 6)
    with torch.inference_mode():
        pairs = [(ours.prefill(ids, mask), due.prefill(ids, mask))]
        for i in range(6):
            token = (ids[:, i] + 7) % V
            pairs.append((ours.next(token), due.next(token)))
    for found, expected in pairs:
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_stay_near_their_dense_values(bits: int) -> None:
    """Activations are bytes, so logits differ by their rounding and by no more."""
    model = quantized(bits)
    ids, mask = padded()
    found = ProgramDecoder(ready(model, threads=1), BATCH, LENGTH).prefill(ids, mask)
    with torch.inference_mode():
        due = TorchDecoder(model, LENGTH).prefill(ids, mask)
    assert 0 < float((found - due).norm()) <= 0.03 * float(due.norm())


def test_bits_do_not_depend_on_members_rows_or_instructions() -> None:
    """A prompt in one call or token by token, by one member or two: the same logits, on every set."""
    model = quantized()
    ids, _ = padded()
    seen = []
    for isa in available():
        for threads in (1, 2):
            made = ready(model, isa, threads)
            whole = ProgramDecoder(made, BATCH, LENGTH).prefill(ids, None)
            steps = ProgramDecoder(made, BATCH, LENGTH)
            last = steps.prefill(ids[:, :1], None)
            for i in range(1, LENGTH):
                last = steps.next(ids[:, i])
            assert torch.equal(whole, last), (isa, threads)
            seen.append((isa, whole))
    for isa in available():
        first, second = (logits for found, logits in seen if found is isa)
        assert torch.equal(first, second)


def test_members_that_meet_too_rarely_would_be_seen() -> None:
    """Many tokens by two members again and again: a missing barrier shows as another result now and then."""
    model = quantized()
    ids = torch.randint(0, V, (2, 40), generator=torch.Generator().manual_seed(1))
    due = ProgramDecoder(ready(model, threads=1), 2, 40).prefill(ids, None)
    for _ in range(20):
        assert torch.equal(ProgramDecoder(ready(model, threads=2), 2, 40).prefill(ids, None), due)


def test_linears_are_laid_together_and_residuals_stay_in_place() -> None:
    plan = lower(quantized()).plan
    layer = [call for call in plan.calls if call.layer == 1]
    assert [call.op for call in layer] == [
        "norm", "quantize", "quant_linear", "write_cache", "attend", "quantize", "quant_linear",
        "norm", "quantize", "quant_linear", "quantize", "quant_linear",
    ]  # fmt: skip
    assert layer[2].paths == tuple(f"layers.1.attention.{n}" for n in "qkv")
    assert {p.rsplit(".", 1)[1] for p in layer[9].paths} == {"gate", "up"}
    assert all(
        call.writes[0] in plan.aliases
        for call in layer
        if call.split is Split.ITEMS and "mlp.down" in str(call.paths)
    )
    text, tensors = emit(plan)
    assert text.count("static void part_") == 4  # the table, a layer of 8 bits, one of 4, the head
    assert len(tensors) == len([t for call in plan.calls for t in call.tensors])


def test_generation_takes_the_program_for_packed_weights() -> None:
    model = quantized(8)
    ids, mask = padded()
    assert isinstance(decoder(model, 1, 8), ProgramDecoder)
    assert isinstance(decoder(fill(FAMILIES["llama"]()), 1, 8), TorchDecoder)
    out = generate(model, ids, mask, max_new_tokens=5)
    due = generate(model, ids, mask, max_new_tokens=5, kernels="c")
    assert torch.equal(out, due)
    assert out.shape == (BATCH, LENGTH + 5)


@pytest.mark.parametrize(
    ("name", "words"),
    [("mixtral", "no C kernel"), ("bert", "not causal"), ("dynamic", "change with"), ("vit", "no C kernel")],
)
def test_what_has_no_program_says_so_and_runs_in_torch(name: str, words: str) -> None:
    model = fill(FAMILIES[name]())
    with pytest.raises(Unlowered, match=words):
        ready(model)
    with pytest.raises(EffcError, match="E503"):
        decoder(model, 1, 8, kernels="c")
    assert isinstance(decoder(model, 1, 8), TorchDecoder)


def test_odd_bits_are_refused_in_words() -> None:
    with pytest.raises(Unlowered, match="5 bits"):
        lower(quantized(5))
    assert Isa.PORTABLE in available()
