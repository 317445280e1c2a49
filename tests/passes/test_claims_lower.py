"""What a C program is for where layers are not plain: experts, recurrences, zeros; against the other way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, MoE, Norm
from effc.compiler.blocks.liger_attention import LigerAttention
from effc.compiler.model import Model
from effc.passes.lower import _matrices
from effc.passes.lower.decoder import lower
from effc.runtime.decoder import ProgramDecoder, TorchDecoder, ready
from tests.claims import Measured
from tests.compiler.conftest import fill
from tests.passes.test_lower_structures import packed, pruned

pytestmark = pytest.mark.claim
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PROMPT, TOKENS, ROUNDS, VOCAB = 32, 12, 5, 512


def stacked(layer: Callable[[], dict[str, nn.Module]], width: int, layers: int) -> Model:
    """A model of equal layers; its numbers stay small, so that nothing overflows."""
    table, head = Embedding(vocab=VOCAB, width=width), Linear(in_features=width, out_features=VOCAB)
    model = fill(Model(assemble(table, [layer() for _ in range(layers)], Norm(width=width), head)))
    for name, tensor in model.tensors().items():
        if tensor.ndim > 1:
            model.place(name, nn.Parameter(tensor.detach() * 0.1))
    return model


def attention(width: int) -> Attention:
    return Attention(width=width, heads=8, kv_heads=8, head_dim=width // 8, rope=ROPE)


def per_token(*engines: Any) -> list[float]:
    """Seconds of a token of each, the median of rounds that take turns."""
    ids = torch.arange(PROMPT)[None] * 7 % VOCAB
    found: list[list[float]] = [[] for _ in engines]
    with torch.inference_mode():
        for engine in engines:
            engine.prefill(ids, None)
        for _ in range(ROUNDS):
            for engine, seconds in zip(engines, found, strict=True):
                start = time.perf_counter()
                for i in range(TOKENS):
                    engine.next(ids[:, i])
                seconds.append((time.perf_counter() - start) / TOKENS)
    return [statistics.median(seconds) for seconds in found]


ROOM = PROMPT + TOKENS * ROUNDS


def program(model: Model) -> ProgramDecoder:
    return ProgramDecoder(ready(model, threads=1), 1, ROOM)


def norms(width: int) -> dict[str, nn.Module]:
    return {name: Norm(width=width) for name in ("norm1", "norm2")}


def test_experts_decode_faster_than_in_torch(measured: Measured) -> None:
    """Two of eight experts, four bits in C against float32 in torch, one thread."""

    def layer() -> dict[str, nn.Module]:
        return norms(512) | {
            "attention": attention(512),
            "moe": MoE(width=512, hidden=1024, experts=8, active=2),
        }

    torch.set_num_threads(1)
    dense = stacked(layer, 512, 4)
    plain, c = per_token(TorchDecoder(dense, ROOM), program(dense))
    small, _ = per_token(program(packed(dense.clone(), group=64)), program(dense))
    measured("lower", "2 of 8 experts, float32: seconds in torch over those in C", plain / c, above=1)
    measured("lower", "2 of 8 experts: seconds of float32 in torch over 4 bits in C", plain / small, above=4)


def test_a_recurrence_decodes_faster_than_in_torch(measured: Measured) -> None:
    """A window of 64 beside a recurrence, four bits in C against float32 in torch, one thread."""

    def layer() -> dict[str, nn.Module]:
        block = LigerAttention(width=512, heads=8, kv_heads=8, head_dim=64, window=64, rope=ROPE)
        return norms(512) | {"attention": block, "mlp": MLP(width=512, hidden=1536)}

    torch.set_num_threads(1)
    dense = stacked(layer, 512, 6)
    plain, c = per_token(TorchDecoder(dense, ROOM), program(dense))
    small, _ = per_token(program(packed(dense.clone(), group=64)), program(dense))
    measured("lower", "liger, float32: seconds in torch over those in C", plain / c, above=1)
    measured("lower", "liger: seconds of float32 in torch over 4 bits in C", plain / small, above=4)


def test_zeros_that_are_left_out_save_time(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four weights at zero, 8 bits, in C: without the zeros and with them; the same logits."""

    def layer() -> dict[str, nn.Module]:
        return norms(1024) | {"attention": attention(1024), "mlp": MLP(width=1024, hidden=2816)}

    torch.set_num_threads(1)
    half = packed(pruned(stacked(layer, 1024, 6), 0.5), bits=8, group=128)
    with monkeypatch.context() as patch:
        patch.setattr(_matrices, "SOME", 2.0)
        whole = program(half.clone())
    sparse = program(half)
    assert any(call.op == "sparse_linear" for call in lower(half).plan.calls)
    ids = torch.arange(PROMPT)[None]
    assert torch.equal(whole.prefill(ids, None), sparse.prefill(ids, None))
    with_zeros, without = per_token(whole, sparse)
    sizes = [one.session.program.bytes for one in (sparse, whole)]
    measured("lower", "2:4 at 8 bits: bytes without zeros over with them", sizes[0] / sizes[1], below=0.7)
    measured("lower", "2:4 at 8 bits: seconds with zeros over those without", with_zeros / without, above=1.1)
