"""Rules and pipelines: ten lines edit a traced module or a decoder, and what is wrong is caught and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from effc.compiler.blocks import Linear
from effc.compiler.contract import EXACT, LOSSY, WITHIN
from effc.compiler.instruments import Dump, Equality, Timing
from effc.compiler.match import Hit
from effc.compiler.model import Model
from effc.compiler.pattern import pattern
from effc.compiler.pipeline import Pipeline
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import Role
from effc.compiler.rule import Rule, rule
from effc.compiler.trace import TracedModel, trace
from effc.passes.quantize.rtn import RTN


@rule("fold_gain", "n: norm[form=layer, users=1] -> l: linear", contract=EXACT)
def fold_gain(rw: Rewriter, hit: Hit) -> None:
    gain, weight = rw.value(hit["n"], "weight"), rw.value(hit["l"], "weight")
    if bool((gain.tensor == 1).all()):
        return
    rw.derive(hit["l"], "weight", lambda w, g: w * g, weight, gain)
    rw.derive(hit["n"], "weight", torch.ones_like, gain)


@rule("drop_identity", "identity")
def drop_identity(rw: Rewriter, hit: Hit) -> None:
    rw.remove(hit["identity"])


def net() -> TracedModel:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(6, 8), nn.Identity(), nn.LayerNorm(8, bias=False), nn.Linear(8, 8), nn.Identity(),
        nn.Identity(), nn.ReLU(), nn.LayerNorm(8, bias=False), nn.Linear(8, 3),
    )  # fmt: skip
    for layer in (module[2], module[7]):
        nn.init.uniform_(layer.weight, 0.5, 2.0)
    return trace(module, torch.randn(4, 6))


def broken(edit: Callable[[Rewriter, Hit], object], contract: object = EXACT, text: str = "linear") -> Rule:
    return rule("broken", text, contract)(edit)


def test_a_rule_on_a_traced_module_is_verified() -> None:
    model = net()
    timing, equality = Timing(), Equality()
    ran = Pipeline([fold_gain, drop_identity], instruments=[timing, equality]).run(model)
    assert ran.failure is None
    assert [(s.rule, [str(h) for h in s.hits]) for s in ran.steps] == [
        ("fold_gain", ["n = 2, l = 3", "n = 7, l = 8"]),
        ("drop_identity", ["identity = 1", "identity = 4", "identity = 5"]),
    ]
    x = torch.randn(5, 6)
    torch.testing.assert_close(ran.model(x), model(x))
    assert torch.equal(ran.model.module("2").weight, torch.ones(8))
    assert model.module("1") is not None
    assert not any("Identity" in type(m).__name__ for m in ran.model.modules())
    (wide, own), _ = (s.measures for s in ran.steps)
    assert (wide.dtype, wide.limit) == ("float64", 1e-9)
    assert wide.error < 1e-14
    assert (own.dtype, own.limit) == ("float32", 1e-4)
    assert list(timing.seconds) == ["fold_gain", "drop_identity"]
    assert all(seconds > 0 for seconds in timing.seconds.values())
    assert [name for name, _ in equality.errors] == ["fold_gain", "drop_identity"]
    assert all(error < 1e-5 for _, error in equality.errors)


def test_rules_run_until_nothing_changes() -> None:
    ran = Pipeline([fold_gain, drop_identity], until="settled").run(net())
    assert [(s.round, s.rule, len(s.hits)) for s in ran.steps] == [
        (1, "fold_gain", 2), (1, "drop_identity", 3), (2, "fold_gain", 0), (2, "drop_identity", 0)
    ]  # fmt: skip


def test_rules_that_never_settle_are_given_up() -> None:
    def restless(rw: Rewriter, hit: Hit) -> None:
        rw.write(hit["linear"], "weight", rw.module(hit["linear"]).weight.clone())

    model = net()
    ran = Pipeline([broken(restless)], until="settled", rounds=3).run(model)
    assert ran.failure is not None
    assert ran.failure.code == "E412"
    assert "round 3" in ran.failure.title
    assert ran.model is model


def test_rules_run_on_imported_decoders_over_blocks_and_ops(made: Callable[[str], Model]) -> None:
    @rule("fold_op", pattern("n: layer_norm|rms_norm[offset=0] -> l: linear", over="ops", where=unbiased))
    def fold_op(rw: Rewriter, hit: Hit) -> None:
        gain, weight = rw.value(hit["n"], "weight"), rw.value(hit["l"], "weight")
        rw.derive(hit["l"], "weight", lambda w, g: w * g, weight, gain)

    @rule("unit_gain", pattern("n: rms_norm[offset=0]", over="ops"))
    def unit_gain(rw: Rewriter, hit: Hit) -> None:
        rw.write(hit["n"], "weight", torch.ones_like(rw.module(hit["n"]).weight))

    @rule("untie_head", "norm -> h: linear[tied=true]")
    def untie_head(rw: Rewriter, hit: Hit) -> None:
        rw.untie(hit["h"])

    model = made("llama")
    halves = Pipeline([fold_op]).run(model)
    assert halves.failure is not None, "gains count twice until the norms have lost theirs"
    assert "the outputs move by" in "\n".join(halves.failure.notes)

    @rule("fold_all", pattern("n: rms_norm[offset=0]", over="ops", where=wakes))
    def fold_all(rw: Rewriter, hit: Hit) -> None:
        gain = rw.value(hit["n"], "weight")
        for read in rw.match(pattern("n: rms_norm -> l: linear", over="ops")):
            if read["n"] == hit["n"]:
                rw.derive(read["l"], "weight", lambda w, g: w * g, rw.value(read["l"], "weight"), gain)
        rw.derive(hit["n"], "weight", torch.ones_like, gain)

    ran = Pipeline([untie_head, fold_all], until="settled").run(model)
    assert ran.failure is None, ran.failure and ran.failure.render()
    assert {(s.rule, len(s.hits)) for s in ran.steps if s.hits} == {("untie_head", 1), ("fold_all", 7)}
    assert all((ran.model.module(p).weight == 1).all() for p in ran.model.paths("norm"))


def unbiased(model: Model, hit: Hit) -> bool:
    return model.module(hit["n"]).bias is None


def wakes(model: Model, hit: Hit) -> bool:
    return not bool((model.module(hit["n"]).weight == 1).all())


def test_methods_and_rules_share_a_pipeline(tiny: Model) -> None:
    @rule("quiet", "norm -> m: mlp[layer=0]", WITHIN(0.5))
    def quiet(rw: Rewriter, hit: Hit) -> None:
        rw.write(f"{hit['m']}.down", "weight", rw.module(hit["m"]).down.weight * 0.999)

    ran = Pipeline([quiet, RTN(bits=8, group=16)]).run(tiny)
    assert ran.failure is None, ran.failure and ran.failure.render()
    assert [s.rule for s in ran.steps] == ["quiet", "quantize.rtn"]
    assert ran.steps[0].measures[0].limit == 0.5
    assert ran.steps[1].measures[0].limit is None
    again = Pipeline([RTN(bits=8, group=16), RTN(bits=8, group=16)]).run(tiny)
    assert again.failure is not None
    assert again.failure.code == "E322"
    assert again.model is tiny


def test_a_contract_that_is_not_kept_names_rule_node_and_error() -> None:
    def half(rw: Rewriter, hit: Hit) -> None:
        factor = 1.0 if hit["linear"] == "0" else 1.5
        rw.write(hit["linear"], "weight", rw.module(hit["linear"]).weight * factor)

    model = net()
    before = {name: t.clone() for name, t in model.tensors().items()}
    ran = Pipeline([fold_gain, broken(half)]).run(model)
    assert ran.failure is not None
    said = ran.failure.render()
    assert "error[E409]: rule `broken` does not keep its contract EXACT" in said
    assert "at linear = 3" in said
    assert "of the output range in float64, at most 1e-09" in said
    assert ran.model is model
    assert all(torch.equal(t, before[name]) for name, t in model.tensors().items())
    assert [s.rule for s in ran.steps] == ["fold_gain"]
    assert ran.map.names == {name: name for name in model.tensors()}
    lossy = Pipeline([broken(half, LOSSY)]).run(model)
    assert lossy.failure is None
    assert lossy.steps[0].measures[0].error > 0.01


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda rw, hit: rw.swap(hit["linear"], wrong(7, 8)), ["wrong shapes at `0`"]),
        (
            lambda rw, hit: rw.swap("8", wrong(8, 4)),
            ["wrong shapes at `output`", r"gives \[\[4, 4\]\], before"],
        ),
        (lambda rw, hit: rw.insert("more", wrong(3, 3), after="8"), ["wrong roles at `more`", "has no role"]),
        (lambda rw, hit: misshapen(rw), ["wrong shapes at `8.weight`", "takes"]),
        (lambda rw, hit: rw.remove("nowhere"), ["fails at linear = 0", "no block is at `nowhere`"]),
        (lambda rw, hit: 1 / 0, ["fails at linear = 0", "ZeroDivisionError"]),
    ],
)
def test_a_broken_model_is_never_handed_on(edit: Callable[..., object], words: list[str]) -> None:
    import re

    model = net()
    ran = Pipeline([broken(edit)]).run(model)
    assert ran.failure is not None
    assert ran.failure.code == "E409"
    for word in words:
        assert re.search(word, ran.failure.render()), ran.failure.render()
    assert ran.model is model


def wrong(i: int, o: int) -> Linear:
    unit = Linear(in_features=i, out_features=o)
    unit.weight = nn.Parameter(torch.ones(o, i), requires_grad=False)
    return unit


def misshapen(rw: Rewriter) -> None:
    rw.module("8")._parameters["weight"] = nn.Parameter(torch.ones(3, 9), requires_grad=False)
    rw.write("0", "weight", torch.zeros(8, 6))


def test_a_tie_that_breaks_unsaid_is_a_flaw(tiny: Model) -> None:
    def copied(rw: Rewriter, hit: Hit) -> None:
        unit = Linear(in_features=32, out_features=61)
        unit.weight = nn.Parameter(rw.module("head").weight.clone(), requires_grad=False)
        rw.swap("head", unit)

    ran = Pipeline([broken(copied, text="norm -> linear")]).run(tiny)
    assert ran.failure is not None
    assert "wrong ties at `head.weight`" in ran.failure.title
    assert "rw.untie" in str(ran.failure.help)


def test_functions_are_edited_in_surgery() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.relu(self.up(x))) + 0

    @rule("relu_once", "a: relu -> b: relu")
    def relu_once(rw: Rewriter, hit: Hit) -> None:
        rw.remove(hit["b"])

    @rule("abs_of_relu", "a: relu -> b: add", LOSSY)
    def negate(rw: Rewriter, hit: Hit) -> None:
        with rw.surgery(hit["b"], "negated") as graph:
            node = rw.node(hit["b"])
            with graph.inserting_after(node):
                new = graph.call_function(torch.neg, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    x = torch.randn(3, 4)
    model = trace(Twice(), x)
    ran = Pipeline([relu_once, negate]).run(model)
    assert ran.failure is None, ran.failure and ran.failure.render()
    torch.testing.assert_close(ran.model(x), -model(x))
    calls = [n.name for n in ran.model.gm.graph.nodes if n.op == "call_function"]
    assert calls == ["relu", "add", "neg"]
    assert [n.meta["origin"] for n in ran.model.gm.graph.nodes if n.name == "neg"] == ["abs_of_relu"]


def test_a_block_is_inserted_with_a_role() -> None:
    @rule("widen", "l: linear[out=3]")
    def widen(rw: Rewriter, hit: Hit) -> None:
        if "eye" not in rw.model.roles:
            unit = wrong(3, 3)
            unit.weight = nn.Parameter(torch.eye(3), requires_grad=False)
            rw.insert("eye", unit, after=hit["l"], role=Role("linear"))

    ran = Pipeline([widen], until="settled").run(net())
    assert ran.failure is None, ran.failure and ran.failure.render()
    assert ran.model.roles["eye"] == Role("linear")


def test_black_boxes_and_half_precision_are_measured_in_what_they_have() -> None:
    class Black(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inside(x) if float(x.sum()) > 0 else -x

    def same(rw: Rewriter, hit: Hit) -> None:
        rw.write("module.inside", "weight", rw.module("module.inside").weight.clone())

    black = trace(Black(), torch.ones(2, 4))
    (step,) = Pipeline([broken(same, text="*")]).run(black).steps
    assert [(m.dtype, m.limit) for m in step.measures] == [("float32", 1e-4)]
    half = trace(nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16), torch.randn(2, 4, dtype=torch.bfloat16))
    ran = Pipeline([broken(lambda rw, hit: rw.write("0", "weight", rw.module("0").weight.clone()))]).run(half)
    assert [(m.dtype, m.limit) for m in ran.steps[0].measures] == [
        ("float64", 1e-9), ("float32", 1e-4), ("bfloat16", None)
    ]  # fmt: skip


def test_dumps_are_a_file_a_step(tmp_path: Path) -> None:
    dump = Dump(tmp_path / "steps")
    Pipeline([fold_gain, drop_identity], instruments=[dump]).run(net())
    assert [f.name for f in dump.files] == ["000-input.txt", "001-fold_gain.txt", "002-drop_identity.txt"]
    assert "Identity" in dump.files[1].read_text()
    assert "Identity" not in dump.files[2].read_text().partition("remove")[0]
    assert "write     3.weight" in dump.files[1].read_text()


def test_inputs_of_ones_own_are_used() -> None:
    seen: list[tuple[int, ...]] = []

    class Shapes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(tuple(x.shape))
            return x

    model = net()
    rw = Rewriter(model)
    rw.insert("seen", Shapes(), after="8", role=Role("other"))
    Pipeline([fold_gain], inputs=[torch.randn(9, 6), (torch.randn(1, 6),)]).run(rw.done())
    assert {shape[0] for shape in seen} == {9, 1}


def test_what_is_no_rule_or_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"put @effc\.rule"):
        Pipeline([lambda rw, hit: None])
    with pytest.raises(ValueError, match="until is once or settled"):
        Pipeline([fold_gain], until="ever")
    with pytest.raises(TypeError, match=r"write effc\.trace\(module, inputs\)"):
        Pipeline([fold_gain]).run(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="named by a word"):
        rule("two words", "linear")
