"""Linear attention over images: two scans, a convolution, and what an encoder of images must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effc.compiler import graph_json
from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Norm, PatchEmbed
from effc.compiler.blocks.vig_attention import VigAttention
from effc.compiler.cost import count
from effc.compiler.method import Context
from effc.compiler.model import Model, roles_of
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.probe import widened
from effc.compiler.rewrite import Rewriter
from effc.compiler.scan import recurrent
from effc.passes.linearize.vig import ViG
from effc.runtime.stage import run_stage

from .tiny_models import filled, on_meta


def encoder() -> Model:
    def norm() -> Norm:
        return Norm(width=32, form="layer", bias=True)

    def layer() -> dict[str, nn.Module]:
        attention = Attention(width=32, heads=4, kv_heads=4, head_dim=8, bias=True, bias_o=True, causal=False)
        mlp = MLP(width=32, hidden=48, gated=False, bias=True)
        return {"norm1": norm(), "attention": attention, "norm2": norm(), "mlp": mlp}

    embedding = PatchEmbed(image=12, patch=3, channels=3, width=32)
    return filled(Model(assemble(embedding, [layer(), layer()], norm())))


def images(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def linear(**settings: Any) -> Model:
    return run_stage(ViG(**settings), [encoder()], Context(seed=1)).model


def by_recurrences(block: Any, x: Tensor) -> Tensor:
    """What a block without injection gives for x [B, 1 + N, d]: its two recurrences, token by token."""
    batch, length = x.shape[:2]
    tokens = torch.cat((x[:, :1], torch.nn.functional.silu(block.local(x[:, 1:]))), 1)

    def split(t: Tensor) -> Tensor:
        return t.view(batch, length, block.heads, -1).transpose(1, 2)

    q, k, v = (split(m(tokens)) for m in (block.q, block.k, block.v))
    gates = torch.nn.functional.logsigmoid(block.forget_up(block.forget_down(tokens))) / block.gate_div
    there, back = (split(g) for g in gates.chunk(2, -1))
    one, _ = recurrent(q, k, v, there)
    two, _ = recurrent(*(t.flip(2) for t in (q, k, v, back)))
    o = (one + two.flip(2)) / 2 / block.key_dim**0.5
    out: Tensor = block.o(block.norm(o.transpose(1, 2).flatten(2)) * torch.sigmoid(block.gate(x)))
    return out


def test_two_scans_are_two_recurrences() -> None:
    model = widened(linear(inject=False))
    block: Any = model.module("layers.0.attention")
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = block(x, model.step(images().double()))
    torch.testing.assert_close(got, by_recurrences(block, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inject", [True, False])
def test_expansion_equals_forward(inject: bool) -> None:
    model = linear(inject=inject, dwconv=5)
    block: Any = model.module("layers.1.attention")
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0))
    step = model.step(images())
    got, _ = evaluate(expand(block), block, x, step)
    torch.testing.assert_close(got, block(x, step), rtol=1e-5, atol=1e-5)


def test_the_class_token_passes_the_convolution_by() -> None:
    block: Any = linear().module("layers.0.attention")
    x = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, 0] += 1
    step = encoder().step(images(1))
    assert torch.equal(block.local(x[:, 1:]), block.local(other[:, 1:]))
    moved = (block(other, step) - block(x, step)).abs().amax(-1)[0]
    assert bool((moved > 0).all()), "every patch sees the class token through a scan"


def test_every_patch_sees_every_other_and_no_other_image() -> None:
    model = linear()
    x = images()
    changed = x.clone()
    changed[0, :, :3, :3] += 1
    with torch.no_grad():
        before, after = model(x), model(changed)
    assert bool(((after[0] - before[0]).abs().amax(-1) > 1e-6).all())
    torch.testing.assert_close(after[1], before[1])


def test_costs_follow_the_formula_and_the_outline() -> None:
    model = linear()
    d, keys, rank = 32, 16, 16
    block = 2 * d * keys + 3 * d * d + d * rank + rank * 2 * keys + 2 * keys + 9 * d + d + 2 * d
    assert count(model).params - count(encoder()).params == 2 * (block - 4 * d * d - 4 * d)
    rw = Rewriter(on_meta(encoder()), "linearize.vig")
    ViG().outline(rw, ())
    assert count(rw.done(), 8) == count(model, 8)
    assert count(model, 8) == count(model, 8000), "no term of all pairs"


def test_it_is_saved_and_drawn_alike() -> None:
    model = linear()
    assert model.roles == roles_of(model.gm)
    back = graph_json.from_json(graph_json.to_json(model))
    for name, tensor in model.tensors().items():
        back.place(name, tensor.detach())
    assert torch.equal(back(images()), model(images()))
    assert torch.equal(linear()(images()), model(images()))


def test_what_is_no_square_of_patches_is_refused(tiny: Model) -> None:
    (problem,) = ViG().refuses(tiny)
    assert "needs a model of images" in problem.title
    assert "`layers.0.attention` is none" in ViG().refuses(linear())[0].title
    with pytest.raises(ValueError, match="has no middle"):
        ViG(dwconv=4)
    with pytest.raises(ValueError, match="does not divide over 3 heads"):
        VigAttention(width=32, heads=3, key_dim=4, side=4)
