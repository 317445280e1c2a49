"""What the cards promise of weights and routers exactly: planted ranks, folds, ties, means, chains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effc.compiler import planes
from effc.compiler.blocks import Averaged
from effc.compiler.blocks.moe import best
from effc.passes._moment import Moment
from effc.passes.arch._batch_channel import BatchChannelNorm
from effc.passes.quantize._solve import factor
from effc.passes.reparam._planes import solve
from effc.passes.reparam._standard import StandardConv, standardized
from effc.passes.reparam.hashed import Hashed
from effc.passes.reparam.low_rank import factors
from effc.passes.reparam.weight_std import WeightStd
from tests.claims import Measured
from tests.compiler import test_egraph as chains

from . import test_batchformer as former
from . import test_moe as moe
from . import test_shift_add as signs
from . import test_sparse_low_rank as sparse
from . import test_weight_std as standard
from .edited import edited, moved
from .lab import fresh
from .test_structure import planted

pytestmark = pytest.mark.claim
SEEDS = (0, 1, 2)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest number wanted."""
    return float((got - want).detach().abs().max() / want.detach().abs().max())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_rank_is_found_and_outputs_count(seed: int, measured: Measured) -> None:
    w = planted(128, 128, 8)
    b, a, _ = factors(w, 8, None)
    error = float((b @ a - w).norm() / w.norm())
    measured("reparam.low_rank", "128 x 128 of rank 8 by rank 8: error", error, below=1e-5)
    full, x = drawn(64, 64, seed=seed), signs.correlated(500, 64, seed)
    moment = Moment(64)
    moment.add(x)
    root = torch.linalg.cholesky(moment.mean().double() + 1e-9 * torch.eye(64, dtype=torch.float64))
    errors = []
    for metric in (root, None):
        b, a, _ = factors(full, 16, metric)
        y = full.double() @ x.double().T
        errors.append(float((y - b.double() @ (a.double() @ x.double().T)).norm() / y.norm()))
    claim = "correlated inputs: error of outputs under metric = activation, over that under weight"
    measured("reparam.low_rank", claim, errors[0] / errors[1], below=1.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_more_planes_are_closer_and_outputs_count(seed: int, measured: Measured) -> None:
    w, x = drawn(64, 64, seed=seed), signs.correlated(500, 64, seed + 3)
    moment = Moment(64)
    moment.add(x)
    root = factor(moment.mean(), 0.01, None)
    assert root is not None
    lost = {}
    for bits in (2, 3):
        for name, u in (("outputs", root[0]), ("weights", None)):
            made, scales, rounded = solve(w, u, signs.form(bits, 64, 1, "pow2", 20), None)
            back = planes.dense(planes.pack_signs(made), scales, 64)
            measured("reparam.shift_add", "64 x 64: packed from unpacked", apart(back, rounded), below=1e-5)
            lost[name, bits] = float(((w - rounded) @ x.T).norm() / (w @ x.T).norm())
    about = "reparam.shift_add"
    more = lost["outputs", 3] / lost["outputs", 2]
    measured(about, "64 x 64: error of 3 planes over that of 2", more, below=1.0)
    for bits in (2, 3):
        claim = f"correlated inputs, {bits} planes: error of outputs looking at them, over at weights"
        measured(about, claim, lost["outputs", bits] / lost["weights", bits], below=1.0)


def test_gradients_are_those_of_the_dense_weight(measured: Measured) -> None:
    one = sparse.unit(o=64, i=48, rank=8, density=0.03)
    x = torch.randn(4, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    wanted = [one.a, one.b, one.values, one.bias, x]
    mine = torch.autograd.grad(one(x).square().sum(), wanted)
    theirs = torch.autograd.grad(sparse.on_dense(one, x).square().sum(), wanted)
    worst = max(apart(a, b) for a, b in zip(mine, theirs, strict=True))
    about = "reparam.sparse_low_rank"
    measured(about, "gradients from those of the dense weight", worst, below=1e-10)
    worst = apart(one(x), sparse.on_dense(one, x))
    measured(about, "outputs from those of the dense weight", worst, below=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_array_of_all_weights_holds_the_model(seed: int, measured: Measured) -> None:
    method = Hashed(keep=1.0, init="project", seed=seed)
    worst = moved(method, fresh(seed), torch.arange(36).view(3, 12), torch.float32)
    measured("reparam.hashed", "keep = 100 % holds a trained model: the logits move by", worst, below=1e-5)


def test_standardized_filters_fold(measured: Measured) -> None:
    wide = edited(WeightStd(), standard.resnet())
    x = drawn(*standard.IMAGES)
    worst = moved(standard.FOLD, wide, x, torch.float32)
    measured("reparam.weight_std", "filters written out move a network by no more", worst, below=1e-6)
    means, spreads = [], []
    for _, module in wide.gm.named_modules():
        if isinstance(module, StandardConv):
            w = standardized(module.weight.detach().double(), 1e-12, "variance").flatten(1)
            means.append(float(w.mean(1).abs().max()))
            spreads.append(float((w.var(1, unbiased=False) - 1).abs().max()))
    measured("reparam.weight_std", "largest mean of a filter", max(means), below=1e-6)
    measured("reparam.weight_std", "largest distance of a variance from 1", max(spreads), below=1e-3)


def test_at_rest_a_sample_stands_alone(measured: Measured) -> None:
    wide, x = edited(former.APPLY, former.net()), drawn(7, 6)
    with torch.no_grad():
        worst = max(apart(wide(x)[i : i + 1], wide(x[i : i + 1])) for i in range(7))
    measured("reparam.batchformer", "a sample in a batch of 7 from itself alone", worst, below=1e-6)
    norm, images = BatchChannelNorm(8, 4, 0.1, 1e-5, torch.float32), drawn(5, 8, 6, 6, seed=2) * 2 + 1
    norm.train()
    norm(images)
    norm.eval()
    worst = max(apart(norm(images)[i : i + 1], norm(images[i : i + 1])) for i in range(5))
    measured("arch.batch_channel_norm", "an image in a batch of 5 from itself alone", worst, below=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_averaging_keeps_the_mean(seed: int, measured: Measured) -> None:
    block = Averaged(width=4, hidden=4, experts=4, beta=0.3, ramp=False)
    w = drawn(4, 64, 64, seed=seed).double()
    after = block.pulled(w, 1.0)
    off = float((after - w).mean(0).abs().max())
    measured("moe.ewa", "a step of averaging moves the mean by", off, below=1e-15)
    shrunk = float((after - w.mean(0)).norm() / (w - w.mean(0)).norm())
    off = abs(shrunk - (1 - 0.3 * 4 / 3))
    measured("moe.ewa", "what experts differ by shrinks by 1 - b E / (E - 1); distance", off, below=1e-12)


def test_ties_go_to_the_lower_number_in_either_order(measured: Measured) -> None:
    scores = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, 2.0])] * 4)
    wrong, worst = 0, 0.0
    for k in (1, 2, 3, 4):
        weights, chosen = best(scores.softmax(-1), k, True)
        order = torch.argsort(scores, dim=-1, descending=True, stable=True)[:, :k]
        wrong += int((chosen != order).any(-1).sum())
        worst = max(worst, apart(weights, scores.gather(1, order).softmax(-1)))
    measured("moe.top_k", "81 patterns of ties, 1 to 4 of 4 experts: other experts chosen", wrong, below=0.5)
    measured("moe.top_k", "softmax before the choice from softmax behind it", worst, below=1e-6)


def test_balance_of_the_card_s_four_parts(measured: Measured) -> None:
    """Each part sends all tokens to one expert with p = 0.8; the card's p sum to 1.1, ours to 1."""
    tally: dict[str, Tensor] = {}
    micro = [moe.told("micro", {}, e) for e in range(4)]
    whole = [moe.told("global", tally, e) for e in range(4)]
    about = "moe.global_balance"
    off = max(abs(loss - 3.2) for loss in micro)
    measured(about, "four parts of one expert each: loss of each alone, less 3.2", off, below=1e-5)
    measured(about, "over all of them: the loss of the last, less 1", abs(whole[-1] - 1), below=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_chains_are_multiplied_in_the_best_order(seed: int, measured: Measured) -> None:
    dice = torch.Generator().manual_seed(seed)
    given = [[8, 64, 64, 8, 1]]
    given += [torch.randint(1, 65, (n,), generator=dice).tolist() for n in (4, 5, 6, 7) for _ in range(5)]
    worse = sum(found != due for found, due in map(chains.chained, given))
    claim = "chains of 2 to 6 matrices, the card's among them, in another order than dynamic programming's"
    measured("reparam.egraph", claim, worse, below=0.5)
