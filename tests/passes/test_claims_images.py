"""Encoders of images: a scan both ways learns what attention learns, and averaged experts end no worse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Averaged, Linear, Norm, PatchEmbed
from effc.compiler.cost import count
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model
from effc.compiler.step import Step
from effc.passes.adapt.full import Full
from effc.passes.linearize.vig import ViG
from effc.passes.moe.ewa import Ewa
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.rewriting import rewrite
from effc.runtime.stage import run_stage
from tests.claims import Measured

from .lab import DATA

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)
SIDE, PATCH, KINDS = 16, 4, 8
TOKENS = 1 + (SIDE // PATCH) ** 2


class Images:
    """Bars at one of eight angles, of any color and place, under noise: pixels [3, 16, 16], the kind asked at
    the class token.
    """

    vocabulary = "images"
    bytes_per_token = 1.0

    def __init__(self, seed: int, rows: int, noise: float) -> None:
        self.fingerprint = f"images {seed} {rows} {noise}"
        dice = torch.Generator().manual_seed(seed)
        self.parts = {"train": drawn(rows, noise, dice), "heldout": drawn(1000, noise, dice)}

    def size(self, split: str) -> int:
        return len(self.parts[split][0])

    def tokens(self, split: str) -> int:
        return self.size(split)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        pixels, kinds = self.parts[split]
        rows = [i % len(kinds) for i in indices]
        labels = torch.full((len(rows), TOKENS), -100)
        labels[:, 0] = kinds[rows]
        return Batch(pixels[rows], labels, Step(torch.arange(TOKENS).expand(len(rows), TOKENS)))


def drawn(rows: int, noise: float, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels [N, 3, 16, 16] and kinds [N]."""
    kinds = torch.randint(0, KINDS, (rows,), generator=dice)
    grid = torch.arange(float(SIDE)) - (SIDE - 1) / 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    angle = kinds.view(-1, 1, 1) * torch.pi / KINDS
    place = (torch.rand(rows, 1, 1, generator=dice) - 0.5) * SIDE * 0.7
    bars = torch.exp(-((x * angle.cos() + y * angle.sin() - place) ** 2))
    color = torch.randn(rows, 3, 1, 1, generator=dice)
    return bars[:, None] * color + noise * torch.randn(rows, 3, SIDE, SIDE, generator=dice), kinds


@cache
def images(seed: int, rows: int, noise: float) -> Images:
    return Images(seed, rows, noise)


def encoder(seed: int, width: int, layers: int) -> Model:
    """An image encoder of random weights that names a kind at its class token."""

    def norm() -> Norm:
        return Norm(width=width, form="layer", bias=True)

    def layer() -> dict[str, nn.Module]:
        heads = width // 16
        attention = Attention(width=width, heads=heads, kv_heads=heads, head_dim=16, causal=False)
        mlp = MLP(width=width, hidden=4 * width, gated=False, activation="gelu")
        return {"norm1": norm(), "attention": attention, "norm2": norm(), "mlp": mlp}

    embedding = PatchEmbed(image=SIDE, patch=PATCH, channels=3, width=width)
    head = Linear(in_features=width, out_features=KINDS)
    model = Model(assemble(embedding, [layer() for _ in range(layers)], norm(), head))
    dice = torch.Generator().manual_seed(seed)
    for name, tensor in model.tensors().items():
        values = torch.randn(tensor.shape, generator=dice) / tensor.shape[-1] ** 0.5
        if tensor.dim() == 1:
            values = torch.full(tensor.shape, float("norm" in name and name.endswith("weight")))
        model.place(name, values)
    return model


def trained(model: Model, data: Images, steps: int, seed: int, rate: float = 1e-3) -> Model:
    method = Full(data=DATA, steps=steps, batch=32, precision="fp32", optimizer=AdamW(lr=rate))
    return fit(method, model, Context(seed, {"data": data})).model


@torch.no_grad()
def right(model: Model, data: Images) -> float:
    """Share of held-out images whose kind is named."""
    batch = data.batch("heldout", range(data.size("heldout")))
    told = model(batch.ids, step=batch.step)[:, 0].argmax(-1)
    return float((told == batch.labels[:, 0]).float().mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_scans_both_ways_learn_images(seed: int, measured: Measured) -> None:
    data, base = images(seed, 8000, 0.3), encoder(seed, 64, 2)
    linear = run_stage(ViG(), [base], Context(seed)).model
    mine, theirs = (right(trained(m, data, 400, seed, 2e-3), data) for m in (linear, base))
    about = "linearize.vig"
    measured(about, "share of images named after 400 steps (chance: 1/8)", mine, above=0.5)
    measured(about, "less that of softmax attention", mine - theirs, above=-0.02)


# -- moe.ewa

NOISE, ROWS = 0.5, 1500


@cache
def known(seed: int) -> Model:
    """Half a million weights, trained for a while."""
    model = encoder(seed, 96, 4)
    assert 4e5 < count(model).params < 6e5
    return trained(model, images(seed, ROWS, NOISE), 200, seed)


@cache
def apart(seed: int) -> Model:
    wide = rewrite(Ewa(experts=4, every=2), known(seed), Context(seed)).model
    return trained(wide, images(seed, ROWS, NOISE), 300, seed + 100)


def ends(seed: int) -> tuple[float, float]:
    """Share of images named: experts averaged, and plain training of as many steps."""
    data = images(seed, ROWS, NOISE)
    merged = rewrite(Ewa(finish="average"), apart(seed), Context(seed)).model
    return right(merged, data), right(trained(known(seed), data, 300, seed + 100), data)


@pytest.mark.parametrize("seed", SEEDS)
def test_averaged_experts_name_no_fewer_images(seed: int, measured: Measured) -> None:
    mine, plain = ends(seed)
    claim = "encoder of images, 300 steps: share named by the mean, less that of plain training"
    measured("moe.ewa", claim, mine - plain, above=-0.002)
    far = 0.0

    def see(block: Averaged, args: tuple[Tensor]) -> None:
        nonlocal far
        x = args[0].flatten(0, 1)
        every = torch.arange(block.n_experts).expand(len(x), -1)
        each = block.experts(x, torch.full(every.shape, 1 / block.n_experts), every)
        far = max(far, float((block.forward(x) - each).norm() / each.norm()))

    model = apart(seed)
    handles = [u.register_forward_pre_hook(see) for _, u in model.eval().units() if isinstance(u, Averaged)]
    batch = images(seed, ROWS, NOISE).batch("heldout", range(200))
    with torch.no_grad():
        model(batch.ids, step=batch.step)
    for handle in handles:
        handle.remove()
    claim = "what the mean of experts puts out, from the mean of what they put out, on the same tokens"
    measured("moe.ewa", claim, far, below=0.01)
