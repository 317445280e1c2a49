"""Carving: slices of a block equal the block with channels masked; the router is known before layer 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from effc.compiler import graph_json
from effc.compiler.blocks import Carved, PreGate
from effc.compiler.blocks.carved import EXPERT
from effc.compiler.cost import count
from effc.compiler.method import Batch, Context, Outcome
from effc.compiler.model import Model
from effc.compiler.op_graph import evaluate, expand
from effc.compiler.rewrite import Rewriter
from effc.passes.adapt.full import Full
from effc.passes.moe._slices import Fires, members, overlap, slices
from effc.passes.moe.carve import Carve
from effc.passes.moe.heal import Heal
from effc.passes.quantize.gptq import GPTQ
from effc.runtime.calibrate import calibrate
from effc.runtime.data._several import Several
from effc.runtime.fit import fit
from effc.runtime.generate import generate
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref

from .tiny_models import HIDDEN, VOCAB, WIDTH, Sequences, blank, filled, on_meta, outputs

IDS = torch.arange(36).view(3, 12)
REFS = (Ref("one"), Ref("two"), Ref("three"))
SMALL: dict[str, Any] = {"data": REFS, "router_width": 16, "samples": 8}


class Text(Sequences):
    """Later passes see the same sequences again."""

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        return super().batch(split, [index % len(self.ids) for index in indices])


def domains(model: Model, length: int = 16) -> Several:
    """Three domains of text: each has a third of the tokens."""
    parts = [Text(model, 16, length, seed) for seed in range(3)]
    for number, part in enumerate(parts):
        part.ids = part.ids % (VOCAB // 3) + number * (VOCAB // 3)
    return Several(["one", "two", "three"], parts, [None, "heldout", None])


def carved(model: Model, **arguments: Any) -> Outcome:
    return calibrate(Carve(**SMALL | arguments), model, Context(3, {"data": domains(model)}))


def masked(dense: Model, unit: Carved, path: str, expert: int) -> nn.Module:
    """The dense block with the channels of all other experts at zero."""
    block: Any = dense.clone().module(path.removesuffix("moe") + "mlp")
    keep = members(unit, block.hidden)[expert]
    block.down.weight = nn.Parameter(block.down.weight * keep)
    return block  # type: ignore[no-any-return]


@pytest.mark.parametrize("keep", [0.5, 7, 0.9])
@pytest.mark.parametrize("shared", [0.0, 0.4, 1.0])
def test_slices_equal_the_masked_block_for_every_expert(tiny: Model, keep: float, shared: float) -> None:
    model = carved(tiny, keep=keep, shared=shared).model
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    step = model.step(torch.zeros(2, 5, dtype=torch.int64))
    for layer in range(6):
        path = f"layers.{layer}.moe"
        unit = model.module(path)
        assert isinstance(unit, Carved)
        for expert in range(3):
            step.sides[EXPERT] = torch.full((2, 5), expert)
            with torch.no_grad():
                want, got = masked(tiny, unit, path, expert)(x), unit(x, step)
            assert float((got - want).abs().max() / want.abs().max()) < 1e-6


def test_experts_have_the_channels_that_their_domain_fires_most(tiny: Model) -> None:
    scores = torch.tensor([[9.0, 1.0, 5.0, 0.0, 3.0], [9.0, 6.0, 1.0, 2.0, 0.0]])
    common, own = slices(scores, 1, 2)
    assert common.tolist() == [0]
    assert own.tolist() == [[2, 4], [1, 3]]
    fires = Fires(2)
    fires.add(torch.tensor([[1.0, -3.0], [-1.0, 3.0]]))
    assert fires.mean().tolist() == [0.5, 1.5]
    done = carved(tiny)
    assert all(0 < share < 0.5 for share in done.measures["errors"].values())
    dense = tiny.module("layers.2.mlp")
    unit = done.model.module("layers.2.moe")
    rows = unit.channels.own[1].long()
    assert torch.equal(unit.experts.up.weight[1], dense.up.weight[rows])
    assert torch.equal(unit.experts.down.weight[1], dense.down.weight[:, rows])
    assert torch.equal(unit.shared.gate.weight, dense.gate.weight[unit.channels.common.long()])


def test_cost_follows_from_the_arguments(tiny: Model) -> None:
    made = carved(tiny, keep=0.5, shared=0.5).model
    row = 3 * WIDTH
    router = WIDTH * 16 + 6 * 16**2 + 3 * 16 + 3 * 16
    before, after = count(tiny), count(made)
    assert after.params - before.params == 6 * row * (12 + 3 * 12 - HIDDEN) + router
    work = 2 * (WIDTH * 16 + 6 * 16**2 + 3 * 16)
    assert after.flops_per_token - before.flops_per_token == 6 * 2 * row * (24 - HIDDEN) + work
    assert after.kv_bytes_per_token - before.kv_bytes_per_token == 2 * 16 * 4


def test_all_channels_are_the_same_model(tiny: Model) -> None:
    for shared in (0.0, 0.3, 1.0):
        got, want = outputs(carved(tiny, keep=1.0, shared=shared).model, IDS), outputs(tiny, IDS)
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    assert Carve(**SMALL, keep=1.0).contract.fidelity.name == "EXACT"
    assert Carve(**SMALL, keep=0.5).contract.fidelity.name == "HEALED"


def test_the_router_sees_the_past_alone_and_is_one_for_all_layers(tiny: Model) -> None:
    model = carved(tiny).model
    step = model.step(IDS)
    model(IDS, step=step)
    first = step.sides[EXPERT].clone()
    changed = IDS.clone()
    changed[0, 6] = 47
    step = model.step(changed)
    model(changed, step=step)
    assert torch.equal(step.sides[EXPERT][1:], first[1:])
    assert torch.equal(step.sides[EXPERT][0, :6], first[0, :6])
    assert first.unique().numel() > 1


def test_generation_keeps_the_router_in_its_cache(tiny: Model) -> None:
    model = carved(tiny).model
    ids = torch.randint(0, VOCAB, (3, 6), generator=torch.Generator().manual_seed(1))
    out = generate(model, ids, max_new_tokens=6, kernels="torch")
    for row in range(3):
        alone = generate(model, ids[row : row + 1], max_new_tokens=6, kernels="torch")
        assert torch.equal(out[row : row + 1], alone)
    assert torch.equal(outputs(model, out[:, :-1])[:, 5:].argmax(-1), out[:, 6:])


def test_blocks_expand_into_what_they_compute(tiny: Model) -> None:
    for shared in (0.0, 0.5, 1.0):
        model = carved(tiny, shared=shared).model
        x = torch.randn(3, 12, WIDTH, generator=torch.Generator().manual_seed(0))
        router, block = model.module("router"), model.module("layers.1.moe")
        assert isinstance(router, PreGate)
        assert isinstance(block, Carved)
        step, again = model.step(IDS), model.step(IDS)
        assert torch.equal(evaluate(expand(router), router, x, again)[0], x)
        router(x, step)
        assert torch.equal(again.sides[EXPERT], step.sides[EXPERT])
        torch.testing.assert_close(evaluate(expand(block), block, x, step)[0], block(x, step))


def test_it_is_saved_and_quantized(tiny: Model) -> None:
    model = carved(tiny).model
    small = calibrate(
        GPTQ(data=REFS[0], bits=4, group=4), model, Context(data={"data": Sequences(tiny, 32)})
    ).model
    assert type(small.module("layers.1.moe.shared.up")).__name__ == "QuantLinear"
    assert type(small.module("layers.1.moe.experts.up")).__name__ == "QuantStackedLinear"
    assert type(small.module("router.entry")).__name__ == "Linear"
    for whole in (model, small):
        back = graph_json.from_json(graph_json.to_json(whole))
        for name, tensor in whole.tensors().items():
            back.place(name, tensor.detach())
        assert torch.equal(outputs(back, IDS), outputs(whole, IDS))


def test_overlap_counts_the_strongest_channels() -> None:
    member = torch.tensor([[1.0, 1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    a = torch.tensor([[5.0, -4, 3, 0, 0, 0, 0, 0, 2, 1]])
    # Strongest five: 0, 1, 2 of the first expert, 8, 9 of the second; parts of 5, 4, 3, 2 and 1.
    want = [3 / 5 + 3 / 4 + 1 + 1 + 1, 2 / 5 + 1 / 4]
    torch.testing.assert_close(overlap(a, member), torch.tensor([want]))


def heal(tiny: Model, model: Model, **arguments: Any) -> Outcome:
    forms: dict[str, Any] = {"data": REFS, "dense": Ref("dense"), "steps": 6, "batch": 4, "precision": "fp32"}
    method = Heal(**forms | {"router_steps": 2, "expert_steps": 1} | arguments)
    return fit(method, model, Context(1, {"data": domains(tiny)}, {"dense": tiny}))


def test_router_and_experts_train_by_turns(tiny: Model) -> None:
    model = carved(tiny).model
    done = heal(tiny, model)
    curve = done.measures["curve"]["losses"]
    assert [bool(value) for value in curve["router"]] == [True, True, False, True, True, False]
    assert [bool(value) for value in curve["experts"]] == [False, False, True, False, False, True]
    first = heal(tiny, model, steps=2).model.tensors()
    before = model.tensors()
    moved = {name.partition(".")[0] for name, t in first.items() if not torch.equal(t, before[name])}
    assert moved == {"router"}
    experts = heal(tiny, model, steps=3).model.tensors()
    still = {n for n, t in experts.items() if torch.equal(t, before[n])}
    assert still == {n for n in experts if ".channels." in n}


def test_the_router_learns_whose_channels_fire(tiny: Model) -> None:
    model = carved(tiny, keep=0.3, shared=0.0).model
    arguments = {"steps": 60, "router_steps": 60, "batch": 8, "optimizer": AdamW(lr=1e-2)}
    curve = heal(tiny, model, **arguments).measures["curve"]["losses"]["router"]
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


def test_a_list_of_data_is_one_data(tiny: Model) -> None:
    several = domains(tiny)
    assert several.size("train") == 48
    assert several.tokens("train") == 48 * 16
    rows = several.batch("train", [0, 17, 33, 1, 32])
    for row, (part, index) in enumerate([(0, 0), (1, 1), (2, 1), (0, 1), (2, 0)]):
        assert torch.equal(rows.ids[row], several.parts[part].batch("train", [index]).ids[0])
    assert several._place("train", 48 + 17) == (1, 16 + 1), "a second pass over all is one over each"
    assert rows.labels.shape == rows.step.positions.shape == (5, 16)
    assert [part.size("train") for part in several.each()] == [16, 16, 16]


def test_data_of_a_list_must_go_together(tiny: Model) -> None:
    long, short = Sequences(tiny, 4, 16), Sequences(tiny, 4, 8)
    with pytest.raises(EffcError, match=r"(?s)E627.*`a` of 16, `b` of 8"):
        Several(["a", "b"], [long, short], [None, None])

    class Empty(Sequences):
        def tokens(self, split: str) -> int:
            return 0

    with pytest.raises(EffcError, match=r"(?s)E627.*`b` has 0 tokens in the split `train`"):
        Several(["a", "b"], [long, Empty(tiny)], [None, None])


def test_carve_refuses_in_the_words_of_its_card(tiny: Model, mixture: Model) -> None:
    bare = on_meta(tiny)
    with pytest.raises(ValueError, match="at least 2"):
        Carve(data=REFS[:1])
    with pytest.raises(ValueError, match="same domain twice"):
        Carve(data=(REFS[0], REFS[0]))
    with pytest.raises(ValueError, match="does not divide into 3 heads"):
        Carve(data=REFS, router_heads=3)
    (none,) = Carve(data=REFS, keep=0.01).refuses(bare)
    assert (none.code, none.about, none.help) == ("E331", "keep", "keep at least 2.1%, or a number")
    (many,) = Carve(data=REFS, keep=49).refuses(bare)
    assert many.help == "use at most 48, or a share"
    assert Carve(data=REFS).refuses(mixture)[0].code == "E320"
    plain = Heal(data=REFS, dense=Ref("dense"), steps=1)
    assert plain.refuses(tiny, [tiny])[0].help == "carve it first, or train it with adapt.full"
    made = carved(tiny).model
    (other,) = plain.refuses(made, [made])
    assert (other.code, other.about) == ("E332", "dense")
    assert not plain.refuses(made, [tiny])
    assert not Full(data=REFS[0], steps=1).refuses(made, ()), "numbers of channels are no packed weights"
    rw = Rewriter(filled(blank(layers=2)))
    assert Carve(data=REFS).watched(rw.model) == ["layers.0.mlp.down", "layers.1.mlp.down"]
