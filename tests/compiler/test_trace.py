"""Any module comes in: traced symbolically, else exported, else as a black box with open layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effc.compiler.blocks import Linear, Norm
from effc.compiler.cost import count
from effc.compiler.pattern import pattern
from effc.compiler.rewrite import Rewriter
from effc.compiler.show import show
from effc.compiler.trace import trace
from effc.specs.diagnostic import EffcError


def seeded(module: nn.Module) -> nn.Module:
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=stream) * 0.5 + 0.1)
    return module.requires_grad_(False)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.ln2(x))


class Unknown(nn.Module):
    """A transformer that no importer knows; it checks its input, which symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(30, 16), nn.Embedding(12, 16)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > 12:
            raise ValueError("too long")
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Branches(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        while float(x.norm()) < 10:
            x = x + self.small(x)
        return self.large(x) if float(x.sum()) > 0 else -x


def test_an_mlp_is_followed_symbolically() -> None:
    module = seeded(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3)))
    x = torch.randn(4, 6)
    model = trace(module, (x,))
    assert str(model.traced) == "traced by symbolic"
    assert torch.equal(model(x), module(x))
    assert torch.equal(model(x[:2]), module(x[:2]))
    assert isinstance(model.module("0"), Linear)
    assert isinstance(model.module("2"), Norm)
    assert [(p, r.name) for p, r in model.roles.items()] == [("0", "linear"), ("2", "norm"), ("3", "linear")]
    assert count(model).params == sum(p.numel() for p in module.parameters())


def test_a_network_with_batch_norm_and_residuals_keeps_its_layers() -> None:
    module, x = seeded(Net()), torch.randn(2, 3, 8, 8)
    model = trace(module, x)
    assert model.traced.way == "symbolic"
    torch.testing.assert_close(model(x), module.eval()(x))
    kinds = [model.roles[p].name for p in model.paths()]
    assert (kinds.count("conv"), kinds.count("norm"), kinds.count("linear")) == (5, 4, 1)
    assert str(model.roles["blocks.1.bn2"]) == "norm[1]"
    assert count(model).params == sum(t.numel() for t in (*module.parameters(), *module.buffers()))


def test_an_unknown_transformer_is_exported_and_rewritten() -> None:
    module, ids = seeded(Unknown()), torch.randint(0, 30, (2, 7))
    model = trace(module, (ids,))
    assert model.traced.way == "export"
    assert model.traced.tried[0].startswith("symbolic: TraceError")
    assert len(model.paths("linear")) == 9
    assert len(model.paths("norm")) == 4
    longer = torch.randint(0, 30, (3, 10))
    torch.testing.assert_close(model(longer), module(longer))
    assert model.ties() == {"head.weight": "tokens.weight"}
    hits = list(Rewriter(model).match(pattern("norm -> linear")))
    assert [(h["norm"], h["linear"]) for h in hits] == [
        (f"blocks.{i}.{norm}", f"blocks.{i}.{linear}")
        for i in (0, 1)
        for norm, linear in (("ln1", "qkv"), ("ln2", "mlp.0"))
    ]
    rw = Rewriter(model, "test")
    rw.write("blocks.1.out", "weight", torch.zeros(16, 16))
    out = rw.done()
    want = module(ids)
    with torch.no_grad():
        module.blocks[1].out.weight.zero_()
    torch.testing.assert_close(out(ids), module(ids))
    torch.testing.assert_close(model(ids), want)


def test_control_flow_on_data_falls_to_module_level_and_says_why() -> None:
    module, x = seeded(Branches()), torch.randn(2, 6)
    model = trace(module, (x,))
    assert model.traced.way == "module"
    assert [why.split(":")[0] for why in model.traced.tried] == ["symbolic", "export"]
    for sign in (1, -1):
        torch.testing.assert_close(model(x.abs() * sign), module(x.abs() * sign))
    assert model.paths("linear") == ["module.large", "module.small"]
    rw = Rewriter(model, "test")
    rw.swap("module.large", Linear(in_features=6, out_features=6))
    rw.write("module.large", "weight", torch.eye(6))
    out = rw.done()
    big = torch.ones(2, 6) * 9
    torch.testing.assert_close(out(big), big)
    assert not torch.allclose(model(big), big)


def test_tracing_leaves_the_module_alone() -> None:
    module = seeded(Net())
    before = {name: t.clone() for name, t in module.state_dict().items()}
    model = trace(module, torch.randn(2, 3, 8, 8))
    assert module.training
    model.place("head.weight", torch.zeros(5, 4))
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert isinstance(module.head, nn.Linear)


def test_inputs_that_do_not_run_are_refused() -> None:
    with pytest.raises(EffcError, match="Sequential does not run on the example inputs"):
        trace(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 4))


def test_a_traced_model_prints() -> None:
    text = show(trace(seeded(Net()), torch.randn(2, 3, 8, 8)))
    assert "blocks.0.conv1" in text
    assert "Conv2d" in text
