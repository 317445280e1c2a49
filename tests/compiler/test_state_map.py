"""State dicts carried over edits: names, derived tensors, and the way back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from effc.compiler.blocks import Linear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.match import Hit
from effc.compiler.model import Model
from effc.compiler.pipeline import Pipeline
from effc.compiler.rewrite import Rewriter
from effc.compiler.rule import rule
from effc.compiler.trace import trace
from effc.passes.prune.magnitude import Magnitude
from effc.specs.diagnostic import EffcError

from .conftest import fill, inputs, llama


def state_of(model: Model) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def with_state(model: Model, state: dict[str, Tensor]) -> Model:
    clone = model.clone()
    for name in clone.tensors():
        clone.place(name, state[name])
    return clone


def other_numbers(model: Model, seed: int = 9) -> Model:
    return fill(model.clone(), seed)


def close(a: Model, b: Model, x: Tensor) -> bool:
    return torch.allclose(a(x), b(x), rtol=1e-4, atol=1e-4)


def test_nothing_edited_is_the_same_state_dict(tiny: Model) -> None:
    m = Rewriter(tiny).state_map()
    assert m.names["layers.2.mlp.up.weight"] == "layers.2.mlp.up.weight"
    assert m.names["head.weight"] == m.names["embedding.weight"] == "embedding.weight"
    assert (m.lost, m.opaque) == ((), ())
    state = state_of(tiny)
    assert all(torch.equal(t, state[name]) for name, t in m.forward(state).items())
    assert m.back(state).keys() == state.keys()


def test_removed_layers_rename_and_are_taken_from_the_rest(tiny: Model) -> None:
    rw = Rewriter(tiny)
    rw.remove_layers([1])
    m, small = rw.state_map(), rw.done()
    assert m.names["layers.1.mlp.up.weight"] == "layers.2.mlp.up.weight"
    assert all(name.startswith("layers.1.") for name in m.lost)
    assert len(m.lost) == 9
    x, fresh = inputs(tiny), other_numbers(tiny)
    rw2 = Rewriter(fresh)
    rw2.remove_layers([1])
    assert torch.equal(m.load(small, state_of(fresh))(x), rw2.done()(x))
    with pytest.raises(EffcError, match=r"`layers\.1\.norm1\.weight` follows from nothing") as caught:
        m.back(state_of(small))
    assert caught.value.diagnostics[0].code == "E413"
    assert "rest=" in str(caught.value.diagnostics[0].help)
    back = m.back(state_of(small), rest=state_of(tiny))
    assert all(torch.equal(back[name], t) for name, t in state_of(tiny).items())


def test_loading_leaves_the_edited_model_and_its_source_alone(tiny: Model) -> None:
    rw = Rewriter(tiny)
    rw.remove_layers([0])
    small = rw.done()
    before, source = state_of(small), state_of(tiny)
    rw.state_map().load(small, state_of(other_numbers(tiny)))
    assert all(torch.equal(t, before[name]) for name, t in small.state_dict().items())
    assert all(torch.equal(t, source[name]) for name, t in tiny.state_dict().items())


def test_copies_share_a_name_and_must_agree_on_the_way_back(tiny: Model) -> None:
    rw = Rewriter(tiny)
    rw.arrange_layers([0, 1, 2, 1])
    m, big = rw.state_map(), rw.done()
    assert m.names["layers.3.mlp.up.weight"] == "layers.1.mlp.up.weight"
    assert m.lost == ()
    state = state_of(big)
    assert m.back(state).keys() == state_of(tiny).keys()
    state["layers.3.mlp.up.weight"] += 1
    with pytest.raises(
        EffcError, match=r"`layers\.1\.mlp\.up\.weight` and `layers\.3\.mlp\.up\.weight` both stand"
    ):
        m.back(state)


def test_a_tie_goes_back_to_two_tensors(tiny: Model) -> None:
    rw = Rewriter(tiny)
    rw.tie("layers.2.mlp", to="layers.0.mlp")
    m, tied = rw.state_map(), rw.done()
    back = m.back(state_of(tied))
    assert torch.equal(back["layers.2.mlp.up.weight"], tiny.module("layers.0.mlp.up").weight)
    assert close(with_state(tiny, back), tied, inputs(tiny))


def test_what_is_written_goes_back_and_does_not_follow(tiny: Model) -> None:
    pruned = Rewriter(tiny, "prune.magnitude")
    Magnitude(sparsity=0.5, select=("mlp.up",)).rewrite(pruned)
    m, out = pruned.state_map(), pruned.done()
    assert m.lost == ()
    assert set(m.opaque) == {f"layers.{i}.mlp.up.weight" for i in range(3)}
    assert close(with_state(tiny, m.back(state_of(out))), out, inputs(tiny))
    with pytest.raises(EffcError, match=r"`layers\.0\.mlp\.up\.weight` does not follow") as caught:
        m.forward(state_of(tiny))
    assert "write layers.0.mlp.up.weight" in caught.value.diagnostics[0].notes[0]


def factored(rw: Rewriter, path: str, rank: int) -> None:
    """A product of two thin matrices in place of one, with both ways said."""
    old = rw.value(path, "weight")
    rows, inputs_ = old.tensor.shape

    def halves(w: Tensor) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return u[:, :rank] * s[:rank], v[:rank]

    unit = LowRankLinear(in_features=inputs_, out_features=rows, rank=rank)
    unit.b, unit.a = (nn.Parameter(t, requires_grad=False) for t in halves(old.tensor))
    rw.swap(path, unit)
    rw.follows(path, "b", lambda w: halves(w)[0], old)
    rw.follows(path, "a", lambda w: halves(w)[1], old)
    rw.recover(old, lambda b, a: b @ a, f"{path}.b", f"{path}.a")


def test_factors_follow_from_a_matrix_and_give_it_back(tiny: Model) -> None:
    rw = Rewriter(tiny)
    factored(rw, "layers.0.mlp.up", 32)
    rw.remove_layers([1])
    m, out = rw.state_map(), rw.done()
    assert m.opaque == ()
    assert "layers.0.mlp.up.weight" not in m.lost
    x, fresh = inputs(tiny), other_numbers(tiny)
    again = Rewriter(fresh)
    again.remove_layers([1])
    assert close(m.load(out, state_of(fresh)), again.done(), x)
    back = m.back(state_of(out), rest=state_of(tiny))
    assert torch.allclose(back["layers.0.mlp.up.weight"], tiny.module("layers.0.mlp.up").weight, atol=1e-5)


@rule("fold_gain", "n: norm -> l: linear")
def fold_gain(rw: Rewriter, hit: Hit) -> None:
    gain, weight = rw.value(hit["n"], "weight"), rw.value(hit["l"], "weight")
    rw.derive(hit["l"], "weight", lambda w, g: w * g, weight, gain)
    rw.derive(hit["n"], "weight", torch.ones_like, gain)


@rule("drop_identity", "identity")
def drop_identity(rw: Rewriter, hit: Hit) -> None:
    rw.remove(hit["identity"])


def test_maps_of_several_rules_join_and_a_modules_own_state_dict_loads() -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        parts = [nn.Linear(5, 6), nn.Identity(), nn.RMSNorm(6, eps=1e-6)]
        parts += [nn.Linear(6, 6), nn.RMSNorm(6, eps=1e-6), nn.Linear(6, 2)]
        for layer in (parts[2], parts[4]):
            nn.init.uniform_(layer.weight, 0.5, 2.0)
        return nn.Sequential(*parts).requires_grad_(False)

    first, second, x = build(0), build(1), torch.randn(7, 5)
    ran = Pipeline([fold_gain, drop_identity]).run(trace(first, x))
    assert ran.failure is None
    assert (ran.map.lost, ran.map.opaque) == ((), ())
    loaded = ran.map.load(ran.model, second.state_dict())
    torch.testing.assert_close(loaded(x), second(x))
    loaded.place("2.weight", torch.full((6,), 1.5))
    second.load_state_dict(ran.map.back(state_of(loaded)))
    torch.testing.assert_close(second(x), loaded(x))


def test_a_state_dict_of_another_model_is_refused(tiny: Model) -> None:
    m, state = Rewriter(tiny).state_map(), state_of(tiny)
    with pytest.raises(EffcError, match=r"lacks `norm\.weight`"):
        m.forward({name: t for name, t in state.items() if name != "norm.weight"})
    with pytest.raises(EffcError, match=r"`norm\.weight` is \[3\], not \[32\]"):
        m.forward(state | {"norm.weight": torch.ones(3)})
    one = {name: t for name, t in state.items() if name != "head.weight"}
    assert torch.equal(m.forward(one)["head.weight"], state["embedding.weight"])


Edit = Callable[[Rewriter], object]


def scaled(rw: Rewriter) -> None:
    """The same function: up is doubled and down is halved."""
    for name, factor in (("up", 2.0), ("down", 0.5)):
        path = f"layers.0.mlp.{name}"
        if isinstance(rw.module(path), Linear):
            rw.derive(path, "weight", lambda w, factor=factor: w * factor, rw.value(path, "weight"))


EDITS: dict[str, Edit] = {
    "scale": scaled,
    "drop": lambda rw: rw.remove_layers([rw.model.layers - 1]) if rw.model.layers > 1 else None,
    "turn": lambda rw: rw.arrange_layers(list(range(rw.model.layers))[::-1]),
    "untie": lambda rw: rw.untie("head"),
    "factor": lambda rw: (
        factored(rw, "layers.0.mlp.gate", 32) if isinstance(rw.module("layers.0.mlp.gate"), Linear) else None
    ),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(EDITS)), min_size=1, max_size=6), st.booleans())
def test_edits_commute_with_loading_and_undo_themselves(names: list[str], apart: bool) -> None:
    """load(edit(m), s) is edit(load(m, s)). What goes back is the same numbers where edits only moved or
    factored them, and numbers that compute the same where exact edits changed them.
    """
    source, fresh = fill(llama(), 0), fill(llama(), 5)
    if "drop" in names and "turn" in names:
        names = [name for name in names if name != "turn"]

    def edited(model: Model) -> tuple[Model, object]:
        rw = Rewriter(model)
        mapping = None
        for name in names:
            EDITS[name](rw)
            if apart:
                mapping = rw.state_map() if mapping is None else mapping.then(rw.state_map())
                rw = Rewriter(rw.done())
        return rw.done(), mapping if apart else rw.state_map()

    (out, m), (want, _) = edited(source), edited(fresh)
    x = inputs(source)
    state = state_of(fresh)
    assert m.opaque == ()
    assert close(m.load(out, state), want, x)
    back = m.back(state_of(want), rest=state)
    assert back.keys() == state.keys()
    if "scale" not in names:
        assert all(torch.allclose(back[name], t, atol=1e-4) for name, t in state.items())
    if set(names) <= {"scale", "untie", "factor"}:
        assert close(with_state(fresh, back), want, x)
