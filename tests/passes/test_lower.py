"""Lowering: the C program of a model computes what the model computes, however the work is shared out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.kernels.cpu.isa import Isa, available
from effc.kernels.cpu.turns import barriers, turns
from effc.kernels.program.call import ROWS as MOST
from effc.kernels.program.call import Split
from effc.kernels.program.emit import emit
from effc.kernels.program.run import Session
from effc.passes.lower.decoder import Unlowered, lower
from effc.passes.quantize.rtn import RTN
from effc.runtime.decoder import ProgramDecoder, Ready, TorchDecoder, decoder, ready
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


ROWS = {"many": [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], "few": [(0, 3), (0, 4)]}
"""(slot, position) of the rows of two calls: members share rows of the first, and do all of the second."""
WANTED = {"many": [4, 3, 2, 1, 0], "few": [1]}


def wide() -> Model:
    """A llama of which each member has a part of everything: blocks of channels, kv heads, rows."""

    def layer(_: int) -> dict[str, nn.Module]:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        attention = Attention(width=128, heads=6, kv_heads=3, head_dim=32, rope=rope)
        mlp = MLP(width=128, hidden=192)
        return {"norm1": Norm(width=128), "attention": attention, "norm2": Norm(width=128), "mlp": mlp}

    layers = [layer(i) for i in range(2)]
    head = Linear(in_features=128, out_features=200)
    model = fill(Model(assemble(Embedding(vocab=200, width=128), layers, Norm(width=128), head)))
    rw = Rewriter(model, "quantize.rtn")
    RTN.model_validate({"bits": 4, "group": 64, "rules": [{"on": "head", "bits": 8}]}).rewrite(rw)
    return rw.done()


@pytest.mark.parametrize("call", ["many", "few"])
def test_every_barrier_is_needed_and_a_missing_one_is_seen(call: str) -> None:
    """Members in turns, forwards and backwards: right with all barriers, wrong without any one of them."""
    made = ready(wide(), threads=2)
    due, count = in_turns(made)
    backwards, _ = in_turns(made, backwards=True)
    assert torch.equal(backwards, due)
    unseen = [
        k for k in range(count[call])
        if all(torch.equal(in_turns(made, order, call, k)[0], due) for order in (False, True))
    ]  # fmt: skip
    # Rows of the table are shared out as the first layer shares them, unless every member does all of them.
    assert unseen == ([0] if call == "many" else [])
    assert count[call] > 10


def in_turns(
    made: Ready, backwards: bool = False, call: str = "", without: int = -1
) -> tuple[Tensor, dict[str, int]]:
    """Logits and tokens of both calls, and the barriers of each; `call` does not keep one, `without`."""
    session = Session(made.program, made.attentions, 2, 8, 8)
    vocab = made.lowered.plan.vocab
    found, count = [], {}
    for name, rows in ROWS.items():
        slot, position = torch.tensor(rows).T.contiguous()
        wanted = torch.tensor(WANTED[name])
        for memory in (session.arena, session.own, session.best, session.where):
            memory.view(torch.uint8).fill_(0xFF)
        with turns(made.program.isa, backwards, without if name == call else -1) as crew:
            session.arguments.team = crew
            logits, chosen = torch.full((len(wanted), vocab), torch.nan), torch.full((len(wanted),), -1)
            session.step(position * 7 + slot, slot, position, wanted, logits, chosen)
            found += [logits, chosen[:, None]]
        count[name] = barriers(made.program.isa)
    return torch.cat([t.flatten() for t in found]), count


def test_a_step_chooses_the_next_token() -> None:
    """The lowest index among equals, whichever part of the row it stands in; a NaN before any number."""
    model = quantized()
    ids, mask = padded()
    for threads in (1, 2, 5):
        ours = ProgramDecoder(ready(model, threads=threads), BATCH, LENGTH + 2)
        assert torch.equal(ours.prefill(ids, mask).argmax(-1), ours.likeliest())
        for i in range(2):
            assert torch.equal(ours.next(ids[:, i]).argmax(-1), ours.likeliest())
    with torch.no_grad():
        model.module("norm").weight.zero_()  # all logits are 0
    ours = ProgramDecoder(ready(model, threads=2), BATCH, LENGTH)
    assert not ours.prefill(ids, mask).any()
    assert ours.likeliest().tolist() == [0, 0, 0]


def test_a_weight_that_is_changed_in_place_makes_a_new_program() -> None:
    model = quantized()
    ids, _ = padded()

    def logits() -> Tensor:
        return ProgramDecoder(ready(model, threads=1), BATCH, LENGTH).prefill(ids, None)

    before, first = logits(), ready(model, threads=1)
    assert ready(model, threads=1) is first
    tensors = model.tensors()
    packed = next(name for name in tensors if name.endswith("mlp.down.scales"))
    gains = next(name for name in tensors if name.endswith("norm2.weight"))
    for name, halve in (
        (packed, lambda t: t.mul_(0.5)),  # counted by torch
        (gains, lambda t: t.data.mul_(0.5)),  # not counted
    ):
        with torch.no_grad():
            halve(tensors[name])
        assert ready(model, threads=1) is not first
        after = logits()
        assert not torch.equal(after, before), name
        fresh = ProgramDecoder(ready(model.clone(), threads=1), BATCH, LENGTH)
        assert torch.equal(after, fresh.prefill(ids, None))
        before, first = after, ready(model, threads=1)


def test_windows_keep_a_ring_and_not_the_whole_sequence() -> None:
    """Memory is that of the window and one call; values are those of the whole sequence."""
    model = fill(FAMILIES["gemma2"]())
    windows = [spec.window for spec, _ in lower(model).attentions]
    assert None in windows
    length = 650
    ids = torch.randint(0, V, (1, length), generator=torch.Generator().manual_seed(2))
    ours, due = ProgramDecoder(ready(model, threads=2), 1, length + 3), TorchDecoder(model, length + 3)
    rooms = [cache.values.shape[2] for cache in ours.session.caches]
    whole, ring = 704, 64 * -(-(int(max(w for w in windows if w)) + MOST - 1) // 64)
    assert rooms == [whole if window is None else ring for window in windows]
    assert ring < whole
    with torch.inference_mode():
        pairs = [(ours.prefill(ids, None), due.prefill(ids, None))]
        pairs += [(ours.next(ids[:, i]), due.next(ids[:, i])) for i in range(3)]
    for found, expected in pairs:
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


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
    [("bert", "not causal"), ("dynamic", "change with"), ("vit", "no C kernel")],
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
