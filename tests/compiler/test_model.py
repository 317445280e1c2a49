"""A model's logits do not depend on padding, packing, caching or batch mates; its weights load lazily."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.cost import count
from effc.compiler.model import Model
from effc.compiler.step import Cache
from effc.compiler.weights import resident
from effc.specs.diagnostic import EffcError

Ids = Callable[..., torch.Tensor]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit_of_a_token(decoder: Model, ids: Ids, side: str) -> None:
    short, long = ids(decoder, 1, 5, seed=2), ids(decoder, 1, 9)
    pad = torch.zeros(1, 4, dtype=torch.long)
    row = torch.cat((pad, short) if side == "left" else (short, pad), 1)
    mask = torch.tensor([[0] * 4 + [1] * 5 if side == "left" else [1] * 5 + [0] * 4, [1] * 9])
    both = decoder(torch.cat((row, long)), attention_mask=mask)
    torch.testing.assert_close(both[0][mask[0].bool()], decoder(short)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], decoder(long)[0], rtol=1e-4, atol=1e-4)


def test_a_packed_row_equals_its_parts(decoder: Model, ids: Ids) -> None:
    a, b = ids(decoder, 1, 5, seed=2), ids(decoder, 1, 6, seed=3)
    segments = torch.tensor([[0] * 5 + [1] * 6])
    both = torch.cat((a, b), 1)
    packed = decoder(both, step=decoder.step(both, segments=segments))
    torch.testing.assert_close(packed[:, :5], decoder(a), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[:, 5:], decoder(b), rtol=1e-4, atol=1e-4)


def test_cached_steps_equal_the_full_run(decoder: Model, ids: Ids) -> None:
    x = ids(decoder, 3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :3] = 0
    full, cache = decoder(x, mask), Cache(9)
    parts = [decoder(x[:, :4], step=decoder.step(x[:, :4], mask[:, :4], cache))]
    parts += [decoder(x[:, 4:7], step=decoder.step(x[:, 4:7], mask[:, :7], cache))]
    parts += [
        decoder(x[:, i : i + 1], step=decoder.step(x[:, i : i + 1], mask[:, : i + 1], cache)) for i in (7, 8)
    ]
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], full[mask.bool()], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="9 slots, 10 are needed"):
        decoder(x[:, :1], step=decoder.step(x[:, :1], None, cache))


def test_an_encoder_sees_both_ways_but_no_padding(made: Callable[[str], Model], ids: Ids) -> None:
    model = made("bert")
    x = ids(model, 1, 6)
    padded = torch.cat((x, torch.zeros(1, 3, dtype=torch.long)), 1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    torch.testing.assert_close(model(padded, mask)[:, :6], model(x), rtol=1e-4, atol=1e-4)
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % 61
    assert not torch.allclose(model(changed)[0, 0], model(x)[0, 0])
    types = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert not torch.allclose(model(x, token_types=types), model(x))


def test_float64_runs_and_agrees_with_float32(family: Model, ids: Ids) -> None:
    x = ids(family)
    wide = family.clone()
    for name, tensor in wide.tensors().items():
        wide.place(name, tensor.double())
    y = wide(x.double() if x.is_floating_point() else x)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), family(x), rtol=1e-3, atol=1e-3)


def test_weights_load_when_asked_and_can_be_given_back(tiny: Model, ids: Ids) -> None:
    x = ids(tiny)
    want = tiny(x)
    lazy = tiny.clone()
    lazy.weights = {name: resident(t) for name, t in tiny.tensors().items()}
    lazy.release()
    assert lazy.is_meta
    assert not tiny.is_meta
    lazy.materialize(["embedding", "layers.0"])
    loaded = [n for n, t in lazy.tensors().items() if not t.is_meta]
    assert all(n.startswith(("embedding.", "layers.0.")) for n in loaded)
    assert len(loaded) == 10
    assert torch.equal(lazy.materialize()(x), want)
    lazy.release(["layers.1"])
    del lazy.weights["layers.1.mlp.up.weight"]
    with pytest.raises(EffcError, match=r"no weights for `layers\.1\.mlp\.up\.weight`"):
        lazy.materialize()


def test_a_source_of_another_shape_is_refused(tiny: Model) -> None:
    tiny.weights = {"norm.weight": resident(torch.ones(3))}
    tiny.place("norm.weight", torch.empty(32, device="meta"))
    with pytest.raises(EffcError, match=r"expected \[32\]"):
        tiny.materialize()


def test_a_clone_shares_storage_and_nothing_else(tiny: Model) -> None:
    twin = tiny.clone()
    for name, tensor in tiny.tensors().items():
        assert twin.tensors()[name].data_ptr() == tensor.data_ptr()
        assert twin.tensors()[name] is not tensor
    assert twin.ties() == tiny.ties() == {"head.weight": "embedding.weight"}
    twin.place("embedding.weight", torch.zeros(61, 32))
    assert twin.module("head").weight.abs().max() == 0
    assert tiny.module("head").weight.abs().max() > 0


def test_names_carry_roles_and_layers(tiny: Model) -> None:
    names = tiny.names()
    assert (names[0].path, names[0].role, names[0].layer) == ("embedding", "embedding", None)
    assert [n.path for n in names if n.role == "mlp.up"] == [f"layers.{i}.mlp.up" for i in range(3)]
    assert tiny.paths("attention.q") == [f"layers.{i}.attention.q" for i in range(3)]
    assert tiny.layers == 3
    assert names[-1].path == "head"


def test_seventy_billion_parameters_are_built_in_a_moment() -> None:
    start = time.perf_counter()
    d = {"dtype": "bfloat16"}

    def layer() -> dict[str, torch.nn.Module]:
        rope = {"rope_type": "default", "rope_theta": 500000.0}
        attention = Attention(width=8192, heads=64, kv_heads=8, head_dim=128, rope=rope, dtype="bfloat16")
        mlp = MLP(width=8192, hidden=28672, dtype="bfloat16")
        return {
            "norm1": Norm(width=8192, **d),
            "attention": attention,
            "norm2": Norm(width=8192, **d),
            "mlp": mlp,
        }

    head = Linear(in_features=8192, out_features=128256, dtype="bfloat16")
    embedding = Embedding(vocab=128256, width=8192, dtype="bfloat16")
    model = Model(assemble(embedding, [layer() for _ in range(80)], Norm(width=8192, **d), head))
    assert time.perf_counter() - start < 5
    cost = count(model, mean=1024)
    per_block = 8192 * 128 * (2 * 64 + 2 * 8) + 3 * 8192 * 28672
    assert cost.params == 80 * (per_block + 2 * 8192) + 2 * 128256 * 8192 + 8192
    assert cost.bytes == 2 * cost.params
    assert cost.flops_per_token == 80 * (2 * per_block + 4 * 1024 * 8192) + 2 * 128256 * 8192
    assert cost.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2
