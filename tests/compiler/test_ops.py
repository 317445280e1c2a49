"""Every block's expansion into ops computes what its forward computes, in every phase and dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from effc.compiler.blocks import Unit
from effc.compiler.model import Model
from effc.compiler.op_graph import Ops, evaluate, expand
from effc.compiler.ops import OPS
from effc.compiler.step import Cache

Ids = Callable[..., torch.Tensor]


def walk(model: Model, ids: torch.Tensor, mask: torch.Tensor | None) -> int:
    """Check every block of a graph on the activations that reach it."""
    step = model.step(ids, mask)
    seen: dict[str, torch.Tensor] = {}
    blocks = [str(n.target) for n in model.gm.graph.nodes if n.op == "call_module"]
    for path in blocks:
        module = model.module(path)
        module.register_forward_pre_hook(lambda m, args, path=path: seen.__setitem__(path, args[0]))
    model(ids, step=step)
    for path in blocks:
        block = model.module(path)
        assert isinstance(block, Unit)
        want = block(seen[path], step) if block.takes_step else block(seen[path])
        got, _ = evaluate(expand(block), block, seen[path], step)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda text, p=path: f"{p}: {text}")
    return len(blocks)


def test_expansion_equals_forward(family: Model, ids: Ids) -> None:
    x = ids(family, 3, 8)
    assert walk(family, x, None) >= 9


def test_expansion_equals_forward_with_padding(decoder: Model, ids: Ids) -> None:
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :5] = 0
    mask[2, 6:] = 0
    walk(decoder, ids(decoder, 3, 8), mask)


def test_the_cache_is_a_value(decoder: Model, ids: Ids) -> None:
    x, cache = ids(decoder, 2, 8), Cache(8)
    block = decoder.module("layers.1.attention")
    stream = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(3))
    graph, past, parts = expand(block), None, []
    for start, end in ((0, 5), (5, 7), (7, 8)):
        step = decoder.step(x[:, start:end], None, cache)
        y, past = evaluate(graph, block, stream[:, start:end], step, past)
        torch.testing.assert_close(y, block(stream[:, start:end], step), rtol=1e-5, atol=1e-5)
        cache.filled = end
        parts.append(y)
    whole = block(stream, decoder.step(x))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert past[0].shape[2] == 8


def test_an_expansion_prints_as_assignments(made: Callable[[str], Model]) -> None:
    lines = str(expand(made("llama").module("layers.0.mlp"))).splitlines()
    assert lines[0] == "(%0 x, %1 step, %2 past)"
    assert lines[1:3] == ["%3 = weight(name = up.weight)", "%4 = linear(%0, %3, none)"]
    assert lines[-1] == f"return %{2 + len(lines) - 2}"


def test_the_set_is_closed() -> None:
    ops = Ops()
    with pytest.raises(TypeError, match="no op 'einsum'"):
        ops("einsum", ops.x)
    with pytest.raises(TypeError, match=r"softcap has the attributes \['cap'\]"):
        ops("softcap", ops.x, limit=3)
    with pytest.raises(TypeError, match="linear takes x, w, b; got 1"):
        ops("linear", ops.x)
    assert 25 <= len(OPS) <= 140
