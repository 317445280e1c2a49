"""The planner: exact sizes from structure alone, selector reports, and refusals that say what would fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.fit import remedy, untimed
from effc.compiler.method import Method, Work
from effc.compiler.model import Model
from effc.compiler.plan import Plan, Staged, plan
from effc.compiler.plan_text import plan_text
from effc.passes.prune.depth import Depth
from effc.passes.quantize.rtn import RTN
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.recipe import Binding, Call, Expect, Export, Metric, Recipe, Ref, Side
from effc.specs.target import TARGETS, Target, read_target

WIDTH, HIDDEN, VOCAB, LAYERS = 32, 64, 96, 4


def decoder(layers: int = LAYERS) -> Model:
    def layer() -> dict[str, object]:
        return {
            "norm1": Norm(width=WIDTH),
            "attention": Attention(width=WIDTH, heads=4, kv_heads=2, head_dim=8),
            "norm2": Norm(width=WIDTH),
            "mlp": MLP(width=WIDTH, hidden=HIDDEN),
        }

    gm = assemble(
        Embedding(vocab=VOCAB, width=WIDTH),
        [layer() for _ in range(layers)],  # type: ignore[misc]
        Norm(width=WIDTH),
        Linear(in_features=WIDTH, out_features=VOCAB),
    )
    return Model(gm, config={"hidden_size": WIDTH})


@dataclass
class Hand:
    """Sources by hand: models and methods by name of their binding."""

    methods: Mapping[str, Method]
    free: int = 10**12
    export_problems: Mapping[str, Diagnostic] = field(default_factory=dict)

    def model(self, binding: Binding, models: Mapping[str, Model]) -> Model:
        return decoder()

    def stage(self, binding: Binding) -> Staged:
        return Staged(self.methods[binding.name], tuple(r.name for r in binding.call.models), seq=16)

    def refuses(self, export: Export, model: Model) -> Sequence[Diagnostic]:
        return [d for name, d in self.export_problems.items() if name == export.call.kind]

    def missing(self, binding: Binding) -> Sequence[Diagnostic]:
        return ()

    def disk_free(self) -> int:
        return self.free


def recipe(*stages: tuple[str, str, str], exports: Sequence[Export] = ()) -> Recipe:
    base = Binding("base", "model", "model", Call("load", {"path": "x"}))
    made = [Binding(n, "stage", "model", Call(kind, {}, (Ref(of),))) for n, kind, of in stages]
    return Recipe("r", "", 1, {}, (base, *made), (), tuple(exports))


def machine(**changes: object) -> Target:
    return read_target(TARGETS / "cpu-2core.yaml").model_copy(update=changes)


def shrink(**changes: object) -> Plan:
    hand = Hand({"thin": Depth(keep=0.5, data=Ref("code")), "small": RTN(bits=4, group=16)})
    steps = (("thin", "prune.depth", "base"), ("small", "quantize.rtn", "thin"))
    return plan(recipe(*steps), hand, machine(**changes))


def test_sizes_follow_from_the_structure() -> None:
    made = shrink()
    block = WIDTH * WIDTH * 2 + WIDTH * 16 * 2 + 3 * WIDTH * HIDDEN + 2 * WIDTH
    outside = 2 * VOCAB * WIDTH + WIDTH
    assert made.stage("base").cost.params == outside + LAYERS * block
    assert made.stage("thin").cost.params == outside + 2 * block
    assert made.stage("thin").cost.bytes == 4 * (outside + 2 * block)
    assert made.stage("small").cost.params == made.stage("thin").cost.params
    packed = block - 2 * WIDTH  # at half a byte and a two-byte scale for each 16 weights
    kept = 4 * (outside + 2 * 2 * WIDTH)
    assert made.stage("small").cost.bytes == kept + 2 * (packed // 2 + packed // 16 * 2)


def test_attention_and_cache_are_counted() -> None:
    base = shrink().stage("base").cost
    block = 2 * WIDTH * WIDTH + 2 * WIDTH * 16 + 3 * WIDTH * HIDDEN
    assert base.flops_per_token == 2 * VOCAB * WIDTH + LAYERS * (2 * block + 4 * 512 * 4 * 8)
    assert base.kv_bytes_per_token == LAYERS * 2 * 2 * 8 * 4


def test_the_selector_report_says_what_is_touched_and_how() -> None:
    ((roles, layers, words),) = shrink().stage("small").selected
    assert roles == "attention.{q,k,v,o} mlp.{gate,up,down}"
    assert layers == "layers 0-1"
    assert "bits = 4, group = 16" in words


def test_nothing_gets_storage() -> None:
    assert all(model.is_meta for model in shrink().models.values())


def test_every_problem_is_reported_and_what_depends_on_it_is_left_out() -> None:
    hand = Hand(
        {"a": Depth(keep=9, data=Ref("c")), "b": RTN(bits=4, group=16), "c": Depth(keep=8, data=Ref("c"))}
    )
    steps = (("a", "prune.depth", "base"), ("b", "quantize.rtn", "a"), ("c", "prune.depth", "base"))
    with pytest.raises(EffcError) as caught:
        plan(recipe(*steps), hand, machine())
    assert [d.title for d in caught.value.diagnostics] == [
        "`keep` of `prune.depth` leaves 9 of 4 layers",
        "`keep` of `prune.depth` leaves 8 of 4 layers",
    ]


def test_what_does_not_fit_into_memory_is_refused_with_the_setting_that_fits() -> None:
    class Heavy(Depth):
        """Holds a megabyte for each sample."""

        def work(self, model: Model, seq: int = 0) -> Work:
            return Work(memory=self.samples * 1_000_000)

    hand = Hand({"thin": Heavy(keep=0.5, data=Ref("code"), samples=64)})
    with pytest.raises(EffcError) as caught:
        plan(recipe(("thin", "prune.depth", "base")), hand, machine(base_bytes=0, memory_bytes=20_000_000))
    (problem,) = caught.value.diagnostics
    assert problem.code == "E351"
    assert "`samples = 8`" in str(problem.help)
    assert "20 MB" in problem.notes[0]


def test_the_latency_of_a_model_larger_than_memory_is_refused() -> None:
    side = Side(Metric("base", "latency"))
    limit = Expect("base.latency <= 1 s", side, "<=", Side(1.0))
    assert untimed([limit], {"base": 90}, 100) == []
    (problem,) = untimed([limit], {"base": 90}, 100, rest=20)
    assert problem.code == "E351"
    assert "110" in problem.notes[0]
    hand = Hand({"small": RTN(bits=4, group=16)})
    made = recipe(("small", "quantize.rtn", "base"))
    with pytest.raises(EffcError) as caught:
        plan(replace(made, expects=(limit,)), hand, machine(base_bytes=0, memory_bytes=10_000))
    assert any("latency of `base`" in d.title for d in caught.value.diagnostics)


def test_a_full_disk_is_refused_before_anything_runs() -> None:
    with pytest.raises(EffcError) as caught:
        shrink(disk_bytes=1000)
    assert caught.value.diagnostics[0].code == "E352"


def test_what_an_export_cannot_hold_is_refused() -> None:
    problem = Diagnostic("E303", "`hf` cannot hold packed weights")
    hand = Hand({"small": RTN(bits=4, group=16)}, export_problems={"hf": problem})
    exports = [Export("small", Call("hf", {"path": "out"})), Export("small", Call("artifact", {"path": "o"}))]
    with pytest.raises(EffcError) as caught:
        plan(recipe(("small", "quantize.rtn", "base"), exports=exports), hand, machine())
    assert [d.title for d in caught.value.diagnostics] == [problem.title]


def test_no_setting_helps_when_the_model_itself_is_too_large() -> None:
    assert remedy(RTN(bits=4, group=16), lambda method: 10**12, 10**9) is None


def test_the_text_has_a_row_for_each_stage_and_says_that_it_fits() -> None:
    text = plan_text(shrink().as_json())
    rows = [line.split()[0] for line in text.splitlines() if line and not line.startswith(" ")]
    assert rows[:5] == ["plan", "stage", "base", "thin", "small"]
    assert "small (quantize.rtn) touches:" in text
    assert "fits `cpu-2core`" in text
