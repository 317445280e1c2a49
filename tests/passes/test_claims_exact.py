"""What the cards promise of layers exactly, at the sizes that they name: forms that agree, blocks that move
nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler.cost import count
from effc.compiler.depth_losses import enters
from effc.compiler.fast_weights import apply, gradients
from effc.compiler.method import Context
from effc.compiler.newton import CELLS, newton, sequential, solve
from effc.compiler.probe import widened
from effc.compiler.rewrite import Rewriter
from effc.compiler.scan import chunked, parallel, recurrent
from effc.compiler.shapes import Rewrite
from effc.passes.arch.gated_attention import GatedAttentionSwap
from effc.passes.arch.layer_norm import LayerNormSwap
from effc.passes.arch.residual_scale import ResidualScale
from effc.passes.linearize.liger import Liger
from effc.passes.moe.widenet import WideNet
from effc.passes.tie.foldgpt import FoldGPT
from effc.passes.tie.recursive import Recursive
from effc.runtime.rewriting import rewrite
from effc.specs.recipe import Ref
from tests.claims import Measured
from tests.compiler import test_newton as cells
from tests.compiler.test_scan import case

from . import test_arch as arch
from . import test_mor as mor
from . import test_vig as vig
from .edited import moved
from .lab import VOCAB, fresh
from .test_echo import GROUPS, echoed, planted
from .tiny_models import outputs

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)
IDS = torch.arange(36).view(3, 12)


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest number wanted."""
    return float((got - want).detach().abs().max() / want.detach().abs().max())


@pytest.mark.parametrize("seed", SEEDS)
def test_differences_of_full_rank_are_the_model(seed: int, measured: Measured) -> None:
    base, method = fresh(seed, layers=8, width=128), Recursive(loops=2, lora_rank=128)
    claim = "8 layers, 128 wide: differences of full rank move the logits by no more in float32"
    measured("tie.recursive", claim, moved(method, base, IDS, torch.float32), below=1e-4)


def test_layers_that_see_alike_share_a_map_at_no_loss(measured: Measured) -> None:
    worst = 0.0
    for family in ("llama", "qwen3", "gpt2"):
        model = planted(family)
        small = echoed(model, groups=GROUPS[family])
        worst = max(worst, apart(outputs(small, IDS), outputs(model, IDS)))
    claim = "where followers have their leaders' input, W_q and W_k: sharing moves 3 families by no more"
    measured("tie.attention", claim, worst, below=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_open_gates_are_the_model_bit_for_bit(seed: int, measured: Measured) -> None:
    model, method = fresh(seed, layers=8), FoldGPT(data=Ref("text"), keep_first=0, keep_last=0)
    rw = Rewriter(model)
    method.prepare(rw, ())
    method.begin(rw, seed)
    other = int((outputs(rw.done(), IDS) != outputs(model, IDS)).sum())
    measured("tie.foldgpt", "gates of 1: logits of 8 layers that are not the same bits", other, below=0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_half_the_tokens_in_the_second_loop_cost_what_the_formula_says(seed: int, measured: Measured) -> None:
    base, length = fresh(seed, layers=6, width=128), 12
    tied = rewrite(Recursive(loops=2, tie_norms=True), base, Context(seed)).model
    small = mor.looped(base, seed)
    for unit in enters(small).values():
        unit.train()  # so that the best of a row are taken, half of it
    scores = 4.0 * 3 * 128 * length**2 * 6
    whole = mor.torch_flops(tied, length) - mor.head_flops(tied, length) - scores
    routers = 2.0 * 2 * 128 * 3 * length
    mine = mor.torch_flops(small, length) - mor.head_flops(tied, length) - routers
    off = abs(mine / (0.75 * whole + scores * (1 + 0.25) / 2) - 1)
    claim = "6 layers, 128 wide, 2 loops: operations that torch counts, over the formula's, less 1"
    measured("tie.mor", claim, off, below=0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_layers_store_what_the_formula_says(seed: int, measured: Measured) -> None:
    thin = rewrite(WideNet(experts=4), fresh(seed, layers=6, width=128), Context(seed)).model
    due = 2 * VOCAB * 128 + 4 * 128 * 128 + 4 * 3 * 128 * 512 + 128 * 4 + 6 * 2 * 128 + 128
    off = abs(count(thin).params - due)
    measured("moe.widenet", "6 layers, 4 experts, 128 wide: weights counted less formula", off, below=0.5)


def test_forms_of_the_gated_recurrence_agree(measured: Measured) -> None:
    for form, run in (("parallel", parallel), ("chunks of 16", chunked)):
        more: dict[str, Any] = {"chunk": 16, "sub": 4} if run is chunked else {}
        given = case(100, dtype=torch.float32)
        got, want = run(*given, over="key", **more), recurrent(*given, over="key")  # type: ignore[operator]
        worst = max(apart(a, b) for a, b in zip(got, want, strict=True))
        claim = f"100 tokens, {form}: outputs and last state from the recurrence's in float32"
        measured("linearize.gla", claim, worst, below=1e-4)


def test_gradients_of_chunks_are_those_of_finite_differences(measured: Measured) -> None:
    """Along one random direction in q, k, v and the gates together."""
    q, k, v, g, _ = case(100, past=False)
    dice = torch.Generator().manual_seed(0)
    way = [torch.randn(t.shape, generator=dice, dtype=t.dtype) for t in (q, k, v, g)]

    def value(at: list[Tensor]) -> Tensor:
        return chunked(*at, None, over="key", chunk=16, sub=4)[0].square().sum()  # type: ignore[arg-type]

    given = [t.clone().requires_grad_() for t in (q, k, v, g)]
    found = torch.autograd.grad(value(given), given)
    slope = sum(float((a * b).sum()) for a, b in zip(found, way, strict=True))
    h = 1e-5
    ends = [value([t + s * h * d for t, d in zip((q, k, v, g), way, strict=True)]) for s in (1, -1)]
    off = abs(float(ends[0] - ends[1]) / (2 * h) / slope - 1)
    measured("linearize.gla", "slope of 100 tokens over that of finite differences, less 1", off, below=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_three_steps_find_256_tokens(cell: Any, measured: Measured) -> None:
    u, a, start = cells.case(cell)
    assert u.shape == (2, 256, 3, 32)
    how = cells.CIFG if cell == "lstm_cifg" else cells.HOW
    want = sequential(cell, u, a, start)
    found, _ = newton(cell, u, a, start, None, None, **how | {"tol": 1e9})
    claim = f"{cell}, 256 tokens, 32 channels: error of the states after 3 steps"
    measured("linearize.pararnn", claim, float((found - want).abs().max()), below=1e-4)
    dice = torch.Generator().manual_seed(0)
    weight = torch.randn(want.shape, generator=dice, dtype=want.dtype)
    grads = []
    for run in (
        lambda u, a: solve(cell, u, a, start, None, None, **how | {"iters": 8, "tol": 1e-12}),
        lambda u, a: sequential(cell, u, a, start),
    ):
        given = [t.clone().requires_grad_() for t in (u, a)]
        grads.append(torch.autograd.grad((run(*given) * weight).sum(), given))
    worst = max(apart(mine, theirs) for mine, theirs in zip(*grads, strict=True))
    claim = f"{cell}: gradients from those of backpropagation through 256 tokens"
    measured("linearize.pararnn", claim, worst, below=1e-9)


def test_inner_gradients_are_those_of_autograd(measured: Measured) -> None:
    dice = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(2, 1, *shape, generator=dice, dtype=torch.float64) / shape[-1] ** 0.5

    own = tuple(drawn(64, 64).requires_grad_() for _ in range(3))
    k, v, rates = drawn(32, 64), drawn(32, 64), drawn(32, 3).abs()
    found, worst = gradients(own, k, v, rates), 0.0  # type: ignore[arg-type]
    for which, gradient in enumerate(found):
        score = (v * apply(own, k)).sum(-1) * rates[..., which]  # type: ignore[arg-type]
        worst = max(worst, apart(gradient, torch.autograd.grad(score.sum(), own[which])[0]))
    claim = "64 channels, a chunk of 32: gradients in closed form from those of autograd"
    measured("linearize.lact", claim, worst, below=1e-12)


def test_a_window_over_all_is_softmax_attention(measured: Measured) -> None:
    base = fresh(0, layers=4, width=128)
    worst = moved(Liger(window=12, mix=1.0), base, IDS, torch.float32)
    measured("linearize.liger", "a window over all tokens and mix = 1 move the logits by", worst, below=1e-6)


def test_both_ways_over_an_image_are_two_recurrences(measured: Measured) -> None:
    model = widened(vig.linear(inject=False))
    block: Any = model.module("layers.0.attention")
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worst = apart(block(x, model.step(vig.images().double())), vig.by_recurrences(block, x))
    measured("linearize.vig", "an image read both ways, from two recurrences, float64", worst, below=1e-10)


@pytest.mark.parametrize(
    ("method", "claim", "limit"),
    [
        (GatedAttentionSwap(), "neutral gates move the logits by no more", 1e-6),
        (
            LayerNormSwap.model_validate(arch.FIRST | {"mode": "exact"}),
            "2 blocks of layer norms as RMS norms: the logits move by no more",
            1e-5,
        ),
        (ResidualScale(), "factors folded into the last weights move the logits by no more", 1e-5),
    ],
    ids=("gates", "norms", "factors"),
)
def test_blocks_in_place_of_others_are_the_function(
    method: Rewrite, claim: str, limit: float, measured: Measured
) -> None:
    worst = moved(method, arch.plain(tied=False), IDS, torch.float32)
    measured(method.kind, f"{claim} (float32)", worst, below=limit)
