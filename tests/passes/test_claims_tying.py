"""Folded, shared and looped layers keep what their papers promise, on a decoder of eight layers.

Rates were chosen on seed 0 of the bed; the claims run on others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from effc.compiler.cost import count
from effc.compiler.depth_losses import agreement
from effc.compiler.method import Context, Outcome
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Train
from effc.passes.adapt.full import Full
from effc.passes.distill.hidden import Hidden
from effc.passes.distill.logits import Logits
from effc.passes.prune.depth import Depth
from effc.passes.quantize.rtn import RTN
from effc.passes.tie.attention import Attention
from effc.passes.tie.foldgpt import FoldGPT
from effc.passes.tie.mor import MoR
from effc.passes.tie.recursive import Recursive
from effc.runtime.calibrate import calibrate
from effc.runtime.fit import fit
from effc.runtime.parts.train.optimizer.adamw import AdamW
from effc.runtime.rewriting import rewrite
from effc.runtime.score_table import score_lines
from effc.specs.recipe import Ref
from tests.claims import Measured

from .lab import DATA, data, fresh, heldout

pytestmark = pytest.mark.claim
SEEDS = (1, 2)
BASE = Ref("base")


def trained(method: Train, model: Model, seed: int, **models: Model) -> Model:
    return fit(method, model, Context(seed, {"data": data("A", seed, 8000)}, models)).model


def full(rate: float, steps: int) -> Full:
    return Full(data=DATA, steps=steps, batch=16, precision="fp32", optimizer=AdamW(lr=rate))


@cache
def deep(seed: int, layers: int = 8) -> Model:
    """Knows language A."""
    return trained(full(2e-3, 600), fresh(seed, layers=layers), seed)


def hidden(steps: int, **given: Any) -> Hidden:
    return Hidden.model_validate(
        {"data": DATA, "teacher": BASE, "steps": steps, "batch": 16, "precision": "fp32"}
        | {"optimizer": AdamW(lr=1e-3)}
        | given
    )


def gates(seed: int, **given: Any) -> FoldGPT:
    return FoldGPT.model_validate({"data": DATA, "steps": 150, "batch": 16, "precision": "fp32"} | given)


@cache
def padded(seed: int) -> Model:
    """Six trained layers, and copies of two of them that add next to nothing, as layers 2 and 5."""
    rw = Rewriter(deep(seed, 6))
    rw.arrange_layers([0, 1, 1, 2, 3, 3, 4, 5])
    for layer in (2, 5):
        for end in ("attention.o", "mlp.down"):
            rw.write(f"layers.{layer}.{end}", "weight", 0.02 * rw.module(f"layers.{layer}.{end}").weight)
    return rw.done()


@pytest.mark.parametrize("seed", SEEDS)
def test_gates_find_layers_that_add_nothing(seed: int, measured: Measured) -> None:
    model = padded(seed)
    method = gates(seed, remove=0.25)
    found = fit(method, model, Context(seed, {"data": data("A", seed, 8000)}))
    scores: dict[str, float] = found.measures["scores"]
    least = sorted(scores, key=lambda name: scores[name])[:2]
    right = len({"layers.2", "layers.5"} & set(least))
    measured("tie.foldgpt", "gates find both planted layers of eight", right, above=1.5)
    moved = abs(heldout(found.model, "A", seed) / heldout(model, "A", seed) - 1)
    measured("tie.foldgpt", "removing them moves the loss by less than 1 %", moved, below=0.01)


@pytest.mark.xfail(reason="on seeds 1 and 2 of this bed gates lose 0.002 and 0.008 nat more than cosines")
@pytest.mark.parametrize("seed", SEEDS)
def test_gates_choose_no_worse_than_cosines_and_chance(seed: int, measured: Measured) -> None:
    model = deep(seed)
    by_gate = heldout(trained(gates(seed, remove=0.25, keep_first=0, keep_last=0), model, seed), "A", seed)
    texts = Context(seed, {"data": data("A", seed, 8000)})
    by_cosine = heldout(calibrate(Depth(data=DATA, keep=6), model, texts).model, "A", seed)
    dice = torch.Generator().manual_seed(seed)
    chance = []
    for _ in range(6):
        rw = Rewriter(model)
        rw.remove_layers(torch.randperm(8, generator=dice)[:2].tolist())
        chance.append(heldout(rw.done(), "A", seed))
    measured("tie.foldgpt", "2 of 8 by gates lose less than by chance", by_gate, below=sum(chance) / 6)
    measured("tie.foldgpt", "2 of 8 by gates lose no more than by cosines", by_gate, below=by_cosine + 1e-6)


@cache
def folded(seed: int) -> Model:
    return trained(gates(seed, remove=0.25, group=2), deep(seed), seed)


@cache
def healed(seed: int) -> dict[str, float]:
    """Losses of the folded model after 300 steps, by what it is held to."""
    plain = Logits(data=DATA, teacher=BASE, steps=300, batch=16, precision="fp32", optimizer=AdamW(lr=1e-3))
    methods = {"tail": hidden(300, map="tail"), "everywhere": hidden(300), "logits": plain}
    return {
        name: heldout(trained(method, folded(seed), seed, teacher=deep(seed)), "A", seed)
        for name, method in methods.items()
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_a_folded_model_heals_by_its_tail(seed: int, measured: Measured) -> None:
    base, cut = heldout(deep(seed), "A", seed), heldout(folded(seed), "A", seed)
    scratch = heldout(trained(full(1e-3, 300), _like(folded(seed), seed), seed), "A", seed)
    ends = healed(seed)
    tail = ends["tail"]
    measured(
        "tie.foldgpt", "300 steps take back 60 % of what folding cost", (cut - tail) / (cut - base), above=0.6
    )
    measured("tie.foldgpt", "a folded model ends below a fresh one of its form", tail, below=scratch)
    measured("distill.hidden", "the tail and logits end near logits alone", tail, below=ends["logits"] * 1.02)
    measured("distill.hidden", "the tail alone ends near all layers", tail, below=ends["everywhere"] * 1.02)


@pytest.mark.xfail(reason="on seed 1 of this bed the tail and logits end 0.7 % above logits alone")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_tail_beats_logits_alone(seed: int, measured: Measured) -> None:
    claim = "folded, 300 steps: loss with the tail and logits, over that with logits alone"
    measured("distill.hidden", claim, healed(seed)["tail"] / healed(seed)["logits"], below=1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_alone_beat_all_layers(seed: int, measured: Measured) -> None:
    claim = "folded, 300 steps: loss with logits alone, over that with all layers"
    measured("distill.hidden", claim, healed(seed)["logits"] / healed(seed)["everywhere"], below=1.0)


def _like(model: Model, seed: int) -> Model:
    """The same structure with other random weights."""
    other = model.clone()
    dice = torch.Generator().manual_seed(seed + 31)
    for name, tensor in other.tensors().items():
        drawn = torch.randn(tensor.shape, generator=dice) * 0.08
        other.place(name, drawn if tensor.dim() > 1 else torch.ones(tensor.shape))
    return other


def followed(seed: int, followers: int) -> Outcome:
    """The deep model, of whose layers some follow the attention of others."""
    method = Attention(data=DATA, ratio=followers / 8, keep_first=1, keep_last=1)
    return calibrate(method, deep(seed), Context(seed, {"data": data("A", seed, 8000)}))


@pytest.mark.xfail(reason="on seed 2 of this bed neighbors are alike by 0.8127, layers far apart by 0.8142")
@pytest.mark.parametrize("seed", SEEDS)
def test_neighbors_look_more_alike(seed: int, measured: Measured) -> None:
    scores: dict[str, float] = followed(seed, 2).measures["scores"]
    print("\n".join(score_lines(scores)))
    near = [v for k, v in scores.items() if _apart(k) == 1]
    far = [v for k, v in scores.items() if _apart(k) > 2]
    measured(
        "tie.attention", "neighbors look more alike than layers far apart",
        sum(near) / len(near), above=sum(far) / len(far),
    )  # fmt: skip


@pytest.mark.parametrize("followers", [2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_shared_maps_heal(seed: int, followers: int, measured: Measured) -> None:
    model, found = deep(seed), followed(seed, followers)
    lost = followers * (64 * 16 * 8)
    off = abs(count(model).params - count(found.model).params - lost)
    measured("tie.attention", f"each of {followers} followers loses W_q and W_k", off, below=0.5)
    base = heldout(model, "A", seed)
    after = heldout(trained(hidden(300), found.model, seed, teacher=model), "A", seed)
    claim = f"{followers} of 8 follow: 300 steps end within 2 % of the base's loss"
    measured("tie.attention", claim, after / base - 1, below=0.02)


def _apart(names: str) -> int:
    one, two = (int(name.split(".")[1]) for name in names.split())
    return two - one


@pytest.mark.xfail(reason="on seeds 1 and 2 of this bed it agrees for 75 and 70 % of tokens")
@pytest.mark.parametrize("seed", SEEDS)
def test_loops_learn_to_choose(seed: int, measured: Measured) -> None:
    start = fresh(seed, layers=6, width=128)
    looped = rewrite(MoR(recursions=2), start, Context(seed)).model
    model = trained(full(1e-3, 1000), looped, seed)
    ids = data("A", seed, 8000).ids["heldout"][:64]
    right = agreement(model, ids)
    tied = rewrite(Recursive(loops=2, share="middle_cycle", tie_norms=True), start, Context(seed)).model
    plain = heldout(trained(full(1e-3, 1000), tied, seed), "A", seed)
    mine = heldout(model, "A", seed)
    measured("tie.mor", "ends within 5 % of plain recursion at equal steps", mine / plain - 1, below=0.05)
    saved = 1 - count(model, 16).flops_per_token / count(tied, 16).flops_per_token
    measured("tie.mor", "a token takes 10 % fewer FLOPs", saved, above=0.1)
    measured("tie.mor", "without the future, the router agrees for 90 % of tokens", right, above=0.9)


@pytest.mark.parametrize("seed", SEEDS)
def test_differences_stay_when_what_is_shared_is_packed(seed: int, measured: Measured) -> None:
    model = deep(seed)
    tied = rewrite(Recursive(loops=2, lora_rank=8), model, Context(seed)).model
    ready = trained(hidden(200), tied, seed, teacher=model)
    small = rewrite(RTN(bits=4, group=16), ready, Context(seed)).model
    loss = heldout(ready, "A", seed)
    risen = heldout(small, "A", seed) / loss - 1
    measured("tie.recursive", "4 bits beneath differences of rank 8 cost less than 3 %", risen, below=0.03)
    share = count(small).bytes / count(model).bytes
    measured("tie.recursive", "tied, healed and packed takes under 40 % of the bytes", share, below=0.4)


@pytest.mark.parametrize("seed", SEEDS)
def test_differences_by_svd_close_the_gap_of_strict_tying(seed: int, measured: Measured) -> None:
    """At the card's size: 8 layers, 128 wide, shared by two loops."""
    model = trained(full(2e-3, 400), fresh(seed, layers=8, width=128), seed)
    strict, relaxed = (
        rewrite(Recursive(loops=2, lora_rank=rank), model, Context(seed)).model for rank in (0, 16)
    )
    base, alike, apart = (heldout(one, "A", seed) for one in (model, strict, relaxed))
    claim = "8 layers, 128 wide: loss with differences of rank 16, less that of strict tying"
    measured("tie.recursive", claim, apart - alike, below=0.0)
    ready = heldout(trained(hidden(300), relaxed, seed, teacher=model), "A", seed)
    claim = "8 layers, 128 wide, rank 16: 300 steps recover of the gap of strict tying"
    measured("tie.recursive", claim, (alike - ready) / (alike - base), above=0.8)
