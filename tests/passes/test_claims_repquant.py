"""Coded inputs on an encoder of images that has learned to read digits, and beside a loud channel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Linear, Norm, PatchEmbed
from effc.compiler.method import Batch, Context, Outcome
from effc.compiler.model import Model
from effc.compiler.readers import readers
from effc.compiler.rewrite import Rewriter
from effc.passes.quantize._one_grid import into_norm, into_readers, one_grid
from effc.passes.quantize._ranges import Range, grid
from effc.passes.quantize.repquant import RepQuant
from effc.runtime.stage import run_stage
from effc.specs.recipe import Ref
from tests.claims import Measured
from tests.compiler.conftest import fill

from . import test_repquant as parts
from .digits import drawn

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)
WIDTH, LAYERS = 48, 4


def digits(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [B, 1, 8, 8] and kinds [B]."""
    images, kinds = drawn(rows, seed, noise=0.2)
    return F.avg_pool2d(images, 2), kinds


class Images:
    """Images as calibration data."""

    fingerprint = vocabulary = "digits"
    bytes_per_token = 1.0

    def __init__(self, model: Model, rows: int, seed: int) -> None:
        self.model, self.x = model, digits(rows, seed)[0]

    def size(self, split: str) -> int:
        return len(self.x)

    def tokens(self, split: str) -> int:
        return len(self.x)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        x = self.x[list(indices)]
        return Batch(x, torch.zeros(len(x), 1, dtype=torch.int64), self.model.step(x))


def blank() -> Model:
    """Four layers, patches of two by two, a classifier that reads the class token."""

    def layer() -> dict[str, torch.nn.Module]:
        form: Any = {"width": WIDTH, "heads": 4, "kv_heads": 4, "head_dim": WIDTH // 4}
        return {
            "norm1": Norm(width=WIDTH, form="layer", bias=True),
            "attention": Attention(**form, bias=True, bias_o=True, causal=False),
            "norm2": Norm(width=WIDTH, form="layer", bias=True),
            "mlp": MLP(width=WIDTH, hidden=2 * WIDTH, activation="gelu", gated=False, bias=True),
        }

    embedding = PatchEmbed(image=8, patch=2, channels=1, width=WIDTH)
    head = Linear(in_features=WIDTH, out_features=10, bias=True)
    norm = Norm(width=WIDTH, form="layer", bias=True)
    return Model(assemble(embedding, [layer() for _ in range(LAYERS)], norm, head))


@cache
def learned(seed: int) -> Model:
    model = fill(blank(), seed)
    for name, tensor in model.tensors().items():
        scale = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.0
        gain = "norm" in name and name.endswith("weight")
        model.place(name, torch.ones_like(tensor) if gain else tensor / 0.3 * scale)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for step in range(500):
        x, kinds = digits(64, 1000 * seed + step + 100)
        optimizer.zero_grad()
        F.cross_entropy(model(x)[:, 0], kinds).backward()
        optimizer.step()
        plan.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return model


@torch.no_grad()
def right(model: Model) -> float:
    """The share of 1500 new digits told right."""
    x, kinds = digits(1500, 77)
    return float((model(x)[:, 0].argmax(1) == kinds).float().mean())


def stage(seed: int, **given: Any) -> Outcome:
    model = learned(seed)
    method = RepQuant.model_validate({"data": Ref("images"), "samples": 32, "except": ("head",)} | given)
    return run_stage(method, [model], Context(seed, {"data": Images(model, 32, 55 + seed)}))


def coded(seed: int, **given: Any) -> Model:
    return stage(seed, **given).model


def errors(seed: int, **given: Any) -> float:
    found = stage(seed, **given).measures["errors"]
    return float(sum(found.values()) / len(found))


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_are_the_same_before_and_after(seed: int, measured: Measured) -> None:
    """CHECK: 4-layer ViT on 8x8 digits: codes equal before/after fold."""
    model, x = learned(seed), digits(64, 5)[0]
    rw, least = Rewriter(model), 1.0
    held = {}
    for path in [p for p in model.paths("norm") if p.startswith("layers.")]:
        y, _ = parts.outputs(model, path, x)
        scale, zero = grid(Range(y.amin(0), y.amax(0)), 4, False)
        one = one_grid(scale, zero, 4, False)
        into_readers(rw, readers(model, path).units, one)
        into_norm(rw, path, one)
        held[path] = one, parts.codes(y, scale, zero, 4)
    after = rw.done()
    for path, (one, own) in held.items():
        turned, _ = parts.outputs(after, path, x)
        alike = parts.codes(turned, one.scale, one.zero, 4) == own
        least = min(least, float(alike.float().mean()))
    measured("quantize.repquant", "codes on one grid are those of all channels", least, above=0.999)
    with torch.no_grad():
        before, now = model(x), after(x)
    worst = float((now - before).abs().max() / (before.max() - before.min()))
    measured("quantize.repquant", "moving the scales moves no output, of its range", worst, below=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_four_bits_read_more_digits_than_one_plain_grid_a_layer(seed: int, measured: Measured) -> None:
    """CHECK: W4A4 accuracy repquant > rtn per-tensor."""
    whole = right(learned(seed))
    plain = right(coded(seed, ln="layer", clip="minmax", softmax="uniform", reconstruct=False))
    ours = right(coded(seed))
    measured("quantize.repquant", "the encoder reads digits before it is quantized", whole, above=0.85)
    measured("quantize.repquant", "W4A4 reads more digits than to nearest per tensor", ours, above=plain)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_part_lowers_the_error_of_layers(seed: int, measured: Measured) -> None:
    """Mean error of the linears' outputs on the calibration images, W4A4."""
    plain = {"ln": "layer", "clip": "minmax", "softmax": "uniform", "reconstruct": False}
    base = errors(seed, **plain)
    scales = errors(seed, **plain | {"ln": "channel_to_layer"})
    clipped = errors(seed, **plain | {"ln": "channel_to_layer", "clip": "learned"})
    fitted = errors(seed, **plain | {"ln": "channel_to_layer", "reconstruct": True})
    measured("quantize.repquant", "scales of channels lower the error of layers", scales, below=base)
    measured("quantize.repquant", "so do learned ranges", clipped, below=scales)
    measured("quantize.repquant", "so do fitted weights", fitted, below=scales)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_channel_fifty_times_as_large(seed: int, measured: Measured) -> None:
    """CHECK (more): a 2-layer block of width 64 with one outlier channel, at 8 bits."""
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, 64, generator=dice) + torch.randn(64, generator=dice)
    x[:, 7] *= 50
    w = torch.randn(64, 64, generator=dice)
    w[:, 7] /= 50
    want = x @ w.T
    scale, zero = grid(Range(x.amin(0), x.amax(0)), 8, False)
    one = one_grid(scale, zero, 8, False)
    y = one.turned(x)
    assert one.shift is not None
    through = parts.on_grid(y, one.scale, one.zero, 8) @ (w.double() * one.ratio).float().T
    ours = float((through - (w.double() @ one.shift).float() - want).norm() / want.norm())
    own = float((parts.on_grid(x, scale, zero, 8) @ w.T - want).norm() / want.norm())
    layer = grid(Range(x.amin().reshape(1), x.amax().reshape(1)), 8, False)
    naive = float((parts.on_grid(x, *layer, 8) @ w.T - want).norm() / want.norm())
    alike = parts.codes(y, one.scale, one.zero, 8) == parts.codes(x, scale, zero, 8)
    measured(
        "quantize.repquant", "with a loud channel 8-bit codes stay", float(alike.float().mean()), above=0.999
    )
    measured(
        "quantize.repquant", "the error is that of a grid for each channel", abs(ours / own - 1), below=0.01
    )
    measured("quantize.repquant", "and a fifth of one plain grid's at most", ours / naive, below=0.2)
