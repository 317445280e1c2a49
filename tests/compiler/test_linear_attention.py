"""Blocks with a recurrent state: ops, padding, packing, caches, costs and gradients, for every form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effc.compiler import graph_json
from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm, Unit
from effc.compiler.blocks.gated_linear_attention import GatedLinearAttention
from effc.compiler.blocks.lact_attention import LactAttention
from effc.compiler.blocks.liger_attention import LigerAttention
from effc.compiler.blocks.para_rnn import ParaRNN
from effc.compiler.cost import cache_bytes, count
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.probe import widened
from effc.compiler.step import Cache, Step
from effc.runtime.generate import generate

from .conftest import ROPE, D, V, fill

OWN = {"width": D, "heads": 4, "key_dim": 4, "value_dim": 8, "gate_rank": 3, "chunk": 8, "sub": 4}
GIVEN = {"width": D, "heads": 4, "kv_heads": 2, "head_dim": 8, "rope": ROPE, "chunk": 8, "sub": 4}
LEARNS = {k: v for k, v in GIVEN.items() if k != "sub"} | {"window": 6, "chunk": 5, "fast_heads": 2}
MAKES: dict[str, tuple[type[Unit], dict[str, Any]]] = {
    "own": (GatedLinearAttention, OWN),
    "own, scalar": (GatedLinearAttention, OWN | {"gating": "scalar", "out_gate": "none"}),
    "gla": (LigerAttention, GIVEN | {"window": 0}),
    "gla, window": (LigerAttention, GIVEN | {"window": 5, "mix": 0.3}),
    "gla, normed": (LigerAttention, GIVEN | {"window": 5, "qk_norm": 1e-6, "bias": True, "cap": 5.0}),
    "hgrn2, window": (LigerAttention, GIVEN | {"window": 5, "form": "hgrn2"}),
    "gsa": (LigerAttention, GIVEN | {"window": 0, "form": "gsa"}),
    "gsa, window": (LigerAttention, GIVEN | {"window": 5, "form": "gsa", "slots": 4}),
    "lact": (LactAttention, LEARNS | {"rule": "momentum", "low_rank": 2}),
    "lact, sgd": (LactAttention, LEARNS | {"rule": "sgd", "inner": 0.5}),
    "gru": (ParaRNN, {"width": D, "iters": 12, "tol": 1e-11}),
    "lstm": (ParaRNN, {"width": D, "cell": "lstm_cifg", "jac": "block2", "iters": 12, "tol": 1e-11}),
    "window alone": (LigerAttention, GIVEN | {"window": 5, "mix": 1.0}),
}


def make(name: str) -> Unit:
    cls, arguments = MAKES[name]
    return cls(**arguments)


def decoder(name: str) -> Model:
    def layer() -> dict[str, nn.Module]:
        return {
            "norm1": Norm(width=D),
            "attention": make(name),
            "norm2": Norm(width=D),
            "mlp": MLP(width=D, hidden=48),
        }

    head = Linear(in_features=D, out_features=V)
    return fill(Model(assemble(Embedding(vocab=V, width=D), [layer(), layer()], Norm(width=D), head)))


@pytest.fixture(params=MAKES)
def model(request: pytest.FixtureRequest) -> Model:
    return decoder(request.param)


def drawn(rows: int, length: int) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_expansion_equals_forward(model: Model, padded: bool) -> None:
    mask = torch.ones(3, 13, dtype=torch.bool)
    if padded:
        mask[0, :5] = False
        mask[2, 9:] = False
    block: Any = model.module("layers.1.attention")
    x = torch.randn(3, 13, D, generator=torch.Generator().manual_seed(3))
    step = model.step(drawn(3, 13), mask)
    got, _ = evaluate(expand(block), block, x, step)
    torch.testing.assert_close(got, block(x, step), rtol=1e-5, atol=1e-5)


def test_the_cache_is_a_value(model: Model) -> None:
    block: Any = model.module("layers.1.attention")
    x = torch.randn(2, 23, D, generator=torch.Generator().manual_seed(3))
    graph, past, cache, parts = expand(block), None, Cache(23), []
    for start, end in ((0, 11), (11, 13), (13, 14), (14, 22), (22, 23)):
        step = model.step(drawn(2, end - start), None, cache)
        y, past = evaluate(graph, block, x[:, start:end], step, past)
        torch.testing.assert_close(y, block(x[:, start:end], step), rtol=1e-4, atol=1e-4)
        cache.filled = end
        parts.append(y)
    close(torch.cat(parts, 1), block(x, model.step(drawn(2, 23))))


def test_cached_tokens_equal_the_whole(model: Model) -> None:
    wide, ids = widened(model), drawn(2, 30)
    whole, cache = wide(ids), Cache(30)
    parts = [wide(ids[:, a:b], step=wide.step(ids[:, a:b], None, cache)) for a, b in ((0, 9), (9, 12))]
    parts += [wide(ids[:, t : t + 1], step=wide.step(ids[:, t : t + 1], None, cache)) for t in range(12, 30)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(model: Model, side: str) -> None:
    ids, mask = drawn(2, 17), torch.ones(2, 17, dtype=torch.long)
    short = slice(6, None) if side == "left" else slice(None, 11)
    mask[0] = 0
    mask[0, short] = 1
    together = model(ids, mask)
    close(together[0, short], model(ids[:1, short])[0])
    close(together[1], model(ids[1:])[0])


def test_left_padded_rows_decode_as_if_alone(model: Model) -> None:
    ids, mask = drawn(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :6] = 0
    together = generate(model, ids, mask, max_new_tokens=12)
    assert torch.equal(together[0, 6:], generate(model, ids[:1, 6:], max_new_tokens=12)[0])
    assert torch.equal(together[1], generate(model, ids[1:], max_new_tokens=12)[0])


def test_packed_documents_do_not_see_each_other(model: Model) -> None:
    ids = drawn(1, 21)
    segments = torch.tensor([[0] * 6 + [1] * 10 + [2] * 5])
    packed = model(ids, step=model.step(ids, segments=segments))
    alone = torch.cat([model(ids[:, a:b]) for a, b in ((0, 6), (6, 16), (16, 21))], 1)
    close(packed, alone)


def test_no_token_sees_another_row_or_what_comes(model: Model) -> None:
    ids = drawn(2, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % V
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[1], before[1])
    torch.testing.assert_close(after[0, :7], before[0, :7])
    assert not torch.allclose(after[0, 8], before[0, 8])


@pytest.mark.parametrize("tokens", [3, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_predicted_cache_is_the_measured_one(model: Model, tokens: int, dtype: torch.dtype) -> None:
    cast = model.clone().to(dtype)
    cache, ids = Cache(tokens), drawn(1, tokens)
    with torch.no_grad():
        for t in range(tokens):
            cast(ids[:, t : t + 1], step=cast.step(ids[:, t : t + 1], None, cache))
    assert cache.bytes == cache_bytes(cast, tokens)
    cost = count(cast)
    assert cost.kv_bytes_per_token == 0
    assert cost.state_bytes == cache_bytes(cast, 10**6)


def test_a_block_loads_equal(model: Model) -> None:
    back = graph_json.from_json(graph_json.to_json(model))
    for name, tensor in model.tensors().items():
        back.place(name, tensor.detach())
    ids = drawn(2, 9)
    assert torch.equal(back(ids), model(ids))
    assert count(back, 8) == count(model, 8)


@pytest.mark.parametrize("name", ["own", "gla, window", "gsa, window"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    block = make(name)
    dice = torch.Generator().manual_seed(0)
    tensors = {}
    for path, tensor in block.named_parameters():
        tensors[path] = torch.randn(tensor.shape, generator=dice, dtype=torch.float64).mul_(0.3)
        tensors[path].requires_grad_(path in ("k.weight", "forget_up.weight"))
    x = torch.randn(1, 9, D, generator=dice, dtype=torch.float64, requires_grad=True)
    step = Step(torch.arange(9)[None])

    def run(x: Tensor) -> Any:
        return torch.func.functional_call(block, tensors, (x, step))

    assert torch.autograd.gradcheck(run, (x,), fast_mode=True)
    run(x).sum().backward()
    assert all(bool(t.grad.abs().sum() > 0) for t in tensors.values() if t.grad is not None)


def test_a_window_over_all_is_the_attention_itself() -> None:
    """Bit for bit: the same products in the same order."""
    attention = Attention(width=D, heads=4, kv_heads=2, head_dim=8, rope=ROPE)
    liger = LigerAttention(width=D, heads=4, kv_heads=2, head_dim=8, rope=ROPE, window=40, mix=1.0)
    dice = torch.Generator().manual_seed(0)
    for name in ("q", "k", "v", "o"):
        weight = nn.Parameter(torch.randn(getattr(attention, name).weight.shape, generator=dice))
        getattr(attention, name).weight = getattr(liger, name).weight = weight
    x, step = torch.randn(2, 40, D, generator=dice), Step(torch.arange(40).expand(2, 40))
    assert torch.equal(liger(x, step), attention(x, step))


def test_a_window_is_that_of_attention_with_a_window() -> None:
    attention = Attention(width=D, heads=4, kv_heads=2, head_dim=8, rope=ROPE, window=300)
    liger = LigerAttention(width=D, heads=4, kv_heads=2, head_dim=8, rope=ROPE, window=300, mix=1.0)
    dice = torch.Generator().manual_seed(0)
    for name in ("q", "k", "v", "o"):
        weight = nn.Parameter(torch.randn(getattr(attention, name).weight.shape, generator=dice))
        getattr(attention, name).weight = getattr(liger, name).weight = weight
    x, step = torch.randn(2, 700, D, generator=dice), Step(torch.arange(700).expand(2, 700))
    torch.testing.assert_close(liger(x, step), attention(x, step))


@pytest.mark.parametrize(
    ("cls", "wrong", "said"),
    [
        (GatedLinearAttention, OWN | {"gate_div": 0.0}, "gate_div must be above 0"),
        (GatedLinearAttention, OWN | {"chunk": 10}, "chunk is a multiple of sub"),
        (GatedLinearAttention, OWN | {"heads": 0}, "none may be 0"),
        (LigerAttention, GIVEN | {"window": 4, "slots": 3, "form": "gsa"}, "do not divide over 3 slots"),
        (LigerAttention, GIVEN | {"window": 4, "mix": 1.5}, "mix 1.5 must be 0 to 1"),
        (LigerAttention, GIVEN | {"window": 4, "kv_heads": 3}, "do not divide over 3 key heads"),
    ],
)
def test_what_no_block_can_be_is_refused(cls: type[Unit], wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cls(**wrong)
