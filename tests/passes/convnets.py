"""Networks of convolutions with batch norms whose statistics are not those of a fresh module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.model import Model


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random gains of both signs, shifts, means and variances, one of them almost zero; in inference mode."""
    dice = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            assert norm.running_var is not None
            size = norm.running_mean.shape
            norm.running_mean.copy_(torch.randn(size, generator=dice))
            norm.running_var.copy_(torch.rand(size, generator=dice) + 0.1)
            norm.running_var[0] = 1e-8
            if norm.affine:
                with torch.no_grad():
                    norm.weight.copy_(torch.randn(size, generator=dice))
                    norm.weight[0] = 1e-3  # the channel whose variance is almost zero would drown the others
                    norm.bias.copy_(torch.randn(size, generator=dice))
    return module.eval()


class Block(nn.Module):
    """relu(bn conv relu(bn conv x) + shortcut x)"""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, groups=2)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Sequential()
        if stride > 1:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResNet(nn.Module):
    """A small residual network: x [B, 3, 16, 16] -> [B, 10]; 0.3M weights at width 36."""

    def __init__(self, width: int = 36) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        shapes = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.hidden, self.between = nn.Linear(4 * width, 4 * width, bias=False), nn.BatchNorm1d(4 * width)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))
        out: Tensor = self.head(F.relu(self.between(self.hidden(y))))
        return out


def norms(model: Model) -> int:
    """Batch norms that the graph calls."""
    calls = [n for n in model.gm.graph.nodes if n.op == "call_module"]
    return sum(isinstance(model.module(str(n.target)), nn.modules.batchnorm._BatchNorm) for n in calls)
