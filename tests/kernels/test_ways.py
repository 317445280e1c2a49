"""Ways of a kernel: all give the same bits; the fastest is measured once, briefly, and remembered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effc.kernels.cpu import ways
from effc.kernels.cpu.build import MORE_FLAGS, build, load
from effc.kernels.cpu.entry import launch
from effc.kernels.cpu.isa import Isa, available
from effc.kernels.cpu.ways import BUCKETS, TRIED, Found
from effc.kernels.epilogue import operands
from effc.kernels.program import settle
from effc.kernels.quant_linear import emit_c, trial
from effc.kernels.quant_linear.layout import columns
from effc.kernels.quant_linear.spec import QuantLinearSpec
from effc.passes.lower.decoder import lower
from effc.runtime.kernel_texts import kernel_texts
from effc.runtime.kernel_ways import way_lines, ways_of
from effc.specs import user_cache
from tests.kernels.test_quant_linear import SPECS, Case, K
from tests.passes.test_lower import quantized


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[3]], ids=lambda s: f"w{s.bits}")
def test_every_way_gives_the_same_bits(spec: QuantLinearSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """By matrix units where there are some, else by plain C in their place."""
    case = Case(spec, n=96 if spec.paired else 150)
    units = Isa.AMX in available()
    isa = Isa.AMX if units else available()[-1]
    monkeypatch.setenv(MORE_FLAGS, "" if units else "-DTILES_IN_C")
    text = emit_c.emit(spec) + trial.function(spec)
    go = load(build(text, isa))[f"go_{spec.key}"]
    for m in (1, 2, 3, 5, 13, 23):
        found = []
        for way in range(len(emit_c.NAMES)):
            go(bytes([way] * len(BUCKETS)))
            found.append(_call(case, text, isa, m))
        assert all(torch.equal(found[0], other) for other in found[1:]), m


def _call(case: Case, text: str, isa: Isa, m: int) -> Tensor:
    spec, dice = case.spec, torch.Generator().manual_seed(m)
    x, groups = torch.randn(m, K, generator=dice), case.spec.groups(K)
    shapes = {"bias": (case.n,), "residual": (m, case.n), "gate": (m, case.n), "row_scale": (m,)}
    more = [torch.randn(shapes[name], generator=dice) for name in operands(spec.epilogue)]
    y, xq = torch.full((m, case.n), float("nan")), torch.empty(m, K, dtype=torch.int8)
    scales, sums = torch.empty(m, groups), torch.empty(m, groups, dtype=torch.int32)
    launch(text, spec.op, isa, 2, m, case.n, K, x, case.packed, y, xq, scales, sums, *more)
    assert not bool(y.isnan().any())
    return y


class Tried:
    """Stands for a trial: `units` says how many times as fast matrix units are with so many rows."""

    units: Mapping[int, float] = dict.fromkeys(TRIED, 2.0)
    calls = 0
    taken: dict[str, Sequence[int]]

    def __init__(self, _: Any, spec: QuantLinearSpec, matrices: Sequence[Tensor]) -> None:
        self.key, self.k = spec.key, columns(spec, matrices[0])

    def seconds(self, way: int, m: int, team: int, members: int) -> float:
        Tried.calls += 1
        return m * 1e-6 / (self.units[m] if way else 1.0)

    def take(self, chosen: Sequence[int]) -> None:
        Tried.taken[self.key] = tuple(chosen)


Settled = dict[str, Found]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settles the plan of a small packed model, with trials that only pretend; by one clock or another."""
    lowered = lower(quantized())
    tensors = {name: make() for name, make in lowered.tensors.items()}
    monkeypatch.setattr(settle, "Trial", Tried)
    monkeypatch.setattr(settle, "team", lambda _: 0)
    monkeypatch.setattr(Tried, "calls", 0)
    Tried.taken = {}

    def go(**more: Any) -> Settled:
        Tried.calls = 0
        return settle.settle(lowered.plan, None, tensors, Isa.AMX, 1, **more)

    return go


def test_the_fastest_way_is_taken_and_remembered(settled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tried, "units", dict(zip(TRIED, (0.5, 0.9, 1.02, 0.98, 0.7, 3.0), strict=True)))
    found = settled()
    assert found
    # 2 % is no reason to leave the usual way, whichever it is
    assert {one.ways for one in found.values()} == {(0, 0, 1, 1, 0, 1)}
    assert set(Tried.taken.values()) == {(0, 0, 1, 1, 0, 1)}
    assert Tried.calls > 0
    assert settled() == found
    assert Tried.calls == 0


@pytest.mark.parametrize("spoilt", ["text", "device", "file", "way", "seconds"])
def test_what_does_not_fit_is_measured_again(
    spoilt: str, settled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled()
    place = user_cache.folder() / f"ways-{ways.device(Isa.AMX)}.json"
    head, _, body = place.read_text().partition("\n")
    entries = json.loads(body)
    if spoilt == "text":
        real = emit_c.function
        monkeypatch.setattr(settle.emit_c, "function", lambda spec: real(spec) + " ")
    elif spoilt == "device":
        monkeypatch.setattr(ways, "device", lambda isa: "another")
    elif spoilt == "file":
        place.write_text(f"{head}\n{body[:-3]}")
    else:
        for entry in entries.values():
            entry["ways" if spoilt == "way" else "seconds"][2] = 7 if spoilt == "way" else {}
        user_cache.write(place.name, ways.device(Isa.AMX), entries)
    assert settled()
    assert Tried.calls > 0


def test_measuring_ends_with_its_budget_and_goes_on_another_day(settled: Any) -> None:
    """Each look at the clock is a tenth of the budget later: some kernels are measured, the others wait."""
    seen: list[float] = []

    def clock() -> float:
        seen.append(len(seen) * settle.BUDGET / 10)
        return seen[-1]

    first = settled(clock=clock)
    wanted = set(Tried.taken)
    assert len(first) < len(wanted)
    assert all(Tried.taken[key] == emit_c.usual() for key in wanted - set(first))
    assert set(settled()) == wanted


def test_a_cache_that_cannot_be_written_costs_no_more_than_measuring(
    settled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_cache, "write", lambda *_: False)
    assert settled() == settled()
    assert Tried.calls > 0


def test_a_program_measures_its_own_kernels_once() -> None:
    """Through the real library: every kernel of a packed model gets an entry, within the budget."""
    from effc.runtime.decoder import ready

    made = ready(quantized(), threads=1).program
    if made.isa is not Isa.AMX:
        assert made.found == {}
        return
    assert set(made.found) == set(settle.kernels(made.plan))
    again = ready(quantized(), threads=1).program
    assert again.found == made.found
    told = ways_of(quantized())
    assert {line["kernel"] for line in told} == {f"quant_linear_{key}" for key in made.found}
    assert all(line["why"].startswith("measured: ") for line in told)


def test_the_lock_pins_what_changes_sums_and_leaves_the_rest_open(settled: Any) -> None:
    """Specs by key; what a machine measures is named there, and neither text nor lock changes with it."""
    model = quantized()
    texts, entry = kernel_texts(model)
    plan = lower(model).plan
    for call in plan.calls:
        for spec in call.specs:
            pinned = entry["specs"][spec.key]
            assert type(spec).model_validate({k: v for k, v in pinned.items() if k != "op"}) == spec
    assert entry["ways"] == {key: list(emit_c.NAMES) for key in settle.kernels(plan)}
    settled()
    assert kernel_texts(model) == (texts, entry)


def test_a_field_that_changes_the_order_of_a_sum_changes_the_key() -> None:
    one = QuantLinearSpec(bits=4, group=64)
    others = [
        one.model_copy(update=change)
        for change in ({"group": 32}, {"bits": 8}, {"symmetric": False}, {"scale": "bfloat16"})
    ]
    assert len({one.key, *(other.key for other in others)}) == 5
    rules = [{"on": "head", "bits": 8}]
    keys = []
    for group in (8, 16):
        model = quantized(group=group, rules=rules)
        keys.append(set(kernel_texts(model)[1]["specs"]))
    assert keys[0] != keys[1]


def test_ways_are_told_in_words() -> None:
    found = Found((0, 0, 1, 1, 1, 1), tuple({0: 3e-6, 1: 2e-6 if i > 1 else 6e-6} for i in range(6)))
    assert ways.words(emit_c.NAMES, emit_c.usual(), found) == [
        ("1 to 3 rows", "vectors", "measured: 2.00x as fast as the other"),
        ("from 4 rows", "matrix units", "measured: 1.50x as fast as the other"),
    ]
    usual = ways.words(emit_c.NAMES, emit_c.usual(), None)
    assert usual[0] == ("1 to 3 rows", "vectors", "usual, not measured on this machine yet")
    alone = Found((0,) * 6, ({0: 1e-6},) * 6)
    assert ways.words(emit_c.NAMES, emit_c.usual(), alone) == [
        ("any rows", "vectors", "the only way for its columns")
    ]
    named = [dict(zip(("kernel", "rows", "way", "why"), ("k", *line), strict=True)) for line in usual]
    assert [line[0] for line in way_lines(named)] == ["k", ""]
