"""Parallel branches made one layer, and one layer made branches: the same function both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effc.compiler.cost import count
from effc.compiler.rewrite import Rewriter
from effc.compiler.trace import TracedModel, trace
from effc.passes.reparam.branch import Branch
from tests.claims import Measured

from .convnets import norms, stirred
from .edited import edited, moved
from .tiny_models import blank, filled, on_meta

IMAGE = (2, 4, 9, 9)
EXPAND = Branch(mode="expand", branches=("conv", "conv1", "identity"))


class RepBlock(nn.Module):
    """bn conv3 + bn conv1 + bn, then relu; the last where nothing changes the size."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
        self.conv1 = nn.Conv2d(inputs, outputs, 1, stride, groups=groups)
        self.bn3, self.bn1 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.own = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv3(x)) + self.bn1(self.conv1(x))
        if self.own is not None:
            y = y + self.own(x)
        return F.relu(y)


class RepNet(nn.Module):
    """Blocks of three branches, then a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            RepBlock(4, width),
            RepBlock(width, width),
            RepBlock(width, width, groups=2),
            RepBlock(width, width, 2),
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return out


class Sums(nn.Module):
    """A sum of what the given layers make of the input; None is the input itself."""

    def __init__(self, *layers: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer if layer is not None else nn.Identity() for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        y = None
        for layer in self.layers:
            z = x if isinstance(layer, nn.Identity) else layer(x)
            y = z if y is None else y + z
        assert y is not None
        return y


class Plain(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 5, padding=2, groups=2, bias=False)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return out


def traced(module: nn.Module, *shape: int, seed: int = 0) -> TracedModel:
    return trace(stirred(module, seed), torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


def problems(method: Branch, model: Any) -> str:
    return "\n".join(d.render() for d in method.refuses(model))


def convs(model: Any) -> int:
    calls = [n for n in model.gm.graph.nodes if n.op == "call_module"]
    return sum(isinstance(model.module(str(n.target)), nn.Conv2d) for n in calls)


def conv(size: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, size, **{"padding": size // 2, **more})


ALIKE: dict[str, Callable[[], nn.Module]] = {
    "kernels": lambda: Sums(conv(3), conv(1), conv(5)),
    "identity": lambda: Sums(conv(3), None),
    "identity in groups": lambda: Sums(conv(3, groups=2), None, conv(1, groups=2)),
    "dilated": lambda: Sums(conv(3, dilation=2, padding=2), conv(1), None),
    "strides": lambda: Sums(conv(3, stride=2), conv(1, stride=2)),
    "same": lambda: Sums(conv(3, padding="same"), conv(3), conv(1)),
    "a norm each": lambda: Sums(nn.Sequential(conv(3), nn.BatchNorm2d(4)), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", ALIKE)
def test_branches_become_one_layer(name: str) -> None:
    model = traced(ALIKE[name](), *IMAGE)
    assert problems(Branch(), model) == ""
    x = torch.randn(*IMAGE)
    assert moved(Branch(), model, x, torch.float64) < 1e-10
    assert moved(Branch(), model, x, torch.float32) < 1e-5
    after = edited(Branch(), model)
    assert (convs(after), norms(after)) == (1, 0)
    assert [n.op for n in after.gm.graph.nodes] == ["placeholder", "call_module", "output"]


def test_a_network_of_branches_becomes_plain() -> None:
    model = traced(RepNet(), *IMAGE)
    assert moved(Branch(), model, torch.randn(*IMAGE), torch.float64) < 1e-10
    after = edited(Branch(), model)
    assert (convs(model), convs(after), norms(after)) == (8, 4, 0)
    rw = Rewriter(on_meta(model))
    Branch().outline(rw, ())
    assert count(rw.done()) == count(after)
    assert {r.name for r in after.roles.values()} == {"conv", "linear"}


def test_linears_beside_and_behind_each_other() -> None:
    beside = traced(Sums(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), None), 5, 4)
    assert moved(Branch(), beside, torch.randn(5, 4), torch.float64) < 1e-10
    assert len(edited(Branch(), beside).paths("linear")) == 1
    behind = traced(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3, bias=False), nn.Linear(3, 5)), 2, 6, 4)
    assert "finds no branches" in problems(Branch(), behind)
    method = Branch(serial=True)
    assert problems(method, behind) == ""
    assert moved(method, behind, torch.randn(2, 6, 4), torch.float64) < 1e-10
    after = edited(method, behind)
    assert len(after.paths("linear")) == 1
    assert count(after).params < count(behind).params
    wide = traced(nn.Sequential(nn.Linear(9, 2), nn.Linear(2, 9)), 5, 9)
    assert "finds no branches" in problems(method, wide), "9 x 9 weights are more than two thin matrices"


def test_what_else_is_added_stays() -> None:
    class More(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(3), conv(1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x) + (F.relu(x) + self.b(x))
            return out

    model = traced(More(), *IMAGE)
    assert moved(Branch(), model, torch.randn(*IMAGE), torch.float64) < 1e-10
    assert convs(edited(Branch(), model)) == 1


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ((conv(3), conv(3, groups=2)), "layers.0 has groups 1, layers.1 2"),
        ((conv(3), conv(3, dilation=2, padding=2)), "has dilation (1, 1), layers.1 (2, 2)"),
        ((conv(3), conv(3, padding_mode="reflect")), "has padding_mode zeros, layers.1 reflect"),
        ((conv(3), nn.Sequential(conv(1), nn.ReLU(), conv(1))), "`layers.1.1` stands inside a branch"),
        (
            (conv(3), nn.BatchNorm2d(4, track_running_stats=False)),
            "layers.1 uses the statistics of its batch",
        ),
    ],
)
def test_unlike_branches_are_refused_with_the_difference(layers: Any, words: str) -> None:
    said = problems(Branch(), traced(Sums(*layers), *IMAGE))
    assert "E320" in said
    assert words in said


def test_channels_that_change_carry_nothing_over() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x) + x
            return out

    assert "a has 1 channels in and 4 out" in problems(Branch(), traced(Wide(), 2, 1, 5, 5))


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_an_expanded_layer_computes_the_same_and_merges_back(norm: Any) -> None:
    model = traced(Plain(), *IMAGE)
    method = EXPAND.model_copy(update={"norm": norm})
    assert problems(method, model) == ""
    assert list(method.targets(model)) == ["conv1", "conv2"], "a stride leaves nothing to carry over"
    x = torch.randn(*IMAGE)
    assert moved(method, model, x, torch.float64) < 1e-9
    wide = edited(method, model)
    assert convs(wide) == 3 + 2 + 2
    assert count(wide).params > count(model).params
    rw = Rewriter(on_meta(model))
    method.outline(rw, ())
    assert count(rw.done()) == count(wide)
    back = edited(Branch(), wide)
    assert (convs(back), norms(back)) == (3, 0)
    with torch.no_grad():
        assert torch.allclose(back(x), model(x), atol=1e-5)
    for path in ("conv1", "conv2"):
        assert torch.allclose(back.module(path).weight, model.module(path).weight, atol=1e-5)


def test_expanding_needs_layers_that_keep_the_size() -> None:
    model = traced(nn.Sequential(nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 3, stride=2)), *IMAGE)
    said = problems(EXPAND, model)
    assert "finds no layer to expand" in said
    assert "`0` has kernel (2, 2)" in said
    assert "cannot expand `0 and 1 more`" in problems(EXPAND.model_copy(update={"select": ("conv",)}), model)
    assert "finds no layer to expand" in problems(EXPAND, filled(blank(layers=1)))


def test_drawn_branches_do_not_depend_on_the_run() -> None:
    model = traced(Plain(), *IMAGE)
    first, again = edited(EXPAND, model), edited(EXPAND, model)
    assert all(torch.equal(t, again.tensors()[name]) for name, t in first.tensors().items())


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_branches_merge_exactly_after_training(seed: int, measured: Measured) -> None:
    torch.manual_seed(seed)
    plain = traced(Plain(64), *IMAGE, seed=seed)
    wide = edited(EXPAND, plain)
    wide.train()
    x, want = torch.randn(16, 4, 9, 9), torch.randn(16, 64, 5, 5)
    parameters = [p.requires_grad_() for p in wide.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    first = last = 0.0
    for step in range(12):
        optimizer.zero_grad()
        loss = F.mse_loss(wide(x), want)
        loss.backward()
        optimizer.step()
        last = float(loss.detach())
        first = first if step else last
    wide.eval().requires_grad_(False)
    measured("reparam.branch", "training moves the loss", last, below=first)
    worst = moved(Branch(), wide, x[:4], torch.float64)
    measured("reparam.branch", "merging moves a trained network by no more in float64", worst, below=1e-10)
    layers = convs(edited(Branch(), wide))
    measured("reparam.branch", "layers left, beside the first ones", abs(layers - convs(plain)), below=0.5)
