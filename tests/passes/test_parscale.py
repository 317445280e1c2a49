"""Parallel streams: what they share, what tells them apart, what they cost, and how they generate."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler.blocks import Unit
from effc.compiler.blocks.streams import Aggregate, Prefix, PrefixAttention, Streams
from effc.compiler.contract import EXACT, HEALED
from effc.compiler.cost import cache_bytes, count
from effc.compiler.exporter import inexpressible
from effc.compiler.isolation import isolation
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.spent import counting
from effc.compiler.trained import parameters
from effc.passes.grow.parscale import ParScale
from effc.passes.quantize.rtn import RTN
from effc.runtime.generate import generate
from effc.runtime.smaller import smaller
from effc.runtime.stage import run_stage
from tests.compiler.conftest import DECODERS, bert, fill

from .skipped import stepped
from .tiny_models import blank, filled, outputs

IDS = torch.randint(0, 48, (3, 9), generator=torch.Generator().manual_seed(2))


def grown(model: Model, **more: Any) -> Model:
    method = ParScale.model_validate({"streams": 3, "prefix": 4, "prefix_std": 0.7} | more)
    return run_stage(method, [model], Context(seed=1)).model


@pytest.fixture(params=DECODERS)
def family(request: pytest.FixtureRequest) -> Model:
    return fill(DECODERS[request.param]())


def test_equal_streams_are_the_model_itself(family: Model) -> None:
    same = grown(family, prefix=0)
    assert float((outputs(same, IDS) - outputs(family, IDS)).abs().max()) <= 1e-5
    assert ParScale(prefix=0).contract.fidelity == EXACT
    assert ParScale().contract.fidelity == HEALED
    (warning,) = ParScale(prefix=0).refuses(family)
    assert (warning.code, warning.severity) == ("W332", "warning")


def test_prefixes_tell_streams_apart(family: Model) -> None:
    model = grown(family)
    assert float((outputs(model, IDS) - outputs(family, IDS)).abs().max()) > 1e-2
    seen: list[Tensor] = []
    model.module("norm").register_forward_hook(lambda _m, _a, y: seen.append(y))
    outputs(model, IDS)
    one, two, three = seen[0].unflatten(0, (3, -1))
    assert not torch.allclose(one, two, atol=1e-3)
    assert not torch.allclose(two, three, atol=1e-3)


def test_a_prefix_is_keys_and_values_at_no_position() -> None:
    """One head by hand: every query sees the prefix, whatever its position, and keys turn as without one."""
    block = PrefixAttention(
        width=8, heads=1, kv_heads=1, head_dim=8, streams=2, prefix_length=2, rope={"rope_theta": 100.0}
    )
    stream = torch.Generator().manual_seed(0)
    for name, tensor in list(block.named_parameters()):
        path, _, slot = name.rpartition(".")
        value = torch.randn(tensor.shape, generator=stream)
        setattr(block.get_submodule(path), slot, torch.nn.Parameter(value, requires_grad=False))
    x = torch.randn(2, 3, 8, generator=stream)  # one row in two streams
    step = filled(blank(layers=1)).step(torch.zeros(1, 3, dtype=torch.int64))
    got = block.mixed(x, step)
    angle = torch.arange(3)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))

    def turned(t: Tensor) -> Tensor:
        return t * cos + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin

    for p in range(2):
        q, k, v = (x[p] @ w.weight.T for w in (block.q, block.k, block.v))
        k = torch.cat((block.prefix.k[p, 0], turned(k)))
        v = torch.cat((block.prefix.v[p, 0], v))
        seen = torch.ones(3, 5).tril(2).bool()
        scores = (turned(q) @ k.T / 8**0.5).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(got[p], scores.softmax(-1) @ v, rtol=1e-4, atol=1e-4)


def test_the_sum_is_weighed_and_smoothed() -> None:
    block = Aggregate(width=2, streams=2, smoothing=0.1)
    block.mix.weight = torch.nn.Parameter(torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0]]))
    block.score.weight = torch.nn.Parameter(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
    x = torch.tensor([[[1.0, 5.0]], [[0.0, 7.0]]])  # one token in two streams
    score = 4 * torch.tensor([1.0, 0.0]) * torch.sigmoid(torch.tensor([1.0, 0.0]))
    w = score.softmax(-1) * 0.9 + 0.05
    torch.testing.assert_close(block(x)[0, 0], w @ x[:, 0])


def test_sizes_and_work_follow_the_formulas(family: Model) -> None:
    model, before = grown(family), count(family, 16)
    after = count(model, 16)
    attentions = [u for _, u in model.units() if isinstance(u, PrefixAttention)]
    norm: Any = model.module("norm")
    d = norm.width
    pairs = sum(2 * 3 * u.kv_heads * 4 * u.head_dim for u in attentions)
    assert after.params - before.params == pairs + 3 * d * d + 3 * d
    head: Any = model.module("head")
    outside = 2 * head.in_features * head.out_features
    seen = sum(4 * 4 * u.heads * u.head_dim for u in attentions)
    assert after.flops_per_token == 3 * (before.flops_per_token - outside + seen) + outside + 2 * 3 * d * (
        d + 1
    )
    assert after.kv_bytes_per_token == 3 * before.kv_bytes_per_token
    assert after.state_bytes == pairs * 4
    with counting(model, 16) as found:
        outputs(model, IDS)
    mixed = [u for _, u in family.units() if "MoE" in type(u).__name__]
    assert mixed or found.flops_per_token == after.flops_per_token


def test_the_cache_holds_every_stream_and_is_as_predicted(family: Model) -> None:
    model = grown(family)
    whole = outputs(model, IDS)
    for first in (1, 4):
        steps, cache = stepped(model, IDS, first)
        torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)
        assert cache.bytes == 3 * cache_bytes(model, 9)


def test_a_padded_batch_is_its_rows_alone(family: Model) -> None:
    model = grown(family)
    rows = [IDS[0, :9], IDS[1, :4], IDS[2, :6]]
    ids = torch.stack([torch.cat((torch.zeros(9 - len(r), dtype=torch.int64), r)) for r in rows])
    mask = torch.stack([torch.arange(9) >= 9 - len(r) for r in rows])
    together = generate(model, ids, mask, max_new_tokens=6)
    for row, prompt in zip(together, rows, strict=True):
        assert row[9:].tolist() == generate(model, prompt[None], max_new_tokens=6)[0, len(prompt) :].tolist()


def test_blocks_are_their_ops(family: Model) -> None:
    model = grown(family)
    for mask in (None, torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [1] * 8 + [0]])):
        step = model.step(IDS, mask)
        seen: dict[str, Tensor] = {}
        blocks = [str(n.target) for n in model.gm.graph.nodes if n.op == "call_module"]
        for path in blocks:
            keep = partial(_keep, seen, path)
            model.module(path).register_forward_pre_hook(keep)
        with torch.no_grad():
            model(IDS, step=step)
        for path in blocks:
            block = model.module(path)
            assert isinstance(block, Unit)
            want = block(seen[path], step) if block.takes_step else block(seen[path])
            got, _ = evaluate(expand(block), block, seen[path], step)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _keep(seen: dict[str, Tensor], path: str, _: object, args: tuple[Tensor, ...]) -> None:
    seen[path] = args[0]


def test_streams_are_no_rows_of_the_batch() -> None:
    found = isolation(grown(filled(blank(layers=2)), streams=2))
    assert found.isolated, found.leaks
    assert any(phase.startswith("decode") for phase in found.phases)


def test_new_parts_can_be_trained_alone_and_the_rest_packed() -> None:
    model = grown(filled(blank(layers=2)))
    names = parameters(model, ("prefix", "aggregate"))
    assert (
        sum(model.tensors()[n].numel() for n in names)
        == count(model).params - count(filled(blank(layers=2))).params
    )
    small = run_stage(RTN(bits=8), [model], Context()).model
    assert isinstance(small.module("layers.0.attention.prefix"), Prefix)
    assert small.generate(IDS, max_new_tokens=3).shape == (3, 12)
    assert inexpressible(model)
    model.architecture = ""
    assert bool(torch.isfinite(outputs(smaller(model).materialize(), IDS)).all())


def test_what_cannot_run_in_streams_is_refused(tiny: Model) -> None:
    from .test_skipping import scheduled

    for model, code, words in [
        (bert(), "E320", "needs a decoder"),
        (grown(tiny), "E325", "in streams already"),
        (scheduled(tiny), "E320", "softmax attention in every layer"),
    ]:
        (problem,) = ParScale().refuses(model)
        assert problem.code == code
        assert words in problem.title
    for wrong in ({"streams": 1}, {"streams": 9}, {"prefix": -1}, {"smoothing": 1.5}, {"prefix_std": 0.0}):
        with pytest.raises(ValueError, match="validation error"):
            ParScale.model_validate(wrong)
    with pytest.raises(ValueError, match="none to be parallel"):
        Streams(streams=1)
