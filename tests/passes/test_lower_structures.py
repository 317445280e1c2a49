"""Lowering of what is not a plain decoder: experts, recurrences, adapters, zeros; as torch has them."""

from __future__ import annotations

import faulthandler
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, MoE, Norm
from effc.compiler.blocks.gated_attention import GatedAttention
from effc.compiler.blocks.gated_linear_attention import GatedLinearAttention
from effc.compiler.blocks.liger_attention import LigerAttention
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.blocks.para_rnn import ParaRNN
from effc.compiler.blocks.quant_linear import QuantLinear
from effc.compiler.blocks.routed_lora import GatedLora
from effc.compiler.blocks.tempered import Tempered
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.kernels.cpu.check import isolated
from effc.passes.arch.residual_scale import ResidualScale
from effc.passes.lower.decoder import lower
from effc.passes.quantize.rtn import RTN
from effc.runtime.bench import bytes_per_token
from effc.runtime.decoder import ProgramDecoder, TorchDecoder, ready
from effc.runtime.kernel_table import kernels_of
from effc.runtime.stage import run_stage
from tests.compiler.conftest import FAMILIES, V, fill
from tests.passes.test_carve import carved
from tests.passes.test_lower import BATCH, LENGTH, in_turns, padded

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def stacked(
    mixers: Sequence[nn.Module], name: str = "moe", width: int = 32, vocab: int = V, heads: int = 4
) -> Model:
    """A decoder with a layer for each mixer, under its name; beside experts stands attention."""

    def layer(mixer: nn.Module) -> dict[str, nn.Module]:
        sizes = {"heads": heads, "kv_heads": heads // 2, "head_dim": width // 4}
        norms: dict[str, nn.Module] = {n: Norm(width=width) for n in ("norm1", "norm2")}
        if name == "moe":
            return norms | {"attention": Attention(width=width, rope=ROPE, **sizes), name: mixer}
        return norms | {name: mixer, "mlp": MLP(width=width, hidden=40)}

    head, table = Linear(in_features=width, out_features=vocab), Embedding(vocab=vocab, width=width)
    return fill(Model(assemble(table, [layer(m) for m in mixers], Norm(width=width), head)))


def packed(model: Model, **more: object) -> Model:
    method = RTN.model_validate({"bits": 4, "group": 16} | more)
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def best_two() -> MoE:
    return MoE(width=32, hidden=40, experts=5, active=2)


def mixtures() -> list[nn.Module]:
    """One of each kind."""
    plain: dict[str, Any] = {"renormalize": False, "gated": False, "activation": "gelu"}
    return [
        best_two(),
        MoE(width=32, hidden=48, experts=3, active=1, **plain),
        Tempered(width=32, hidden=32, experts=4, act="sigmoid", least=0.2),
        Tempered(width=32, hidden=24, experts=3, act="none", tau=1.0, activation="relu2"),
    ]


def recurrences() -> list[nn.Module]:
    """One of each kind: with a ring of keys and without, gates of channels, of slots and of heads."""
    own: dict[str, Any] = {"width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "rope": ROPE}
    gated: dict[str, Any] = {"width": 32, "heads": 2, "key_dim": 12, "value_dim": 20, "gate_rank": 4}
    return [
        LigerAttention(window=4, qk_norm=1e-6, **own),
        LigerAttention(window=4, form="gsa", slots=2, bias=True, cap=3.0, **own),
        LigerAttention(window=0, form="hgrn2", **own),
        LigerAttention(window=4, mix=1.0, **own),
        GatedLinearAttention(**gated),
        GatedLinearAttention(gating="scalar", out_gate="none", **gated),
    ]


def steps(model: Model, ours: Any) -> list[Tensor]:
    """Logits of a padded batch, then of four more tokens."""
    ids, mask = padded()
    vocab = model.module("embedding").vocab
    with torch.inference_mode():
        found = [ours.prefill(ids % vocab, mask)]
        return found + [ours.next((ids[:, i] + 7) % vocab) for i in range(4)]


def nearness(model: Model, threads: int = 2) -> float:
    """The largest difference from torch, of the largest logit."""
    due = steps(model, TorchDecoder(model, LENGTH + 4))
    found = steps(model, ProgramDecoder(ready(model, threads=threads), BATCH, LENGTH + 4))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, due, strict=True))


def test_mixtures_give_the_logits_of_their_model() -> None:
    assert nearness(stacked(mixtures())) <= 1e-5


def test_a_carved_model_asks_its_router_once(tiny: Model) -> None:
    """One choice before the first layer serves all of them; what all tokens pass is added."""
    model = carved(tiny, keep=0.5, shared=0.4).model
    assert nearness(model) <= 1e-5
    ops = [call.op for call in lower(model).plan.calls]
    assert ops.count("route") == 1
    assert ops.count("combine") == 6
    assert "elementwise" not in ops  # the stream goes through the common part into the chosen one


def test_packed_experts_stay_near_their_dense_values() -> None:
    """Rows are bytes, so logits differ by their rounding; here no rounding can change who is chosen."""
    model = packed(stacked(mixtures()[3:]), group=8)
    due, found = (
        torch.cat(steps(model, one))
        for one in (TorchDecoder(model, LENGTH + 4), ProgramDecoder(ready(model), BATCH, LENGTH + 4))
    )
    assert 0 < float((found - due).norm()) <= 0.05 * float(due.norm())


@pytest.mark.parametrize("form", ["mixture", "recurrence"])
def test_bits_do_not_depend_on_members_rows_or_grouping(form: str) -> None:
    """A prompt in one call, where experts have many rows and states pass many, or token by token."""
    mixers, name = ([best_two()], "moe") if form == "mixture" else (recurrences()[:2], "attention")
    model = packed(stacked(mixers, name), group=8)
    ids, _ = padded()
    seen = []
    for threads in (1, 2):
        made = ready(model, threads=threads)
        seen.append(ProgramDecoder(made, BATCH, LENGTH).prefill(ids, None))
        tokens = ProgramDecoder(made, BATCH, LENGTH)
        last = tokens.prefill(ids[:, :1], None)
        for i in range(1, LENGTH):
            last = tokens.next(ids[:, i])
        seen.append(last)
    assert all(torch.equal(one, seen[0]) for one in seen)


def test_experts_that_nobody_chose_are_not_read() -> None:
    """With weights that are no numbers they would show in every logit."""
    model = stacked([MoE(width=32, hidden=40, experts=4, active=1)])
    ids, name = torch.tensor([[3]]), "layers.0.moe.experts.down.weight"
    due = ProgramDecoder(ready(model, threads=1), 1, 4).prefill(ids, None)
    spoiled = 0
    for expert in range(4):
        other, weights = model.clone(), model.tensors()[name].detach().clone()
        weights[expert] = torch.nan
        other.place(name, nn.Parameter(weights))
        found = ProgramDecoder(ready(other, threads=1), 1, 4).prefill(ids, None)
        spoiled += bool(found.isnan().any())
        assert bool(found.isnan().any()) or torch.equal(found, due)
    assert spoiled == 1
    made = ready(model, threads=1)
    stack = sum(t.nbytes for name, t in made.program.tensors.items() if ".experts." in name)
    others = made.program.bytes - stack - model.module("embedding").weight.nbytes
    assert bytes_per_token(made) == others + stack // 4


def test_every_barrier_of_a_mixture_is_needed_and_a_missing_one_is_seen() -> None:
    mixer = MoE(width=128, hidden=96, experts=3, active=2)
    model = stacked([mixer], width=128, vocab=200, heads=6)
    made = ready(packed(model, group=32), threads=2)
    due, count = in_turns(made)
    backwards, _ = in_turns(made, backwards=True)
    assert torch.equal(backwards, due)

    def passed_over(call: str, order: bool, barrier: int) -> str:
        faulthandler.disable()  # numbers of experts that nobody has written may end the process
        return "" if torch.equal(in_turns(made, order, call, barrier)[0], due) else "other logits"

    for call in ("many", "few"):
        unseen = [
            k for k in range(count[call])
            if not any(isolated(partial(passed_over, call, order, k)) for order in (False, True))
        ]  # fmt: skip
        assert unseen == ([0] if call == "many" else []), call


def test_recurrences_give_the_logits_of_their_model() -> None:
    """Prompts as a recurrence over rows, then tokens; torch takes the chunk form for prompts."""
    assert nearness(stacked(recurrences(), "attention")) <= 1e-5


def test_a_state_does_not_grow_with_the_sequence_and_starts_empty() -> None:
    """One session, two prompts one after the other: the second is as if it came first."""
    made, ids = ready(stacked(recurrences(), "attention"), threads=2), padded()[0]
    short, long = (ProgramDecoder(made, BATCH, length) for length in (LENGTH, 40 * LENGTH))
    sizes = [sum(s.numel() for s in one.session.states) for one in (short, long)]
    assert sizes[0] == sizes[1] > 0
    first = short.prefill(ids, None)
    short.prefill(ids.flip(1), None)
    assert torch.equal(short.prefill(ids, None), first)


def test_calls_of_a_recurrence_read_one_matrix_for_all_their_rows() -> None:
    plan = lower(packed(stacked(recurrences()[:1], "attention"), group=8)).plan
    layer = [call for call in plan.calls if call.layer == 0]
    assert [call.op for call in layer] == [
        "norm", "quantize", "quant_linear", "write_cache", "attend", "elementwise", "prepare", "recur",
        "quantize", "quant_linear", "norm", "quantize", "quant_linear", "quantize", "quant_linear",
    ]  # fmt: skip
    assert layer[2].paths == tuple(f"layers.0.attention.{n}" for n in "qkv")
    assert [call.op for call in plan.calls if call.opens] == ["write_cache", "recur"]


def adapted(model: Model) -> Model:
    """An adapter over every linear of the layers."""
    rw, dice = Rewriter(model, "adapt.lora"), torch.Generator().manual_seed(2)
    for path, unit in list(rw.model.units()):
        if isinstance(unit, Linear | QuantLinear) and path.startswith("layers."):
            over = LoraLinear.over(unit, 4, 6.0, "rank")
            over.a = nn.Parameter(torch.randn(4, unit.in_features, generator=dice) * 0.1)
            over.b = nn.Parameter(torch.randn(unit.out_features, 4, generator=dice) * 0.1)
            rw.swap(path, over)
    return rw.done()


def test_an_adapter_costs_two_thin_products_and_no_pass_of_its_own() -> None:
    """Its number lies in a factor, its sum begins from what the layer gave."""
    model = adapted(fill(FAMILIES["llama"]()))
    assert nearness(model) <= 1e-5
    forms = [spec for call in lower(model).plan.calls for spec in call.specs if spec.op == "elementwise"]
    assert {spec.model_dump()["form"] for spec in forms} == {"silu", "mul"}
    plan = lower(adapted(packed(fill(FAMILIES["llama"]())))).plan
    layer = [call.op for call in plan.calls if call.layer == 1]
    assert layer.count("quant_linear") == 7
    assert layer.count("dense_linear") == 14


def test_thin_products_are_two_matrices() -> None:
    rw = Rewriter(fill(FAMILIES["llama"]()), "reparam.low_rank")
    for path, unit in list(rw.model.units()):
        if isinstance(unit, Linear) and ".mlp." in path:
            thin = LowRankLinear(in_features=unit.in_features, out_features=unit.out_features, rank=5)
            rw.swap(path, thin)
    assert nearness(fill(rw.done())) <= 1e-5


def test_gates_and_cells_give_the_logits_of_their_model() -> None:
    """A gate for each head, for each channel, behind the output; trained factors; cells of both kinds."""
    sizes: dict[str, Any] = {"width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "rope": ROPE}
    mixers: list[nn.Module] = [
        GatedAttention(**sizes),
        GatedAttention(kind="element", **sizes),
        GatedAttention(kind="element", position="after_o", **sizes),
        ParaRNN(width=32, tol=1e-9),
        ParaRNN(width=32, cell="lstm_cifg", jac="block2", heads=4, tol=1e-9),
    ]
    scale = ResidualScale.model_validate({"lambda": "learned"})
    rw = Rewriter(run_stage(scale, [stacked(mixers, "attention")], Context(seed=1)).model, "adapt.lora")
    up: Any = rw.model.module("layers.1.mlp")
    gated = GatedLora(in_features=40, out_features=32, rank=3, scale=2.0)
    gated.base = up.down
    rw.swap("layers.1.mlp.down", gated)
    assert nearness(fill(rw.done())) <= 1e-5


def pruned(model: Model, share: float) -> Model:
    """Of every four neighbors in the layers the first `share` of them at zero."""
    for name, tensor in model.tensors().items():
        if name.startswith("layers.") and tensor.ndim == 2:
            gone = torch.arange(tensor.shape[1]) % 4 < 4 * share
            model.place(name, nn.Parameter(tensor.detach().masked_fill(gone, 0)))
    return model


def test_zeros_are_left_out_where_they_are_enough() -> None:
    half, few = (packed(pruned(fill(FAMILIES["llama"]()), share), bits=8) for share in (0.5, 0.25))
    found, due = (torch.cat(steps(half, one)) for one in (
        ProgramDecoder(ready(half), BATCH, LENGTH + 4), TorchDecoder(half, LENGTH + 4)
    ))  # fmt: skip
    assert 0 < float((found - due).norm()) <= 0.03 * float(due.norm())
    layer = [call for call in lower(half).plan.calls if call.layer == 1]
    assert {call.op for call in layer if "linear" in call.op} == {"sparse_linear"}
    told = [call for call in lower(few).plan.calls if call.op == "quant_linear" and call.layer == 1]
    assert all("% of zeros leave" in call.why for call in told)
    assert len(told) == 4


def test_each_call_of_a_mixture_is_named() -> None:
    rows = kernels_of(stacked([best_two(), best_two()]))["rows"]
    found = {row["kernel"].split("_")[0]: row for row in rows if row["where"] == "layers 0-1"}
    assert {"route", "spread", "expert", "combine"} <= set(found)
    assert found["expert"]["why"] == "the weights are not packed"
