"""Mixtures of experts: what upcycling makes, how tokens are routed, what a balance loss says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effc.compiler import graph_json
from effc.compiler.auxiliary import answered, usage
from effc.compiler.blocks.moe import MoE, best
from effc.compiler.cost import count
from effc.compiler.method import Batch, Context
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.step import Step
from effc.passes.adapt.full import Full
from effc.passes.adapt.lora import Lora
from effc.passes.distill.logits import Logits
from effc.passes.moe.upcycle import Upcycle
from effc.passes.quantize.gptq import GPTQ
from effc.passes.quantize.rtn import RTN
from effc.passes.tie.recursive import Recursive
from effc.runtime.calibrate import calibrate
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.specs.recipe import Ref
from effc.specs.select import Rule

from .tiny_models import HIDDEN, WIDTH, Sequences, blank, filled, on_meta, outputs

IDS = torch.arange(36).view(3, 12)
CODE = Ref("code")
FORMS: dict[str, Any] = {"data": CODE, "steps": 2, "batch": 4, "precision": "fp32"}


def upcycled(model: Model, **arguments: object) -> Model:
    method = Upcycle.model_validate({"experts": 4} | arguments)
    rw = Rewriter(model, method.kind)
    torch.manual_seed(5)
    method.rewrite(rw)
    return rw.done()


def test_every_second_block_becomes_a_mixture_of_itself(tiny: Model) -> None:
    made = upcycled(tiny, top_k=3)
    feed = 3 * WIDTH * HIDDEN
    assert [n for n, unit in made.units() if isinstance(unit, MoE)] == [f"layers.{i}.moe" for i in (1, 3, 5)]
    before, after = count(tiny), count(made)
    assert after.params - before.params == 3 * (3 * feed + WIDTH * 4)
    assert after.flops_per_token - before.flops_per_token == 3 * (2 * 2 * feed + 2 * WIDTH * 4)
    assert after.kv_bytes_per_token == before.kv_bytes_per_token
    for expert in range(4):
        for name in ("gate", "up", "down"):
            mine = made.module(f"layers.3.moe.experts.{name}").weight[expert]
            assert torch.equal(mine, tiny.module(f"layers.3.mlp.{name}").weight)
    routers = torch.stack([made.module(f"layers.{i}.moe.router").weight for i in (1, 3, 5)])
    assert float(routers.std()) == pytest.approx(0.02, rel=0.15)
    assert not torch.equal(routers[0], routers[1])


def test_the_function_stays_where_weights_sum_to_one(tiny: Model) -> None:
    want = outputs(tiny, IDS)

    def moved(**arguments: object) -> float:
        return float((outputs(upcycled(tiny, **arguments), IDS) - want).norm() / want.norm())

    assert moved() < 1e-6
    assert moved(top_k=1) < 1e-6
    assert moved(top_k=4, every=1) < 1e-6
    assert moved(renorm=False) > 0.05
    assert moved(noise=0.5) > 0.01
    assert str(Upcycle.contract.fidelity) == "EXACT when renorm = true and noise = 0.0, else HEALED"
    assert Upcycle().contract.fidelity.name == "EXACT"
    assert Upcycle(noise=0.1).contract.fidelity.name == "HEALED"


def test_noise_parts_experts_and_leaves_zeros(tiny: Model) -> None:
    weight = tiny.module("layers.1.mlp.up").weight
    tiny.place("layers.1.mlp.up.weight", torch.where(weight.abs() < 0.05, 0.0, weight.detach()))
    made = upcycled(tiny, noise=0.3, every=2).module("layers.1.moe.experts.up").weight
    assert bool((made[:, tiny.module("layers.1.mlp.up").weight == 0] == 0).all())
    gap = made - tiny.module("layers.1.mlp.up").weight
    assert float(gap[gap != 0].std()) == pytest.approx(0.3 * float(weight.std()), rel=0.1)
    assert not torch.equal(made[0], made[1])


def test_the_router_breaks_ties_by_number() -> None:
    p = torch.tensor([[0.2, 0.3, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.1, 0.7]])
    weights, chosen = best(p, 2, renormalize=True)
    assert chosen.tolist() == [[1, 3], [0, 1], [3, 0]]
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert best(p, 4, renormalize=False)[0].sum(1).tolist() == pytest.approx([1, 1, 1])
    one, _ = best(p, 1, renormalize=True)
    assert one.flatten().tolist() == [1, 1, 1]


def test_softmax_before_or_after_the_choice_is_the_same(mixture: Model) -> None:
    moe, x = (
        mixture.module("layers.0.moe"),
        torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)),
    )
    assert isinstance(moe, MoE)
    weights, chosen = moe.route(x)
    kept = moe.router(x).gather(1, chosen).softmax(-1)
    torch.testing.assert_close(weights, kept, rtol=0, atol=1e-6)


def test_grouping_rows_changes_no_row(mixture: Model) -> None:
    moe, x = (
        mixture.module("layers.0.moe"),
        torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)),
    )
    assert isinstance(moe, MoE)
    whole = moe(x)
    apart = torch.cat([moe(x[i : i + 1]) for i in range(50)])
    torch.testing.assert_close(whole, apart, rtol=1e-5, atol=1e-6)
    weights, chosen = moe.route(x)
    plain = torch.stack(
        [sum(w * moe.experts.expert(row, int(e)) for w, e in zip(ws, es, strict=True))  # type: ignore[misc]
         for row, ws, es in zip(x[:, None], weights, chosen, strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(whole, plain[:, 0], rtol=1e-5, atol=1e-6)


def test_a_full_expert_drops_tokens_in_training_alone(mixture: Model) -> None:
    moe = mixture.module("layers.0.moe")
    assert isinstance(moe, MoE)
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    free, (_, chosen) = moe(x), moe.route(x)
    moe.capacity = 1.0
    assert torch.equal(moe(x), free)
    moe.train()
    _, held = moe.route(x)
    dropped = held == 4
    assert 0 < int(dropped.sum()) < 40
    assert bool((held.where(~dropped, chosen) == chosen).all())
    assert int(torch.bincount(held.flatten())[:4].max()) == 32  # 64 tokens, 2 slots, 4 experts
    first = torch.bincount(held[:, 0], minlength=5)[4]
    assert first <= torch.bincount(held[:, 1], minlength=5)[4], "second choices yield to first ones"
    lost = dropped.all(1)
    assert torch.equal(moe(x)[lost], torch.zeros_like(x[lost]))


def test_jitter_acts_in_training_alone(mixture: Model) -> None:
    moe, x = (
        mixture.module("layers.0.moe"),
        torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)),
    )
    assert isinstance(moe, MoE)
    want = moe(x)
    moe.jitter = 0.5
    assert torch.equal(moe(x), want)
    moe.train()
    torch.manual_seed(0)
    assert not torch.allclose(moe(x), want)


class Routed(nn.Module):
    """A model of one mixture, on whose routing the input decides: x [1, T, E] are its scores."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.moe = MoE(width=4, hidden=4, experts=4, active=1, balance=1.0, **arguments)
        for path, tensor in list(self.moe.named_parameters()):
            self.moe.get_submodule(path.rpartition(".")[0]).weight = nn.Parameter(
                torch.eye(4) if tensor.dim() == 2 else torch.randn(tensor.shape)
            )

    def units(self) -> Any:
        return [("moe", self.moe)]

    def forward(self, ids: Tensor, step: Any = None) -> Tensor:
        out: Tensor = self.moe(ids)
        return out


def told(scope: str, tally: dict[str, Tensor], expert: int) -> float:
    """The balance loss of a batch all of whose tokens go to one expert with p = 0.8, else 1 / 15."""
    p = torch.full((4,), 0.2 / 3)
    p[expert] = 0.8
    x = p.log().expand(1, 8, 4)
    batch = Batch(x, torch.zeros(1, 8, dtype=torch.int64), Step(torch.arange(8)[None]), tally)
    return float(answered(Routed(scope=scope), batch)[1]["balance"].detach())  # type: ignore[arg-type]


def test_the_balance_over_a_step_lets_parts_specialise() -> None:
    """Each part alone has 3.2; over the whole step the loss falls to 1, its least."""
    assert [told("micro", {}, e) for e in range(4)] == pytest.approx([3.2] * 4)
    tally: dict[str, Tensor] = {}
    seen = [told("global", tally, e) for e in range(4)]
    want = [4 * (0.8 / n + (n - 1) / n * 0.2 / 3) for n in range(1, 5)]
    assert seen == pytest.approx(want)
    assert told("global", {}, 2) == pytest.approx(3.2), "a step of one part is the classic loss"


def test_padding_has_no_say_and_counts_carry_no_gradient() -> None:
    model = Routed()
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 3:] = False
    places = torch.arange(6).expand(2, 6)
    batch = Batch(x, torch.zeros(2, 6, dtype=torch.int64), Step(places, key_mask=mask))
    z, more = answered(model, batch)  # type: ignore[arg-type]
    rows = torch.cat([x[0], x[1, :3]])
    p = rows.softmax(-1)
    f = torch.bincount(p.argmax(-1), minlength=4) / 9
    assert float(more["balance"].detach()) == pytest.approx(float(4 * (p.mean(0) * f).sum()))
    assert z.shape == x.shape
    more["balance"].backward()
    assert model.moe.router.weight.grad is not None
    assert model.moe.experts.up.weight.grad is None


def test_layers_may_share_one_balance_loss(mixture: Model) -> None:
    batch = Sequences(mixture).batch("train", range(4))
    blocks = [unit for _, unit in mixture.units() if isinstance(unit, MoE)]
    for block in blocks:
        block.balance = 0.5
    apart = answered(mixture, batch)[1]["balance"]
    for block in blocks:
        block.pooled = True
    pooled = answered(mixture, batch)[1]["balance"]
    shares = torch.stack(list(usage(mixture, batch).values()))
    assert shares.sum(1).tolist() == pytest.approx([1, 1])
    assert float(apart) > 2 * float(pooled) * 0.9
    assert 0.4 < float(pooled) < 1.0


@pytest.mark.parametrize("method", [Full(**FORMS), Lora(**FORMS), Logits(teacher=Ref("base"), **FORMS)])
def test_every_training_adds_the_balance_to_its_loss(method: Any, tiny: Model) -> None:
    made = upcycled(tiny, balance=0.25, every=2, capacity=1.5)
    if method.kind == "adapt.lora":
        method = method.model_copy(update={"select": ("attention",)})
    done = fit(method, made, Context(data={"data": Sequences(tiny)}, models={"teacher": tiny}))
    losses = done.measures["curve"]["losses"]
    assert 3 * 0.25 * 0.9 < losses["balance"][0] < 3 * 0.25 * 4
    rest = losses["total"][0] - losses["balance"][0]
    bare = fit(method, upcycled(tiny, balance=0.0, capacity=1.5), Context(
        data={"data": Sequences(tiny)}, models={"teacher": tiny}))  # fmt: skip
    assert "balance" not in bare.measures["curve"]["losses"]
    assert rest == pytest.approx(bare.measures["curve"]["losses"]["total"][0], rel=1e-4)


def test_training_parts_the_experts_and_moves_the_router(tiny: Model) -> None:
    made = upcycled(tiny)
    done = fit(Full(**FORMS | {"accumulate": 2}), made, Context(data={"data": Sequences(tiny)})).model
    experts = done.module("layers.1.moe.experts.up").weight
    assert not torch.equal(experts[0], experts[1])
    assert not torch.equal(
        done.module("layers.1.moe.router").weight, made.module("layers.1.moe.router").weight
    )
    assert not done.module("layers.1.moe").training


def test_experts_are_quantized_by_rules_and_saved(tiny: Model) -> None:
    made = upcycled(tiny)
    data = Context(data={"data": Sequences(tiny, 64)})
    rules = (Rule(on="moe.experts", bits=3), Rule(on="attention", skip=True), Rule(on="mlp", skip=True))
    for small in (
        calibrate(GPTQ(data=CODE, bits=4, group=16, rules=rules), made, data).model,
        quantized(made, RTN(bits=4, group=16, rules=rules)),
    ):
        assert small.module("layers.1.moe.experts.down").bits == 3
        assert type(small.module("layers.1.moe.router")).__name__ == "Linear"
        assert type(small.module("layers.0.mlp.up")).__name__ == "Linear"
        back = graph_json.from_json(graph_json.to_json(small))
        for name, tensor in small.tensors().items():
            back.place(name, tensor.detach())
        assert torch.equal(outputs(back, IDS), outputs(small, IDS))
        assert count(small, 8) == count(back, 8)


def quantized(model: Model, method: RTN) -> Model:
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def test_rows_of_a_batch_get_the_tokens_that_they_get_alone(mixture: Model) -> None:
    ids = torch.randint(0, 48, (3, 5), generator=torch.Generator().manual_seed(2))
    whole = generate(mixture, ids, max_new_tokens=8, kernels="torch")
    for row in range(3):
        alone = generate(mixture, ids[row : row + 1], max_new_tokens=8, kernels="torch")
        assert torch.equal(whole[row : row + 1], alone)


def test_decoding_runs_the_chosen_experts_alone(mixture: Model) -> None:
    ran: list[int] = []
    mixture.module("layers.0.moe.experts.up").register_forward_pre_hook(lambda _, args: ran.append(args[1]))
    with torch.no_grad():
        mixture(torch.tensor([[3]]))
    assert len(ran) == len(set(ran)) == 2


def test_a_decoded_batch_runs_each_expert_once(mixture: Model) -> None:
    """Rows that chose the same expert go through it together."""
    ran: dict[int, int] = {}
    mixture.module("layers.0.moe.experts.up").register_forward_pre_hook(
        lambda _, args: ran.__setitem__(args[1], ran.get(args[1], 0) + len(args[0]))
    )
    calls: list[int] = []
    mixture.module("layers.0.moe.experts.down").register_forward_pre_hook(
        lambda _, args: calls.append(args[1])
    )
    with torch.no_grad():
        mixture(torch.arange(16)[:, None])
    assert len(calls) == len(set(calls))
    assert sum(ran.values()) == 32


def test_upcycle_refuses_in_the_words_of_its_card(tiny: Model, mixture: Model) -> None:
    with pytest.raises(ValueError, match="top_k is 5, and there are 4 experts"):
        Upcycle(experts=4, top_k=5)
    bare = on_meta(tiny)
    (few,) = Upcycle(every=7).refuses(bare)
    assert (few.code, few.about) == ("E331", "every")
    assert few.help == "use every = 1 to 6"
    (mixed,) = Upcycle().refuses(mixture)
    assert (mixed.code, mixed.notes) == ("E320", ("layers.0.moe and 1 more are mixtures already",))
    rw = Rewriter(tiny)
    Recursive(loops=2).rewrite(rw)
    assert Upcycle().refuses(rw.done())[0].code == "E341"
    assert Upcycle().refuses(quantized(tiny, RTN(bits=8)))[0].code == "E323"
    odd = filled(blank())
    up = odd.module("layers.1.mlp.up")
    up.bias = nn.Parameter(torch.zeros(HIDDEN))
    assert Upcycle().refuses(odd)[0].notes == (
        "layers.1.mlp.up has a bias, and a stack of experts holds none",
    )
    assert not Upcycle(every=3).refuses(odd), "a block that stays may be as it likes"
