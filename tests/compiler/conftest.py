"""Small random models of every family's shape, built from blocks alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, MoE, Norm, PatchEmbed, Softcap
from effc.compiler.model import Model
from effc.compiler.sharing import tie

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
D, H, V = 32, 4, 61


def _attention(**more: Any) -> Attention:
    return Attention(**({"width": D, "heads": H, "kv_heads": H, "head_dim": 8, "rope": ROPE} | more))


def _layers(n: int, make: Callable[[int], dict[str, nn.Module]]) -> list[dict[str, nn.Module]]:
    return [make(i) for i in range(n)]


def llama() -> Model:
    def layer(_: int) -> dict[str, nn.Module]:
        mlp = MLP(width=D, hidden=48)
        return {
            "norm1": Norm(width=D),
            "attention": _attention(kv_heads=2),
            "norm2": Norm(width=D),
            "mlp": mlp,
        }

    head = Linear(in_features=D, out_features=V)
    gm = assemble(Embedding(vocab=V, width=D), _layers(3, layer), Norm(width=D), head)
    tie(gm, "head.weight", "embedding.weight")
    return Model(gm, architecture="llama", config={"hidden_size": D})


def qwen3() -> Model:
    def layer(_: int) -> dict[str, nn.Module]:
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        attention = _attention(kv_heads=1, bias=True, qk_norm=1e-6, rope=rope, head_dim=12)
        return {
            "norm1": Norm(width=D),
            "attention": attention,
            "norm2": Norm(width=D),
            "mlp": MLP(width=D, hidden=48),
        }

    head = Linear(in_features=D, out_features=V)
    return Model(assemble(Embedding(vocab=V, width=D), _layers(2, layer), Norm(width=D), head))


def stretched(form: dict[str, Any]) -> Model:
    """A llama whose rotary frequencies change once a row is longer than 6 tokens."""

    def layer(_: int) -> dict[str, nn.Module]:
        attention = _attention(kv_heads=2, rope={"rope_theta": 10000.0} | form)
        mlp = MLP(width=D, hidden=48)
        return {"norm1": Norm(width=D), "attention": attention, "norm2": Norm(width=D), "mlp": mlp}

    head = Linear(in_features=D, out_features=V)
    return Model(assemble(Embedding(vocab=V, width=D), _layers(2, layer), Norm(width=D), head))


def dynamic() -> Model:
    return stretched({"rope_type": "dynamic", "factor": 4.0, "max_position_embeddings": 6})


def longrope() -> Model:
    more = {"original_max_position_embeddings": 6, "max_position_embeddings": 24}
    lists = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0]}
    return stretched({"rope_type": "longrope"} | more | lists)


def gemma2() -> Model:
    def layer(i: int) -> dict[str, nn.Module]:
        attention = _attention(kv_heads=2, window=4 if i % 2 == 0 else None, cap=5.0, scale=0.3)
        norms: dict[str, nn.Module] = {
            n: Norm(width=D, offset=1.0) for n in ("norm1", "norm1_post", "norm2", "norm2_post")
        }
        return norms | {"attention": attention, "mlp": MLP(width=D, hidden=48, activation="gelu_tanh")}

    head = Linear(in_features=D, out_features=V)
    embedding = Embedding(vocab=V, width=D, scale=D**0.5)
    tail = [("softcap", Softcap(cap=3.0))]
    return Model(assemble(embedding, _layers(4, layer), Norm(width=D, offset=1.0), head, tail))


def gpt2() -> Model:
    def norm() -> Norm:
        return Norm(width=D, form="layer", eps=1e-5, bias=True)

    def layer(_: int) -> dict[str, nn.Module]:
        attention = _attention(rope=None, bias=True, bias_o=True)
        mlp = MLP(width=D, hidden=64, activation="gelu_tanh", gated=False, bias=True)
        return {"norm1": norm(), "attention": attention, "norm2": norm(), "mlp": mlp}

    head = Linear(in_features=D, out_features=V)
    return Model(assemble(Embedding(vocab=V, width=D, positions=40), _layers(2, layer), norm(), head))


def mixtral() -> Model:
    def layer(_: int) -> dict[str, nn.Module]:
        moe = MoE(width=D, hidden=40, experts=4, active=2)
        return {
            "norm1": Norm(width=D),
            "attention": _attention(kv_heads=2),
            "norm2": Norm(width=D),
            "moe": moe,
        }

    head = Linear(in_features=D, out_features=V)
    return Model(assemble(Embedding(vocab=V, width=D), _layers(2, layer), Norm(width=D), head))


def neox() -> Model:
    def norm() -> Norm:
        return Norm(width=D, form="layer", eps=1e-5, bias=True)

    def layer(_: int) -> dict[str, nn.Module]:
        rope = ROPE | {"partial_rotary_factor": 0.25}
        attention = _attention(head_dim=12, rope=rope, bias=True, bias_o=True)
        mlp = MLP(width=D, hidden=64, activation="gelu", gated=False, bias=True)
        return {"norm1": norm(), "attention": attention, "norm2": norm(), "mlp": mlp}

    head = Linear(in_features=D, out_features=V)
    return Model(assemble(Embedding(vocab=V, width=D), _layers(2, layer), norm(), head, order="parallel"))


def bert() -> Model:
    def norm() -> Norm:
        return Norm(width=D, form="layer", eps=1e-12, bias=True)

    def layer(_: int) -> dict[str, nn.Module]:
        attention = _attention(rope=None, bias=True, bias_o=True, causal=False)
        mlp = MLP(width=D, hidden=64, activation="gelu", gated=False, bias=True)
        return {"norm1": norm(), "attention": attention, "norm2": norm(), "mlp": mlp}

    embedding = Embedding(vocab=V, width=D, positions=40, types=2, norm_eps=1e-12, count_padding=True)
    return Model(assemble(embedding, _layers(2, layer), None, order="post"))


def vit() -> Model:
    def norm() -> Norm:
        return Norm(width=D, form="layer", eps=1e-12, bias=True)

    def layer(_: int) -> dict[str, nn.Module]:
        attention = _attention(rope=None, bias=True, bias_o=True, causal=False)
        mlp = MLP(width=D, hidden=64, activation="gelu", gated=False, bias=True)
        return {"norm1": norm(), "attention": attention, "norm2": norm(), "mlp": mlp}

    return Model(assemble(PatchEmbed(image=12, patch=4, channels=3, width=D), _layers(2, layer), norm()))


DECODERS = {f.__name__: f for f in (llama, qwen3, gemma2, gpt2, mixtral, neox)}
GENERATORS = DECODERS | {f.__name__: f for f in (dynamic, longrope)}
FAMILIES = GENERATORS | {f.__name__: f for f in (bert, vit)}


def fill(model: Model, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    """Random weights everywhere, norms and biases included, so that nothing hides behind a zero or a one."""
    stream = torch.Generator().manual_seed(seed)
    for name, tensor in model.tensors().items():
        scale = 0.3 if tensor.ndim > 1 else 0.2
        model.place(
            name, (torch.randn(tensor.shape, generator=stream) * scale + (tensor.ndim == 1) * 0.8).to(dtype)
        )
    return model


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Model:
    return fill(DECODERS[request.param]())


@pytest.fixture(params=GENERATORS)
def generator(request: pytest.FixtureRequest) -> Model:
    """Decoders and those whose cache goes stale as a row grows."""
    return fill(GENERATORS[request.param]())


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Model:
    return fill(FAMILIES[request.param]())


@pytest.fixture
def tiny() -> Model:
    return fill(llama())


@pytest.fixture
def made() -> Callable[[str], Model]:
    """A filled model of a family by name."""
    return lambda name: fill(FAMILIES[name]())


def inputs(model: Model, batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Ids [B, T], or an image for a model that sees."""
    stream = torch.Generator().manual_seed(seed)
    if isinstance(model.module("embedding"), PatchEmbed):
        return torch.randn(batch, 3, 12, 12, generator=stream)
    return torch.randint(0, V, (batch, length), generator=stream)


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    return inputs
