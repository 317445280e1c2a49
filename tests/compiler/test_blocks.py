"""Blocks: closed-form costs equal what torch counts; rotary scalings; isolation of tokens; bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from effc.compiler.assemble import assemble
from effc.compiler.blocks import Attention, Embedding, Linear, MoE, Unit
from effc.compiler.blocks.attention import AttentionForm
from effc.compiler.blocks.echo_attention import LeadAttention
from effc.compiler.blocks.gated_attention import GatedAttention
from effc.compiler.blocks.rope import checked, frequencies, rotated
from effc.compiler.blocks.skipping import SkipAttention
from effc.compiler.blocks.streams import PrefixAttention
from effc.compiler.blocks.unit import arguments
from effc.compiler.cost import count
from effc.compiler.model import Model

Ids = Callable[..., torch.Tensor]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "neox", "bert"])
def test_flops_are_those_that_torch_counts(made: Callable[[str], Model], ids: Ids, name: str) -> None:
    model, length = made(name), 8
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids(model, 1, length))
    assert counter.get_total_flops() == length * count(model, mean=length).flops_per_token


def test_a_window_bounds_attention_flops(made: Callable[[str], Model]) -> None:
    model = made("gemma2")
    near, far = count(model, mean=4).flops_per_token, count(model, mean=104).flops_per_token
    assert far - near == 2 * 4 * 100 * 4 * 8  # two of four layers see more than 4 keys


def test_experts_count_only_where_they_run(made: Callable[[str], Model]) -> None:
    cost = count(made("mixtral"), mean=0)
    attention = 2 * 32 * 8 * (4 + 4 + 2 + 2)
    per_layer = attention + 2 * 32 * 4 + 2 * 6 * 32 * 40
    assert cost.flops_per_token == 2 * per_layer + 2 * 32 * 61


def test_bytes_follow_the_dtype_and_ties_count_once(tiny: Model) -> None:
    wide = count(tiny)
    assert wide.bytes == 4 * wide.params
    assert wide.kv_bytes_per_token == 2 * 3 * 2 * 8 * 4
    half = count(tiny.clone().to(torch.bfloat16))
    assert (half.params, half.bytes, half.kv_bytes_per_token) == (
        wide.params,
        wide.bytes // 2,
        wide.kv_bytes_per_token // 2,
    )
    assert count(tiny) == wide


def test_a_token_never_reaches_another_row_or_its_past(decoder: Model, ids: Ids) -> None:
    x = ids(decoder, 2, 7)
    changed = x.clone()
    changed[0, 4] = (x[0, 4] + 1) % 61
    before, after = decoder(x), decoder(changed)
    torch.testing.assert_close(after[1], before[1])
    torch.testing.assert_close(after[0, :4], before[0, :4])
    assert not torch.allclose(after[0, 4:], before[0, 4:])


def test_a_window_hides_what_lies_far_back() -> None:
    attention = Attention(width=8, heads=2, kv_heads=2, head_dim=4, window=3)
    gm = assemble(nn.Identity(), [{"attention": attention}], None)
    model = Model(gm)
    for name, tensor in model.tensors().items():
        model.place(name, torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    far, near = x.clone(), x.clone()
    far[0, 2] += 1
    near[0, 3] += 1
    step = model.step(x[..., 0])
    want = model.gm(x, step)[0, 5]
    torch.testing.assert_close(model.gm(far, step)[0, 5], want)
    assert not torch.allclose(model.gm(near, step)[0, 5], want)


def test_twelve_wide_heads_at_a_quarter_turn_four_dimensions() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    assert rotated(rope, 12) == 4
    assert frequencies(rope, 12, torch.ones(1, 1))[0].tolist() == [[1.0, pytest.approx(10000 ** (-2 / 3))]]


def test_rotary_scalings_by_their_formulas() -> None:
    theta, length = 10000.0, torch.tensor([[8], [64]])
    plain = theta ** (-torch.arange(0, 8, 2) / 8)

    def at(**more: Any) -> tuple[torch.Tensor, float]:
        return frequencies(checked({"rope_theta": theta} | more, 8), 8, length)

    torch.testing.assert_close(at(rope_type="linear", factor=4.0)[0][0], plain / 4)
    rows = at(rope_type="dynamic", factor=2.0, max_position_embeddings=32)[0]
    torch.testing.assert_close(rows[0], plain)
    base = theta * (2 * 64 / 32 - 1) ** (8 / 6)
    torch.testing.assert_close(rows[1], base ** (-torch.arange(0, 8, 2) / 8))
    llama3 = at(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    )[0][0]
    torch.testing.assert_close(llama3[0], plain[0])  # a wavelength below 64 / 4 stays
    torch.testing.assert_close(llama3[3], plain[3] / 8)  # one above 64 / 1 is stretched
    scaled, factor = at(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
    assert factor == pytest.approx(0.1 * 1.3862943611 + 1)
    torch.testing.assert_close(scaled[0][0], plain[0])
    torch.testing.assert_close(scaled[0][3], plain[3] / 4)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "MoE", "width": 8, "hidden": 8, "experts": 2, "active": 3}, "3 active experts of 2"),
        (
            {"type": "PatchEmbed", "image": 10, "patch": 4, "channels": 3, "width": 8},
            "whole number of patches",
        ),
        ({"type": "Softcap", "cap": 0.0}, "above 0"),
        ({"type": "MLP", "width": 8, "hidden": 8, "activation": "swish"}, "activation cannot be 'swish'"),
        ({"type": "Linear", "in_features": 8}, "missing"),
        ({"type": "Linear", "in_features": 8, "out_features": 8, "bias": 1}, "bias cannot be '1'"),
        ({"type": "Norm", "width": 8, "eps": float("inf")}, "eps cannot be"),
    ],
)
def test_bad_arguments_are_refused(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Unit.from_spec(spec)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4},
        {"rope_type": "spiral", "rope_theta": 1e4},
        {"rope_theta": -1.0},
        {"rope_theta": 1e4, "rope_type": "linear", "factor": "2"},
        {"rope_theta": 1e4, "rope_type": "linear", "factor": 0},
        {"rope_theta": 1e4, "partial_rotary_factor": 2.0},
        {"rope_theta": 1e4, "partial_rotary_factor": 0.1},
        {"rope_theta": 1.0, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        {
            "rope_theta": 1e4,
            "rope_type": "longrope",
            "short_factor": [1.0] * 3,
            "long_factor": [1.0] * 3,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_bad_rope_parameters_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rope|number"):
        Attention(width=8, heads=2, kv_heads=2, head_dim=4, rope=rope)


def test_a_unit_equals_the_one_its_spec_builds(family: Model) -> None:
    for _, unit in family.units():
        twin = Unit.from_spec(unit.spec())
        assert twin.spec() == unit.spec()
        assert [(n, t.shape, t.dtype) for n, t in twin.named_parameters()] == [
            (n, t.shape, t.dtype) for n, t in unit.named_parameters()
        ]


def test_the_router_takes_the_two_best_and_renormalizes() -> None:
    moe = MoE(width=4, hidden=4, experts=3, active=2)
    moe.router.weight = nn.Parameter(torch.eye(3, 4))
    weights, chosen = moe.route(torch.tensor([[2.0, 1.0, 0.0, 0.0]]))
    assert chosen.tolist() == [[0, 1]]
    e = torch.tensor([2.0, 1.0]).exp()
    torch.testing.assert_close(weights[0], e / e.sum())


def test_hooks_stay_with_the_model_they_were_put_on(tiny: Model, ids: Ids) -> None:
    seen: list[int] = []
    twin = tiny.clone()
    tiny.module("layers.0.mlp.up").register_forward_hook(lambda *_: seen.append(1))
    twin(ids(twin))
    tiny.clone()(ids(tiny))
    assert not seen
    tiny(ids(tiny))
    assert seen == [1]


def test_unused_names_do_not_slip_in() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        Embedding(vocab=4, width=4, positoins=3)  # type: ignore[call-arg]
    assert Linear(in_features=2, out_features=3).weight.is_meta


def test_blocks_that_extend_attention_take_all_that_it_takes() -> None:
    form = arguments(Attention)
    assert AttentionForm.__annotations__.keys() == form.keys()
    for block in (GatedAttention, LeadAttention, PrefixAttention, SkipAttention):
        assert form.items() <= arguments(block).items()
    given = {"type": "GatedAttention", "width": 8, "heads": 2, "head_dim": 4}
    with pytest.raises(ValueError, match="kv_heads"):
        Unit.from_spec(given)
    with pytest.raises(ValueError, match="cap cannot be"):
        Unit.from_spec(given | {"kv_heads": 2, "cap": "low"})
