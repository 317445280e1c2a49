"""Merges equal their formulas in float64, keep what must be kept, and refuse models that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.method import Context
from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.shapes import Merge
from effc.compiler.sharing import tie
from effc.compiler.weights import LazyTensor
from effc.passes.merge.linear import Linear as Mean
from effc.passes.merge.slerp import Slerp
from effc.passes.merge.task_arithmetic import TaskArithmetic
from effc.passes.merge.ties import Ties
from effc.runtime.merge import merge
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref

BASE = Ref("base")
Floats = dict[str, Tensor]


def blank(dtype: str = "float32", width: int = 16, layers: int = 2) -> Model:
    def layer() -> dict[str, torch.nn.Module]:
        attention = Attention(width=width, heads=2, kv_heads=1, head_dim=8, dtype=dtype)
        mlp = MLP(width=width, hidden=24, dtype=dtype)
        norms = {name: Norm(width=width, dtype=dtype) for name in ("norm1", "norm2")}
        return {"norm1": norms["norm1"], "attention": attention, "norm2": norms["norm2"], "mlp": mlp}

    head = Linear(in_features=width, out_features=31, dtype=dtype)
    stack = [layer() for _ in range(layers)]
    gm = assemble(Embedding(vocab=31, width=width, dtype=dtype), stack, Norm(width=width, dtype=dtype), head)
    tie(gm, "head.weight", "embedding.weight")
    return Model(gm, architecture="llama", config={"hidden_size": width})


def made(seed: int, near: Model | None = None, dtype: str = "float32", **shape: int) -> Model:
    """A model of random weights, or one that moved a little from `near`."""
    model = blank(dtype, **shape)
    dice = torch.Generator().manual_seed(seed)
    start = near.tensors() if near is not None else {}
    for name, tensor in model.tensors().items():
        noise = torch.randn(tensor.shape, generator=dice)
        value = start[name].float() + 0.1 * noise if name in start else noise
        model.place(name, torch.nn.Parameter(value.to(tensor.dtype), requires_grad=False))
    return model


def exact(model: Model) -> Floats:
    return {name: tensor.double() for name, tensor in model.tensors().items()}


def run(method: Merge, *models: Model, base: Model | None = None) -> Floats:
    outcome = merge(method, models, Context(models={"base": base} if base is not None else {}))
    return exact(outcome.model.materialize())


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def each(function: Callable[..., Tensor], *models: Model) -> Floats:
    tables = [exact(model) for model in models]
    return {name: function(*(table[name] for table in tables)) for name in tables[0]}


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def ties(
    base: Floats,
    models: list[Floats],
    density: float,
    weight: list[float],
    lam: float,
    sign: str,
    whole: bool,
) -> Floats:
    """The formula, on flat vectors, with thresholds by sorting."""
    changes = [{name: m[name].float() - base[name].float() for name in base} for m in models]
    kept = []
    for change in changes:

        def cut(values: Tensor) -> Tensor:
            size = values.numel()
            return values.abs().flatten().sort(descending=True).values[max(1, round(density * size)) - 1]

        everything = cut(torch.cat([c.flatten() for c in change.values()]))
        kept.append(
            {
                n: torch.where(c.abs() >= (everything if whole else cut(c)), c, 0).double()
                for n, c in change.items()
            }
        )
    out = {}
    for name in base:
        parts = torch.stack([w * c[name] for w, c in zip(weight, kept, strict=True)])
        votes = torch.stack([w * c[name].sign() for w, c in zip(weight, kept, strict=True)])
        elected = torch.where((parts if sign == "sum" else votes).sum(0) >= 0, 1.0, -1.0)
        agree = parts.sign() == elected
        shares = (torch.tensor(weight).double().view(-1, *[1] * base[name].dim()) * agree).sum(0)
        out[name] = base[name] + lam * (parts * agree).sum(0) / torch.where(shares == 0, 1, shares)
    return out


@pytest.fixture(scope="module")
def family() -> tuple[Model, Model, Model]:
    base = made(0)
    return base, made(1, base), made(2, base)


def test_linear_is_the_weighted_mean(family: tuple[Model, Model, Model]) -> None:
    same(run(Mean(), *family), each(lambda a, b, c: (a + b + c) / 3, *family))
    same(run(Mean(weight=(3, 1, 0)), *family), each(lambda a, b, c: (3 * a + b) / 4, *family))
    got = run(Mean(weight=(1, -1, 1), normalize=False), *family)
    same(got, each(lambda a, b, c: a - b + c, *family))


def test_linear_of_copies_is_the_model_and_order_does_not_matter(family: tuple[Model, Model, Model]) -> None:
    _, a, b = family
    same(run(Mean(), a, a, a), exact(a))
    same(run(Mean(weight=(1, 2)), a, b), run(Mean(weight=(2, 1)), b, a))


def test_slerp_follows_the_arc(family: tuple[Model, Model, Model]) -> None:
    _, a, _ = family
    b = made(9)
    same(run(Slerp(t=0.3), a, b), each(lambda x, y: slerp(x, y, 0.3), a, b))
    same(run(Slerp(t=0.3), a, b), run(Slerp(t=0.7), b, a))
    same(run(Slerp(t=0.0), a, b), exact(a), 0)
    same(run(Slerp(t=1.0), a, b), exact(b), 0)
    same(run(Slerp(), a, a), exact(a))


def test_slerp_keeps_length_where_the_mean_loses_it() -> None:
    a, b = made(3, width=32), made(4, width=32)
    name = "layers.0.mlp.up.weight"
    arc, line = run(Slerp(), a, b)[name].norm(), run(Mean(), a, b)[name].norm()
    length = (exact(a)[name].norm() + exact(b)[name].norm()) / 2
    assert abs(arc / length - 1) < 0.02
    assert line / length < 0.78


def test_slerp_mixes_zero_tensors_on_the_line(family: tuple[Model, Model, Model]) -> None:
    _, a, b = family
    empty = a.clone()
    empty.place("norm.weight", torch.nn.Parameter(torch.zeros(16), requires_grad=False))
    same(run(Slerp(t=0.25), empty, b), each(lambda x, y: slerp(x, y, 0.25) if x.any() else y / 4, empty, b))


def test_task_arithmetic_adds_changes_and_takes_them_back(family: tuple[Model, Model, Model]) -> None:
    base, a, b = family
    got = run(TaskArithmetic(base=BASE, weight=(1, 2), lambda_=0.3), a, b, base=base)
    same(got, each(lambda o, x, y: o + 0.3 * (x - o) + 0.6 * (y - o), base, a, b))
    same(run(TaskArithmetic(base=BASE), a, base=base), exact(a))


@pytest.mark.parametrize("whole", [True, False], ids=["model", "tensor"])
@pytest.mark.parametrize("sign", ["sum", "count"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_equals_its_formula(
    family: tuple[Model, Model, Model], density: float, sign: str, whole: bool
) -> None:
    base, a, b = family
    c = made(5, base)
    method = Ties(
        base=BASE,
        density=density,
        weight=(1, 2, 1),
        lambda_=1.2,
        sign=sign,
        scope="model" if whole else "tensor",
    )
    want = ties(exact(base), [exact(m) for m in (a, b, c)], density, [1.0, 2.0, 1.0], 1.2, sign, whole)
    same(run(method, a, b, c, base=base), want)


def test_ties_keeps_the_stated_share_and_settles_on_one_sign(family: tuple[Model, Model, Model]) -> None:
    base, a, b = family
    got = run(Ties(base=BASE, density=0.25), a, base=base)
    moved = sum(int((got[n] != t).sum()) for n, t in exact(base).items())
    assert moved == round(0.25 * sum(t.numel() for t in got.values()))
    opposed = run(Ties(base=BASE, density=1.0), a, b, base=base)
    name = "layers.0.mlp.up.weight"
    up, down = exact(a)[name] - exact(base)[name], exact(b)[name] - exact(base)[name]
    clash = (up > 0) & (down < 0) & (up > -down)
    assert clash.any()
    assert torch.allclose((opposed[name] - exact(base)[name])[clash], up[clash], atol=1e-6)


def test_ties_of_copies_and_of_no_change(family: tuple[Model, Model, Model]) -> None:
    base, a, _ = family
    same(run(Ties(base=BASE, density=1.0), a, a, base=base), exact(a))
    same(run(Ties(base=BASE), base, base, base=base), exact(base), 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_once_to_nearest_even(dtype: str) -> None:
    base = made(0, dtype=dtype)
    a, b = made(1, base, dtype), made(2, base, dtype)
    got = run(Mean(weight=(1, 3)), a, b)
    want = each(lambda x, y: (0.25 * x + 0.75 * y).float().to(getattr(torch, dtype)).double(), a, b)
    same(got, want, 0)


def test_a_tied_table_is_merged_once_and_stays_tied(family: tuple[Model, Model, Model]) -> None:
    _, a, b = family
    result = merge(Mean(), (a, b), Context()).model
    assert result.is_meta
    assert result.ties() == {"head.weight": "embedding.weight"}
    assert "head.weight" not in result.weights
    a.materialize()
    assert not a.is_meta


def test_pieces_and_threads_do_not_change_the_result(
    family: tuple[Model, Model, Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, a, b = family
    whole = run(Ties(base=BASE), a, b, base=base)
    monkeypatch.setattr("effc.runtime.pieces.PIECE", 37)
    same(run(Ties(base=BASE), a, b, base=base), whole, 0)
    same(run(Slerp(), a, b), each(lambda x, y: slerp(x, y, 0.5), a, b))


def codes(method: Merge, *models: Model, base: Model | None = None) -> list[str]:
    with pytest.raises(EffcError) as caught:
        run(method, *models, base=base)
    return [item.code for item in caught.value.diagnostics]


def test_models_that_do_not_fit_are_refused_all_at_once(family: tuple[Model, Model, Model]) -> None:
    _, a, _ = family
    other, wide, deep = made(1), made(1, width=24), made(1, layers=3)
    other.architecture = "gpt2"
    assert codes(Mean(weight=(1, 1)), a, other, wide, deep) == ["E450", "E451", "E451", "E452"]
    with pytest.raises(EffcError) as caught:
        run(Mean(), a, wide, deep)
    notes = [note for item in caught.value.diagnostics for note in item.notes]
    assert any("embedding.weight is 31 x 16 in the first, 31 x 24 in model 2 of 3" in note for note in notes)
    assert any("only model 3 of 3 has layers.2" in note for note in notes)


def test_weights_that_cannot_work_are_refused(family: tuple[Model, Model, Model]) -> None:
    base, a, b = family
    assert codes(Mean(weight=(1, -1)), a, b) == ["E452"]
    assert codes(Ties(base=BASE, weight=(1, 0)), a, b, base=base) == ["E452"]


def test_damaged_numbers_are_found(family: tuple[Model, Model, Model]) -> None:
    _base, a, b = family
    bad = b.clone()
    bad.place("norm.weight", torch.nn.Parameter(torch.full((16,), float("nan")), requires_grad=False))
    assert codes(Mean(), a, bad) == ["E456"]
    assert codes(Ties(base=BASE), a, b, base=bad) == ["E456"]


def words(**vocab: int) -> TokenizerFiles:
    return TokenizerFiles({"tokenizer.json": json.dumps({"model": {"vocab": vocab}}).encode()})


def test_vocabularies_and_templates_must_agree(family: tuple[Model, Model, Model]) -> None:
    _, a, b = (model.clone() for model in family)
    a.tokenizer, b.tokenizer = words(x=0, y=1), words(x=1, y=0)
    assert codes(Mean(), a, b) == ["E454"]
    b.tokenizer = TokenizerFiles(
        {**a.tokenizer.files, "tokenizer_config.json": json.dumps({"chat_template": "hello"}).encode()}
    )
    assert codes(Mean(), a, b) == ["E455"]
    same(run(Mean(template="first"), a, b), each(lambda x, y: (x + y) / 2, a, b))


def test_a_merge_says_whose_head_it_keeps() -> None:
    one, two = made(1), made(2)
    assert Mean().refuses(one, [two]) == []
    two.beside = {"score.weight": LazyTensor((3, 16), torch.float32, lambda: torch.zeros(3, 16))}
    (told,) = Mean().refuses(one, [two])
    assert (told.code, told.severity) == ("W453", "warning")
    assert told.notes == ("the first has none", "model 2 of 2 has score.weight")
    (told,) = Mean().refuses(two, [two.clone()])
    assert told.notes == ("the first has score.weight",)
    assert set(merge(Mean(), [two, one], Context(seed=0)).model.beside) == {"score.weight"}
