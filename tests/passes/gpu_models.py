"""Models of one or two layers whose programs for a GPU are checked: one for each kind of launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Carved, Embedding, Linear, MoE, Norm, PreGate, Softcap, Unit
from effc.compiler.blocks.gated_linear_attention import GatedLinearAttention
from effc.compiler.blocks.liger_attention import LigerAttention
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.planes_linear import PlanesLinear
from effc.compiler.blocks.quant_linear import QuantLinear
from effc.compiler.blocks.routed_lora import RoutedLora
from effc.compiler.blocks.tempered import Tempered
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.sharing import tie
from effc.passes.quantize.rtn import RTN
from tests.compiler.conftest import ROPE

D, V = 128, 61
Parts = dict[str, nn.Module]


def rms(**more: Any) -> Norm:
    return Norm(width=D, **more)


def layer_norm() -> Norm:
    return Norm(width=D, form="layer", eps=1e-5, bias=True)


def attention(**more: Any) -> Attention:
    return Attention(**{"width": D, "heads": 2, "kv_heads": 1, "head_dim": 64, "rope": ROPE} | more)


def layer(mixer: nn.Module, mlp: nn.Module, norm: Callable[[], Norm] = rms) -> Parts:
    name = "mlp" if isinstance(mlp, MLP) else "moe"
    return {"norm1": norm(), "attention": mixer, "norm2": norm(), name: mlp}


def mlp(hidden: int = 192, **more: Any) -> MLP:
    return MLP(width=D, hidden=hidden, **more)


def decoder_of(
    layers: Sequence[Parts], norm: Callable[[], Norm] = rms, tail: Sequence[Any] = (), **embedding: Any
) -> Model:
    """Layers of width 128 and a head tied to the table, with random weights."""
    head, table = Linear(in_features=D, out_features=V), Embedding(vocab=V, width=D, **embedding)
    gm = assemble(table, layers, norm(), head, tail)
    tie(gm, "head.weight", "embedding.weight")
    return drawn(Model(gm))


def drawn(model: Model, seed: int = 0) -> Model:
    """Random weights: of variance 1 / width in matrices; attention is listened to, and routers are sure."""
    dice = torch.Generator().manual_seed(seed)
    for name, tensor in model.tensors().items():
        path, _, slot = name.rpartition(".")
        unit: Any = model.module(path)
        made = unit.drawn(slot, dice) if isinstance(unit, Unit) and tensor.is_meta else None
        if made is None and (tensor.is_floating_point() and tensor.is_meta):
            made = torch.randn(tensor.shape, generator=dice) * 0.2 + 0.8
            if tensor.dim() > 1:
                listened = 2.0 if "attention.o" in path else 6.0 if "router" in path else 1.0
                made = torch.randn(tensor.shape, generator=dice) * 0.09 * listened
        elif made is None and tensor.is_meta:
            made = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if made is not None:
            model.place(name, made)
    return model


def packed(model: Model, **grid: Any) -> Model:
    method = RTN.model_validate({"rules": [{"on": "head", "bits": 8}], "scale": "bf16"} | grid)
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def llama(layers: int = 2) -> Model:
    return decoder_of([layer(attention(), mlp()) for _ in range(layers)])


def normed() -> Model:
    heads = [attention(qk_norm=1e-6, kv_heads=2, bias=True) for _ in range(2)]
    return decoder_of([layer(each, mlp()) for each in heads], scale=3.0)


def gpt() -> Model:
    wide: dict[str, Any] = {"activation": "gelu_tanh", "gated": False, "bias": True}
    heads = [attention(rope=None, kv_heads=2, bias=True, bias_o=True) for _ in range(2)]
    return decoder_of([layer(each, mlp(**wide), layer_norm) for each in heads], layer_norm, positions=20)


def gemma() -> Model:
    """Windows in turns, capped scores and logits, heads of 48."""
    more: dict[str, Any] = {"head_dim": 48, "cap": 2.0, "scale": 0.3}
    layers = [layer(attention(window=window, **more), mlp(64)) for window in (3, None)]
    return decoder_of(layers, tail=[("softcap", Softcap(cap=3.0))])


def mistral() -> Model:
    return decoder_of([layer(attention(window=4, head_dim=32, heads=4, kv_heads=2), mlp(128))])


def experts(hidden: int = 64, **more: Any) -> Model:
    mixture = MoE(**{"width": D, "hidden": hidden, "experts": 4, "active": 2} | more)
    return decoder_of([layer(attention(), mixture)])


def carved() -> Model:
    """A mixture whose gate is dense and drops the small, and one whose router comes before all layers."""
    tempered = Tempered(width=D, hidden=64, experts=3, tau=1.0, least=0.2)
    slices = Carved(width=D, shared=64, experts=2, own=64)
    model = decoder_of([layer(attention(), tempered), layer(attention(), slices)])
    rw = Rewriter(model, "gpu")
    rw.insert("router", PreGate(width=D, inner=64, heads=2, experts=2), after="embedding")
    return drawn(rw.done(), seed=1)


def hybrid() -> Model:
    """Recurrences: beside a window with normed heads, with 1 - a for keys, with gates of their own."""
    own: dict[str, Any] = {"width": D, "heads": 2, "kv_heads": 1, "head_dim": 64, "rope": ROPE}
    mixers = [
        LigerAttention(window=3, qk_norm=1e-6, **own),
        LigerAttention(window=0, form="hgrn2", **own),
        GatedLinearAttention(width=D, heads=2, key_dim=64, value_dim=64),
    ]
    return decoder_of([layer(mixer, mlp(64)) for mixer in mixers])


def adapted() -> Model:
    """Packed weights with an adapter beside each."""
    model = packed(decoder_of([layer(attention(bias=True), mlp(128))]), bits=4, group=64)
    rw = Rewriter(model, "gpu")
    for path, unit in list(model.units()):
        if isinstance(unit, QuantLinear) and path != "head":
            rw.swap(path, LoraLinear.over(unit, 4, 8.0, "rank"))
    return drawn(rw.done(), seed=2)


def several() -> Model:
    """Two of four columns zero, changes that tokens choose, planes of signs."""
    model = decoder_of([layer(attention(), mlp(256))])
    rw = Rewriter(model, "gpu")
    up = RoutedLora(in_features=D, out_features=256, rank=4, experts=3, active=2)
    down = PlanesLinear(in_features=256, out_features=D, planes=2, down=D, across=1)
    rw.swap("layers.0.mlp.up", up)
    rw.swap("layers.0.mlp.down", down)
    model = drawn(rw.done(), seed=3)
    quads = model.tensors()["layers.0.attention.o.weight"].detach().clone().view(D, -1, 4)
    quads[..., 1], quads[..., 2] = 0.0, 0.0
    model.place("layers.0.attention.o.weight", nn.Parameter(quads.view(D, -1)))
    return model
