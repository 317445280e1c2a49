"""The Rewriter leaves its input alone and keeps roles, ties, sources and names true."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from effc.compiler.blocks import Linear, Norm, Scale
from effc.compiler.blocks.quant_linear import QuantEmbedding
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.pattern import pattern
from effc.compiler.rewrite import Rewriter
from effc.compiler.weights import resident
from effc.passes.reparam.hashed import Hashed
from effc.runtime.rewriting import rewrite
from effc.specs.diagnostic import EffcError

Ids = Callable[..., torch.Tensor]


@pytest.fixture
def sourced(tiny: Model) -> Model:
    """Every tensor can be read again, from where its name says."""
    tiny.weights = {name: resident(t) for name, t in tiny.tensors().items()}
    return tiny


def test_no_edit_reaches_the_input(sourced: Model, ids: Ids) -> None:
    x = ids(sourced)
    before, names = sourced(x), list(sourced.tensors())
    rw = Rewriter(sourced, "test")
    rw.write("layers.0.mlp.up", "weight", torch.zeros(48, 32))
    rw.tie("layers.2.attention", to="layers.1.attention")
    rw.swap("layers.1.mlp.down", Linear(in_features=48, out_features=32))
    rw.remove_layers([0])
    rw.done()
    assert torch.equal(sourced(x), before)
    assert list(sourced.tensors()) == list(sourced.weights) == names


def test_removed_layers_renumber_names_roles_and_sources(sourced: Model, ids: Ids) -> None:
    rw = Rewriter(sourced, "prune.depth")
    rw.remove_layers([1])
    out = rw.done()
    assert out.layers == 2
    assert rw.origins["layers.1.mlp.up.weight"] == "layers.2.mlp.up.weight"
    assert "layers.2.mlp.up" not in out.roles
    assert str(out.roles["layers.1.mlp.up"]) == "mlp.up[1]"
    assert torch.equal(out.weights["layers.1.norm1.weight"].read(), sourced.module("layers.2.norm1").weight)
    x = ids(sourced)
    want = sourced.module("embedding")(x, sourced.step(x))
    step = sourced.step(x)
    for i in (0, 2):
        layer = sourced.module(f"layers.{i}")
        want = want + layer.attention(layer.norm1(want), step)
        want = want + layer.mlp(layer.norm2(want))
    want = sourced.module("head")(sourced.module("norm")(want))
    torch.testing.assert_close(out(x), want)
    assert out.ties() == {"head.weight": "embedding.weight"}


def test_repeated_layers_are_copies_until_tied(sourced: Model) -> None:
    rw = Rewriter(sourced, "grow.stack")
    rw.arrange_layers([0, 1, 2, 0, 1, 2])
    out = rw.done()
    assert out.layers == 6
    assert len(out.tensors()) == 2 + 6 * 9
    rw.write("layers.3.mlp.up", "weight", torch.zeros(48, 32))
    assert out.module("layers.0.mlp.up").weight.abs().max() > 0
    rw.tie("layers.4.mlp", to="layers.1.mlp")
    out = rw.done()
    assert out.ties()["layers.4.mlp.up.weight"] == "layers.1.mlp.up.weight"
    rw.write("layers.4.mlp.up", "weight", torch.ones(48, 32))
    assert torch.equal(out.module("layers.1.mlp.up").weight, torch.ones(48, 32))
    rw.untie("layers.4.mlp")
    assert "layers.4.mlp.up.weight" not in rw.done().ties()
    assert rw.origins["layers.4.mlp.gate.weight"] == "layers.1.mlp.gate.weight"


def test_what_is_written_has_no_source_and_stays_when_released(sourced: Model) -> None:
    rw = Rewriter(sourced, "test")
    rw.write("layers.0.mlp.up", "weight", torch.full((48, 32), 2.0))
    rw.remove_layers([1])
    out = rw.done()
    out.release()
    assert rw.written == {"layers.0.mlp.up.weight"}
    kept = [name for name, t in out.tensors().items() if not t.is_meta]
    assert kept == ["layers.0.mlp.up.weight"]
    assert not out.materialize().is_meta


def test_a_tie_follows_a_write_and_an_untied_head_does_not(sourced: Model) -> None:
    rw = Rewriter(sourced, "test")
    rw.write("head", "weight", torch.ones(61, 32))
    assert torch.equal(rw.module("embedding").weight, torch.ones(61, 32))
    rw.untie("head")
    rw.write("head", "weight", torch.zeros(61, 32))
    assert torch.equal(rw.module("embedding").weight, torch.ones(61, 32))
    assert rw.done().ties() == {}


def test_a_packed_embedding_takes_over_learned_positions(made: Callable[[str], Model]) -> None:
    model = made("gpt2")
    rw = Rewriter(model, "test")
    packed = QuantEmbedding(vocab=61, width=32, bits=8, group=32, positions=40)
    q, scale = torch.ones(61, 32, dtype=torch.int8), torch.ones(61, 1)
    packed.fill(q, scale, None)
    rw.swap("embedding", packed)
    out = rw.done()
    assert torch.equal(out.module("embedding.position").weight, model.module("embedding.position").weight)
    assert str(out.roles["embedding.position"]) == "embedding.position"
    assert out(torch.tensor([[1, 2]])).shape == (1, 2, 61)


def test_blocks_are_inserted_and_removed(tiny: Model, ids: Ids) -> None:
    rw = Rewriter(tiny, "test")
    rw.insert("damp", Scale(factor=0.5), after="norm")
    out = rw.done()
    torch.testing.assert_close(out(ids(tiny)), tiny(ids(tiny)) * 0.5)
    assert [n.meta["origin"] for n in out.gm.graph.nodes if n.target in ("damp", "head")] == ["test", "load"]
    rw.remove("damp")
    torch.testing.assert_close(rw.done()(ids(tiny)), tiny(ids(tiny)))


def test_only_touched_nodes_carry_the_stage(tiny: Model) -> None:
    rw = Rewriter(tiny, "quantize.rtn")
    rw.swap("layers.1.mlp.up", Linear(in_features=32, out_features=48, bias=True))
    out = rw.done()
    touched = [n.target for n in out.gm.graph.nodes if n.meta.get("origin") == "quantize.rtn"]
    assert touched == ["layers.1.mlp"]
    assert str(rw.log[0]).split() == ["swap", "layers.1.mlp.up", "Linear", "->", "Linear"]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda rw: rw.remove_layers([7]), "no layer 7"),
        (lambda rw: rw.remove_layers([0, 1, 2]), "no layer would be left"),
        (lambda rw: rw.arrange_layers([0, 3]), "layers are 0 to 2"),
        (lambda rw: rw.linear("layers.0.norm1"), "not a dense linear"),
        (lambda rw: rw.remove("layers.9.mlp"), r"no block is at `layers\.9\.mlp`"),
    ],
)
def test_impossible_edits_are_refused(tiny: Model, act: Callable[[Rewriter], object], words: str) -> None:
    with pytest.raises(EffcError, match=words):
        act(Rewriter(tiny, "test"))


def test_a_wrong_shape_or_a_weight_without_role_is_a_bug(tiny: Model) -> None:
    rw = Rewriter(tiny, "test")
    with pytest.raises(ValueError, match=r"is \[48, 32\], the new tensor \[2\]"):
        rw.write("layers.0.mlp.up", "weight", torch.zeros(2))
    rw.insert("extra", Linear(in_features=32, out_features=32), after="norm")
    with pytest.raises(TypeError, match=r"extra \(Linear\) holds weights but has no role"):
        rw.done()


def test_patterns_find_chains(tiny: Model) -> None:
    rw = Rewriter(tiny, "test")
    assert [hit["linear"] for hit in rw.match(pattern("norm -> linear"))] == ["head"]
    hits = list(rw.match(pattern("n: norm -> a: attention -> add -> norm")))
    assert [(h["n"], h["a"], h["norm"]) for h in hits] == [
        (f"layers.{i}.norm1", f"layers.{i}.attention", f"layers.{i}.norm2") for i in range(3)
    ]
    assert not list(rw.match(pattern("mlp -> mlp")))
    assert all(isinstance(rw.module(h["norm"]), Norm) for h in hits)
    with pytest.raises(EffcError, match="`2x` is no element"):
        pattern("norm -> 2x")


def test_what_a_block_shares_within_stays_shared_when_blocks_part_and_join(tiny: Model) -> None:
    """Its matrices read one array, which all blocks of the model read too."""
    rw = Rewriter(rewrite(Hashed(keep=0.25), tiny, Context()).model, "test")
    one, other = (rw.module(f"layers.{layer}.attention") for layer in (0, 1))
    rw.untie("layers.0.attention")
    assert one.q.pool is one.k.pool
    assert one.q.pool is one.o.pool
    assert one.q.pool is not other.q.pool
    assert one.k.scales is one.v.scales
    assert one.k.scales is not other.k.scales
    rw.tie("layers.0.attention", to="layers.1.attention")
    assert all(one.get_submodule(name).pool is other.q.pool for name in "qkvo")
    assert list(rw.done().ties()) == list(rewrite(Hashed(keep=0.25), tiny, Context()).model.ties())
