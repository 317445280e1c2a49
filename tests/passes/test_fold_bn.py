"""Batch norms moved into their neighbors: the same function, no batch norm left, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effc.compiler.cost import count
from effc.compiler.graph_shapes import graph_shapes
from effc.compiler.rewrite import Rewriter
from effc.compiler.trace import TracedModel, trace
from effc.passes.reparam.fold_bn import FoldBn
from tests.claims import Measured

from .convnets import ResNet, norms, stirred
from .edited import edited, moved
from .tiny_models import blank, filled, on_meta

IMAGES = (2, 3, 16, 16)


def traced(module: nn.Module, *shape: int, seed: int = 0) -> TracedModel:
    return trace(stirred(module, seed), torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


def problems(method: FoldBn, model: Any) -> str:
    return "\n".join(d.render() for d in method.refuses(model))


def conv(**more: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 6, 3, **more)


BEFORE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    "conv2d": (lambda: nn.Sequential(conv(padding=1, stride=2), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 2, bias=False), nn.BatchNorm3d(6)), (2, 4, 4, 4, 4)),
    "groups": (lambda: nn.Sequential(conv(groups=2, bias=False), nn.BatchNorm2d(6)), (2, 4, 7, 7)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "transposed groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4)),
    "not affine": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(6, affine=False)), (2, 4, 7, 7)),
}
AFTER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Sequential(nn.BatchNorm2d(4), conv()), (2, 4, 9, 9)),
    "groups": (lambda: nn.Sequential(nn.BatchNorm2d(4), conv(groups=2, bias=False)), (2, 4, 7, 7)),
    "reflected": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), conv(padding=1, padding_mode="reflect")),
        (2, 4, 7, 7),
    ),
    "linear": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)), (5, 4)),
    "same": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, padding="same")), (2, 4, 7, 7)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_it_goes_into_the_layer_before(name: str) -> None:
    make, shape = BEFORE[name]
    model = traced(make(), *shape)
    assert problems(FoldBn(), model) == ""
    x = torch.randn(*shape)
    assert moved(FoldBn(), model, x, torch.float64) < 1e-10
    assert moved(FoldBn(), model, x, torch.float32) < 1e-5
    assert norms(edited(FoldBn(), model)) == 0


@pytest.mark.parametrize("name", AFTER)
def test_it_goes_into_the_layers_behind(name: str) -> None:
    make, shape = AFTER[name]
    model = traced(make(), *shape)
    for method in (FoldBn(into="next"), FoldBn(into="either")):
        assert problems(method, model) == ""
        assert moved(method, model, torch.randn(*shape), torch.float64) < 1e-10
        assert norms(edited(method, model)) == 0
    assert "E320" in problems(FoldBn(into="prev"), model)


def test_a_residual_network_loses_all_of_them() -> None:
    model = traced(ResNet(8), *IMAGES)
    before = norms(model)
    after = edited(FoldBn(), model)
    assert (before, norms(after)) == (10, 0)
    assert len(after.gm.graph.nodes) == len(model.gm.graph.nodes) - before
    x = torch.randn(3, *IMAGES[1:])
    assert moved(FoldBn(), model, x, torch.float64) < 1e-10
    with torch.no_grad():
        assert torch.allclose(after(x), model(x), atol=1e-4)
    assert not [path for path, role in after.roles.items() if role.name == "norm"]


def test_the_cost_is_predicted_and_four_numbers_a_channel_go() -> None:
    model = traced(ResNet(8), *IMAGES)
    rw = Rewriter(on_meta(model))
    FoldBn().outline(rw, ())
    after = edited(FoldBn(), model)
    assert count(rw.done()) == count(after)
    channels = [8, 8, 8, 16, 16, 16, 32, 32, 32, 32]
    made = 8 + 8 + 16 + 32 + 32  # biases of layers that had none
    assert count(model).params - count(after).params == 4 * sum(channels) + len(channels) - made


def test_the_input_stays_as_it_is() -> None:
    model = traced(ResNet(8), *IMAGES)
    numbers = {name: t.clone() for name, t in model.tensors().items()}
    edited(FoldBn(), model)
    assert all(torch.equal(t, numbers[name]) for name, t in model.tensors().items())
    assert norms(model) == 10


def test_zeros_at_the_border_are_no_constant() -> None:
    padded = nn.Sequential(nn.BatchNorm2d(4), conv(padding=1))
    assert "pads with no zeros" in problems(FoldBn(into="next", select=("norm",)), traced(padded, 2, 4, 7, 7))
    centered = stirred(nn.Sequential(nn.BatchNorm2d(4), conv(padding=1)))
    norm = centered.get_submodule("0")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    norm.running_mean.zero_()
    nn.init.zeros_(norm.bias)
    model = trace(centered, torch.randn(2, 4, 7, 7))
    assert problems(FoldBn(into="next"), model) == ""
    assert moved(FoldBn(into="next"), model, torch.randn(2, 4, 7, 7), torch.float64) < 1e-10


def test_statistics_of_the_batch_are_refused() -> None:
    model = traced(ResNet(8), *IMAGES)
    model.train()
    assert "norm and 9 more is in training" in problems(FoldBn(), model)
    bare = nn.Sequential(conv(), nn.BatchNorm2d(6, track_running_stats=False))
    assert "1 has none (track_running_stats = False)" in problems(FoldBn(), traced(bare, 2, 4, 7, 7))


class Split(nn.Module):
    """One convolution before two batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn_a, self.bn_b = conv(), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        out: Tensor = self.bn_a(y) + self.bn_b(y)
        return out


class Twice(nn.Module):
    """A convolution whose output is read by more than its batch norm; a batch norm that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.bn1(y) + y
        out: Tensor = self.bn2(self.conv2(z)) + self.bn2(z)
        return out


def test_a_layer_that_others_read_cannot_take_it_in() -> None:
    said = problems(FoldBn(), traced(Split(), 2, 4, 7, 7))
    assert "error[E341]: `conv1` feeds bn_a and bn_b" in said
    model = traced(Twice(), 2, 4, 7, 7)
    assert "none of 2 batch norms stands alone" in problems(FoldBn(), model)
    assert "cannot fold `bn1`" in problems(FoldBn(select=("bn1",)), model)


def test_shared_weights_and_other_axes_are_left() -> None:
    module = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), conv(), nn.BatchNorm2d(6))
    module[3].weight = module[0].weight
    said = problems(FoldBn(), traced(module, 2, 4, 9, 9))
    assert "0 and 1 more shares its tensors" in said
    along = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))  # x [B, 6, 6]: channels are the second axis
    assert "can fold no batch norm" in problems(FoldBn(), traced(along, 2, 6, 6))
    assert "finds no batch norm" in problems(FoldBn(), filled(blank(layers=1)))


def test_an_exported_module_folds_too() -> None:
    class Checked(nn.Module):
        """Its check keeps symbolic tracing out."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(conv(), nn.BatchNorm2d(6))

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] != 4:
                raise ValueError("four channels")
            out: Tensor = self.body(x)
            return out

    model = traced(Checked(), 2, 4, 7, 7)
    assert model.traced.way == "export"
    assert problems(FoldBn(), model) == ""
    assert moved(FoldBn(), model, torch.randn(2, 4, 7, 7), torch.float64) < 1e-10


def test_shapes_are_known_without_numbers() -> None:
    shapes = graph_shapes(traced(ResNet(8), *IMAGES))
    assert shapes["stem"] == (2, 8, 16, 16)
    assert shapes["hidden"] == (2, 32)


@pytest.mark.claim
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_folding_batch_norms_is_exact(seed: int, measured: Measured) -> None:
    torch.manual_seed(seed)
    model = traced(ResNet(), *IMAGES, seed=seed)
    weights = sum(p.numel() for p in model.parameters())
    measured("reparam.fold_bn", "weights of the residual network", weights, above=0.25e6)
    worst = moved(FoldBn(), model, torch.randn(4, *IMAGES[1:]), torch.float64)
    measured("reparam.fold_bn", "moves a residual network by no more in float64", worst, below=1e-10)
    gone = len(model.gm.graph.nodes) - len(edited(FoldBn(), model).gm.graph.nodes)
    measured("reparam.fold_bn", "nodes that go, beside batch norms", abs(gone - norms(model)), below=0.5)
