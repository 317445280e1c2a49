"""No output row depends on another: proved for models, refuted for nets that leak, held to numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from effc.compiler.isolation import Isolation, isolation
from effc.compiler.labels import ROWS, Flow, Labelling, union
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.trace import trace
from effc.passes.quantize.rtn import RTN
from effc.passes.reparam.low_rank import LowRank

from .conftest import FAMILIES, fill


class Net(nn.Module):
    """y = head(what f makes of hidden(x)), x [B, T, 6]."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.head, self.f = nn.Linear(6, 8), nn.Linear(8, 4), f

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.f(torch.relu(self.hidden(x))))
        return out


def proof(f: Callable[[Tensor], Tensor], **more: Any) -> Isolation:
    return isolation(trace(Net(f), torch.randn(2, 5, 6)), **more)


def fake_quantized(x: Tensor, axes: Any) -> Tensor:
    """8 bits, a scale for what lies along `axes` (everything when None)."""
    peak = x.abs().amax() if axes is None else x.abs().amax(axes, keepdim=True)
    scale = peak / 127 + 1e-6
    return torch.round(x / scale) * scale


def capacity(x: Tensor) -> Tensor:
    """Of all tokens of the batch, the first ones that choose an expert are taken, later ones dropped."""
    flat = x.flatten(0, 1)
    chosen = flat.argmax(-1)
    place = (chosen[:, None] == torch.arange(8)).long().cumsum(0).gather(1, chosen[:, None])
    return (flat * (place <= 2)).view_as(x)


LEAKS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a maximum times zero": (lambda x: x * 0 + x.max(), "max"),
    "rolled rows": (lambda x: torch.roll(x, 1, 0), "roll"),
    "one scale for the tensor": (lambda x: fake_quantized(x, None), "amax"),
    "experts with a capacity": (capacity, "cumsum"),
    "mean over the batch": (lambda x: x - x.mean(0, keepdim=True), "mean"),
    "sorted tokens": (lambda x: x.flatten(0, 1).sort(0).values.view_as(x), "sort"),
    "best tokens": (lambda x: x.flatten(0, 1).topk(3, 0).values.sum() + x, "topk"),
    "rows times rows": (lambda x: torch.matmul(x.flatten(1) @ x.flatten(1).T, x.flatten(1)).view_as(x), "mm"),
    "flipped": (lambda x: x.flip(0), "flip"),
    "the row with the largest number": (lambda x: x + x[x[:, 0, 0].argmax()], "argmax"),
    "rows in the order of numbers": (lambda x: x[x[:, 0, 0].argsort()], "sort"),
    "softmax over rows": (lambda x: torch.softmax(x, 0), "_softmax"),
    "an attention over the batch": (
        lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1),
        "bmm",
    ),
}
KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "a scale for each token": lambda x: fake_quantized(x, -1),
    "a scale for each row": lambda x: fake_quantized(x, (1, 2)),
    "attention over tokens": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "best tokens of a row": lambda x: x.topk(3, 1).values.sum(1, keepdim=True) + x,
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "group norm": lambda x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "flattened and back": lambda x: torch.relu(x.reshape(-1, 8)).view(x.shape[0], -1, 8),
    "running sums of a row": lambda x: x.cumsum(1),
    "windows": lambda x: F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).sum(-1),
    "masked": lambda x: torch.where(x > 0.1, x, x.new_zeros(())),
    "in place": lambda x: x.clone().mul_(2).add_(1),
    "written to a slice": lambda x: _written(x),
}


def _written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return y


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_found_and_named(name: str) -> None:
    f, op = LEAKS[name]
    found = proof(f)
    assert not found.isolated
    assert op in [leak.op for leak in found.leaks]
    leak = next(leak for leak in found.leaks if leak.op == op)
    assert leak.repair
    assert leak.node not in ("hidden", "head")
    assert set(leak.rows) <= {0, 1}


@pytest.mark.parametrize("name", KEEPS)
@pytest.mark.parametrize("batch", [2, 3])
def test_what_keeps_rows_apart_is_proved(name: str, batch: int) -> None:
    found = proof(KEEPS[name], batch=batch)
    assert found.isolated, found.leaks
    assert found.outputs == batch * 5 * 4


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_proved(name: str) -> None:
    found = isolation(fill(FAMILIES[name]()))
    assert found.isolated, found.leaks
    assert not found.random
    if name not in ("bert", "vit"):
        assert found.phases == (
            "prefill, whole rows", "decode, whole rows", "prefill, padded rows", "decode, padded rows"
        )  # fmt: skip


def test_packed_and_factored_models_are_proved() -> None:
    model = fill(FAMILIES["llama"]())
    for method in (RTN(bits=4, group=16), LowRank(rank=4, select=("mlp",))):
        rw = Rewriter(model)
        if isinstance(method, RTN):
            method.rewrite(rw)
        else:
            method.outline(rw, ())
        changed = rw.done()
        assert isolation(fill(changed) if not isinstance(method, RTN) else changed).isolated


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)).mean((2, 3))
        return out


def test_batch_statistics_leak_in_training_alone() -> None:
    model = trace(Normed(), torch.randn(2, 2, 6, 6))
    assert isolation(model).isolated
    before = {name: t.clone() for name, t in model.tensors().items()}
    found = isolation(model, training=True)
    assert [leak.node for leak in found.leaks] == ["bn"]
    assert "statistics of the batch" in found.leaks[0].why
    assert ".eval()" in found.leaks[0].repair
    assert all(torch.equal(t, before[name]) for name, t in model.tensors().items()), "nothing was trained"


def test_decisions_of_the_program_are_told() -> None:
    class Early(nn.Module):
        """Stops when the whole batch is sure; tracing cannot follow it, so its layers run as they are."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x)
            return y if float(y.max()) > 1e9 else self.b(y)

    model = trace(Early(), torch.randn(2, 6))
    assert model.traced.way == "module"
    found = isolation(model)
    assert not found.isolated
    assert any("decide" in leak.why for leak in found.leaks)


def test_random_numbers_are_told_but_are_no_leak() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    model = trace(module, torch.randn(2, 6))
    assert isolation(model).random == ()
    found = isolation(model, training=True)
    assert found.isolated
    assert found.random == ("training",)


def test_one_row_shows_nothing() -> None:
    with pytest.raises(ValueError, match="1 rows; between 2 and 8"):
        proof(lambda x: x, batch=1)


def test_training_of_blocks_is_followed_by_their_own_code() -> None:
    found = isolation(fill(FAMILIES["llama"]()), training=True)
    assert found.isolated, found.leaks
    assert found.phases == ("training, whole rows", "training, padded rows")


# ---- held to numbers

STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "mean of batch": lambda x: x - 0.5 * x.mean(0, keepdim=True),
    "mean of row": lambda x: x - 0.5 * x.mean(1, keepdim=True),
    "roll tokens": lambda x: x.roll(1, 1),
    "roll rows": lambda x: x + x.roll(1, 0),
    "softmax": lambda x: torch.softmax(x, -1),
    "scale of all": lambda x: x / (x.abs().amax() + 1),
    "scale of token": lambda x: x / (x.abs().amax(-1, keepdim=True) + 1),
    "product": lambda x: x @ torch.hann_window(16, dtype=x.dtype).view(4, 4),
    "attention": lambda x: x + F.scaled_dot_product_attention(x, x, x),
    "flat": lambda x: (x.reshape(-1, 4) * 2).view_as(x),
    "sums": lambda x: x + x.flatten(0, 1).cumsum(0).view_as(x),
    "sums of row": lambda x: x + x.cumsum(1),
    "transposed": lambda x: x + x.transpose(0, 1).contiguous().transpose(0, 1).sin(),
    "stacked": lambda x: torch.stack((x, x.cos())).sum(0),
    "half": lambda x: torch.cat((x[..., :2], x[..., 2:].tanh()), -1),
}


def verdict(names: list[str]) -> tuple[bool, bool]:
    """Whether a chain of steps is proved isolated, and whether changing other rows changed a row."""
    rows = 3
    x = torch.randn(rows, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(len(names)))

    def run(x: Tensor) -> Tensor:
        for name in names:
            x = STEPS[name](x)
        return x

    flow = Flow()
    flow.rows_of(x)
    with torch.no_grad(), Labelling(flow):
        y = run(x)
    own = 1 << torch.arange(rows)
    proved = not bool((flow.of(y) & ROWS & ~own.view(-1, 1, 1)).any())
    moved = False
    for row in range(rows):
        other = x.clone()
        other[[r for r in range(rows) if r != row]] += torch.randn(rows - 1, 5, 4, dtype=torch.float64) + 3
        moved = moved or not torch.equal(run(other)[row], run(x)[row])
    return proved, moved


@pytest.mark.parametrize("name", STEPS)
def test_the_verdict_is_that_of_numbers(name: str) -> None:
    proved, moved = verdict([name])
    assert proved != moved


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=6))
def test_no_chain_that_is_proved_is_moved_by_other_rows(names: list[str]) -> None:
    """A later step may undo what a leak did, as a shift before a softmax, so the converse does not hold."""
    proved, moved = verdict(names)
    assert not (proved and moved), names


def test_labels_are_sets() -> None:
    flow = Flow()
    x = torch.randn(3, 2)
    flow.rows_of(x)
    assert flow.of(x).tolist() == [[1, 1], [2, 2], [4, 4]]
    assert int(union(flow.of(x), None)) == 7
    assert union(flow.of(x), [0]).tolist() == [[7, 7]]
    with torch.no_grad(), Labelling(flow):
        view = x.t()
        view[0].add_(view[1])
        x[0] = x[1]
    assert flow.of(x).tolist() == [[2, 2], [2, 2], [4, 4]], "a write through a view is seen"


def test_isolated_models_hold_in_numbers() -> None:
    """The same on a real model: other rows are replaced, this one stays bit for bit."""
    model: Model = fill(FAMILIES["mixtral"]())
    ids = torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[1:] = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(model(ids)[0], model(other)[0], atol=1e-6)
