"""grouped_linear in Triton: routing, products of each expert, their sum; values, faults, compilation."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from effc.compiler.blocks.moe import MoE
from effc.kernels.gpu import check
from effc.kernels.grouped_linear.emit_triton import emit
from effc.kernels.grouped_linear.layout_gpu import apart, stack, together
from effc.kernels.grouped_linear.reference import mixture, route
from effc.kernels.grouped_linear.spec_gpu import TILES, GroupedLinearSpec, GroupTile, refuses

from .compiled import compiled, differences
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "grouped_linear.gpu"
PAIR = (GroupTile(bm=16, warps=4, stages=4, split=2), GroupTile(bm=32, warps=4, stages=2))
SPECS = (
    GroupedLinearSpec(experts=5, active=2, columns=64, tiles=PAIR),
    GroupedLinearSpec(experts=3, active=2, bits=4, group=64, symmetric=False, tiles=PAIR[:1]),
    GroupedLinearSpec(experts=3, active=3, bits=8, group=128, tiles=PAIR[1:], renormalize=False),
    GroupedLinearSpec(experts=4, active=1, bits=4, group=128, activation="gelu_tanh", tiles=PAIR[1:]),
)
GOLDEN = (GroupedLinearSpec(experts=64, active=8, bits=4, group=128, tiles=TILES[:1]),)
COMPILED = (
    *GOLDEN,
    GroupedLinearSpec(experts=8, active=2),
    GroupedLinearSpec(experts=128, active=8, bits=4, group=64, symmetric=False),
    GroupedLinearSpec(experts=16, active=4, bits=8, group=128),
    GroupedLinearSpec(experts=16, active=4, bits=2, group=64, symmetric=False),
)
LIMIT = 3.25
"""Instructions a weight at 16 rows with 4 bits in groups of 128; the plain layer's limit is 3.3."""


def job(spec: GroupedLinearSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    """Rows without an expert, experts without rows, all rows to one; ties; results poisoned before."""
    found = check.run("interpret", [job(spec) for spec in SPECS])
    assert {spec.describe(): words for spec, words in zip(SPECS, found, strict=True) if words} == {}


FAULTS = {
    # what is wrong: text, what stands instead, what is said of it, the function that is called
    "of equal ones the higher": ("tl.min(tl.where(p == best, e, POWER), 0)",
                                 "tl.max(tl.where(p == best, e, -1), 0)", "choose", "choose"),
    "weights that do not add up": ("kept = kept / tl.sum(kept, 0)", "kept = kept * 1.0", "choose", "choose"),
    "slots of an expert out of order": ("(j0 + j)[None, :] < i[:, None]",
                                        "(j0 + j)[None, :] > i[:, None]", "sort", "sort"),
    "two slots on one place": ("| equal)", ")", "race", "sort"),
    "places of the next expert": ("(other[None, :] < e[:, None])",
                                  "(other[None, :] <= e[:, None])", "sort", "sort"),
    "tiles that overlap": ("(tile - (last - each)) * BM", "0 * (tile - (last - each)) * BM", "", "launch"),
    "rows of the next expert": ("tl.minimum(end - at, BM)", "BM + 0 * at", "", "up"),
    "tiles too few": ("S // bm + min(S, EXPERTS)", "S // bm", "", "up"),
    "another row of x": ("other=0) // ACTIVE", "other=0) // 1", "", "up"),
    "another expert's words": ("words += expert.to(tl.int64)", "words += 0 * expert.to(tl.int64)", "", "up"),
    "another expert's scales": ("scales += expert.to(tl.int64)",
                                "scales += 0 * expert.to(tl.int64)", "", "up"),
    "another expert's zeros": ("zeros += expert.to(tl.int64)", "zeros += 0 * expert.to(tl.int64)", "", "up"),
    "up in place of gate": ("acc, other = tl.split", "other, acc = tl.split", "up", "up"),
    "rows side by side in place of blocks": ("(2, 64, BM)), (1, 2, 0)",
                                             "(64, 2, BM)), (0, 2, 1)", "up", "up"),
    "sums of other columns": ("g = column * 1", "g = 0 * column", "", "up"),
    "no weight": ("acc *= tl.load(weights + slot", "acc += 0.0 * tl.load(weights + slot", "", "launch"),
    "results by place, not slot": ("(share * M + slot)", "(share * M + rm)", "", "launch"),
    "a share that is not added": ("in tl.static_range(SPLIT)", "in tl.static_range(1)", "", "launch"),
    "shares that store to one place": ("parts + (share * M + slot)",
                                       "parts + (0 * M + slot)", "race", "launch"),
    "slots without an expert": ("(tl.load(chosen + slot) < EXPERTS,",
                                "(tl.load(chosen + slot) < 99,", "", "launch"),
    "a slot left out": ("tl.static_range(ACTIVE):\n        slot",
                        "tl.static_range(1):\n        slot", "", "launch"),
}  # fmt: skip


def test_seeded_faults_are_found() -> None:
    subject = SPECS[1]
    text = emit(subject)
    assert [name for name, (old, *_) in FAULTS.items() if old not in text] == []
    jobs = [job(subject, text.replace(old, new)) | {"entry": entry} for old, new, _, entry in FAULTS.values()]
    both = zip(FAULTS.items(), check.run("interpret", jobs), strict=True)
    assert {name: words for (name, (_, _, by, _)), words in both if not words or by not in words} == {}


def test_the_definition_is_that_of_the_block() -> None:
    torch.manual_seed(0)
    block = MoE(width=16, hidden=24, experts=6, active=2, dtype="float64").to_empty(device="cpu")
    for value in block.state_dict().values():
        value.normal_()
    x = torch.randn(11, 16, dtype=torch.float64)
    weights, chosen = route(block.router(x), 2, True)
    both = torch.cat((block.experts.gate.weight, block.experts.up.weight), 1)
    y = mixture(x, both, block.experts.down.weight, weights, chosen, "silu")
    assert torch.allclose(y, block(x), atol=1e-6)


def test_gate_and_up_come_apart_as_they_went_together() -> None:
    gate, up = torch.randn(3, 128, 5), torch.randn(3, 128, 5)
    both = together(gate, up)
    assert torch.equal(both[:, 64:128], up[:, :64])
    assert all(torch.equal(a, b) for a, b in zip(apart(both), (gate, up), strict=True))


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, GOLDEN, version)
    hold(found)
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
@pytest.mark.parametrize("version", [importlib.metadata.version("triton"), "3.6.0"])
def test_every_kernel_and_tile_keeps_the_limits(version: str) -> None:
    hold(compiled(OP, COMPILED, version, beside(version), kept=True))


def hold(found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():
        if label.endswith(("up_kernel", "down_kernel")):
            assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
            assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"
            assert not {"HMMA", "LDL", "STL"} & set(one["counts"]), label
            if "bits=4 group=128" in label and " 16 rows " in label:
                assert one["each"] <= LIMIT, label


def test_what_cannot_be_is_refused_in_words() -> None:
    for words, fields in {
        "3 active experts of 2": {"experts": 2, "active": 3},
        "no activation is called swish": {"experts": 2, "active": 1, "activation": "swish"},
        "16 bits have no groups": {"experts": 2, "active": 1, "group": 64},
        "a group is a multiple of 64 that divides": {"experts": 2, "active": 1, "bits": 8, "group": 32},
    }.items():
        with pytest.raises(ValidationError, match=words):
            GroupedLinearSpec.model_validate(fields)
    with pytest.raises(ValueError, match="codes need scales"):
        stack(SPECS[1], torch.zeros(5, 64, 64, dtype=torch.uint8), None, None)
    assert "not multiples of 128" in str(refuses(SPECS[1], 4, 128, 192))
    assert "beyond 31 bits" in str(refuses(SPECS[0], 2**20, 4096, 1024))
    assert refuses(SPECS[0], 64, 4096, 1024) is None
