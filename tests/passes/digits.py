"""Images of digits, drawn at random places, sizes and slants under noise, and small networks that read them.

Shapes: images [B, 1, 16, 16], kinds [B] from 0 to 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.method import Batch
from effc.compiler.step import Step

SIDE = 16
DRAWN = """
.###. ..#.. .###. ####. ...#. ##### .###. ##### .###. .###.
#...# .##.. #...# ....# ..##. #.... #.... ....# #...# #...#
#..## ..#.. ....# ....# .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ..##. .###. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. .#... ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. #.... ....# ...#. #...# #...# ..#.. #...# ....#
.###. .###. ##### ####. ...#. .###. .###. ..#.. .###. .###.
"""
"""Ten digits, five by seven."""


@cache
def glyphs() -> Tensor:
    """[10, 1, 7, 5]"""
    rows = [line.split(" ") for line in DRAWN.strip().splitlines()]
    return torch.tensor([[[[c == "#" for c in row[k]] for row in rows]] for k in range(10)]).float()


def drawn(rows: int, seed: int, noise: float = 0.25) -> tuple[Tensor, Tensor]:
    """Images and kinds."""
    dice = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 10, (rows,), generator=dice)
    shift = torch.rand(rows, 2, generator=dice) * 0.7 - 0.35
    size = 1.15 + 0.5 * torch.rand(rows, 2, generator=dice)
    slant = torch.rand(rows, 2, generator=dice) * 0.6 - 0.3
    maps = torch.zeros(rows, 2, 3)
    maps[:, 0, 0], maps[:, 0, 1] = size[:, 0] * 7 / 5, slant[:, 0]
    maps[:, 1, 0], maps[:, 1, 1] = slant[:, 1] / 2, size[:, 1]
    maps[:, :, 2] = shift
    grid = F.affine_grid(maps, [rows, 1, SIDE, SIDE], align_corners=False)
    images = F.grid_sample(glyphs()[kinds], grid, align_corners=False)
    return images + noise * torch.randn(images.shape, generator=dice), kinds


class Digits:
    """Images as data of a training; labels are kinds, or kind and parity [B, 2] where `parity` is set."""

    fingerprint = vocabulary = "digits"
    bytes_per_token = 1.0

    def __init__(self, seed: int, train: int = 4000, heldout: int = 1000, parity: bool = False) -> None:
        rows = {"train": train, "valid": 200, "heldout": heldout}
        self.held = {split: drawn(n, 3 * seed + k) for k, (split, n) in enumerate(rows.items())}
        self.parity = parity

    def size(self, split: str) -> int:
        return len(self.held[split][1])

    def tokens(self, split: str) -> int:
        return self.size(split)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        images, kinds = self.held[split]
        rows = torch.tensor([i % len(kinds) for i in indices])
        labels = kinds[rows]
        if self.parity:
            labels = torch.stack((labels, labels % 2), 1)
        return Batch(images[rows], labels, Step(torch.zeros(len(rows), 1, dtype=torch.int64)))


class Convs(nn.Module):
    """Five convolutions with batch norms, two of them around a residual, and a classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem, self.norm = nn.Conv2d(1, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)
        self.down, self.norm1 = nn.Conv2d(w, 2 * w, 3, padding=1, bias=False), nn.BatchNorm2d(2 * w)
        self.conv1, self.norm2 = nn.Conv2d(2 * w, 2 * w, 3, padding=1, bias=False), nn.BatchNorm2d(2 * w)
        self.conv2, self.norm3 = nn.Conv2d(2 * w, 2 * w, 3, padding=1, bias=False), nn.BatchNorm2d(2 * w)
        self.last, self.norm4 = nn.Conv2d(2 * w, 4 * w, 3, padding=1, bias=False), nn.BatchNorm2d(4 * w)
        self.head = nn.Linear(4 * w, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(self.norm1(self.down(x)))
        y = F.relu(self.norm2(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.norm3(self.conv2(y)) + x), 2)
        x = F.relu(self.norm4(self.last(x)))
        out: Tensor = self.head(x.amax((2, 3)))
        return out


class Decoder(nn.Module):
    """A convolution and a classifier."""

    def __init__(self, inputs: int, width: int, kinds: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.norm(self.conv(x))).amax((2, 3)))
        return out


class TwoTasks(nn.Module):
    """An encoder with a residual, and decoders that tell kind [B, 10] and parity [B, 2]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem, self.norm = nn.Conv2d(1, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)
        self.down, self.norm1 = nn.Conv2d(w, 2 * w, 3, 2, 1), nn.BatchNorm2d(2 * w)
        self.conv1, self.norm2 = nn.Conv2d(2 * w, 2 * w, 3, padding=1, bias=False), nn.BatchNorm2d(2 * w)
        self.conv2, self.norm3 = nn.Conv2d(2 * w, 2 * w, 3, padding=1, bias=False), nn.BatchNorm2d(2 * w)
        self.kind, self.parity = Decoder(2 * w, 2 * w, 10), Decoder(2 * w, 2 * w, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm1(self.down(x)))
        y = F.relu(self.norm2(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.norm3(self.conv2(y)) + x), 2)
        return self.kind(x), self.parity(x)


def learned(module: Any, data: Digits, steps: int, batch: int = 64, seed: int = 0) -> Any:
    """The module after a plain training, at rest."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    dice = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        found = data.batch("train", torch.randint(0, data.size("train"), (batch,), generator=dice).tolist())
        optimizer.zero_grad()
        answers = module(found.ids)
        if isinstance(answers, Tensor):
            loss = F.cross_entropy(answers, found.labels)
        else:
            pairs = zip(answers, found.labels.unbind(1), strict=True)
            loss = torch.stack([F.cross_entropy(z, kinds) for z, kinds in pairs]).sum()
        loss.backward()
        optimizer.step()
        plan.step()
    return module.eval()


@torch.no_grad()
def right(model: Any, data: Digits, split: str = "heldout") -> float:
    """The share of kinds that a network tells right."""
    found = data.batch(split, range(data.size(split)))
    return float((model(found.ids).argmax(1) == found.labels).float().mean())
