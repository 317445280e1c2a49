"""shared_prefix in Triton: plans of trees, values, faults that must not go unseen, compilation."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from effc.kernels.gpu import check
from effc.kernels.shared_prefix.emit_triton import emit
from effc.kernels.shared_prefix.plan import plan
from effc.kernels.shared_prefix.reference import reference
from effc.kernels.shared_prefix.spec import FEW, MANY, SharedPrefixSpec, refuses

from .compiled import compiled, differences
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "shared_prefix.gpu"
PAIRS = SharedPrefixSpec(heads=4, kv_heads=2, head_dim=64, scale=0.125, least=128)
ODD = SharedPrefixSpec(heads=2, kv_heads=1, head_dim=48, scale=0.3, cap=2.0, least=128)
THREES = SharedPrefixSpec(heads=3, kv_heads=1, head_dim=64, scale=0.2, least=64)
COMPILED = (SharedPrefixSpec(heads=32, kv_heads=8, head_dim=128, scale=0.088),)
ALSO = (
    SharedPrefixSpec(heads=32, kv_heads=4, head_dim=64, scale=0.125, keys=128),
    SharedPrefixSpec(heads=16, kv_heads=8, head_dim=256, scale=0.0625, cap=50.0),
    SharedPrefixSpec(heads=32, kv_heads=8, head_dim=96, scale=0.1),
)
NARROW = (SharedPrefixSpec(heads=8, kv_heads=4, head_dim=32, scale=0.2),)
"""Its heads do not fill the 64 rows of a wgmma."""


def job(spec: SharedPrefixSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    """A tree with empty segments, a long path, many rows behind one prefix; keys between segments are NaN."""
    found = check.run("interpret", [job(spec) for spec in (PAIRS, THREES)])
    assert found == ["", ""]


def test_heads_of_any_width_and_capped_scores() -> None:
    text = emit(ODD)
    cut = " & (d < 48)[:, None]"
    assert cut in text
    texts = (text, text.replace(cut, ""), text.replace("tl.sigmoid(", "("), text.replace(", mask=d < 48", ""))
    found = check.run("interpret", [job(ODD, each) for each in texts])
    assert found[0] == ""
    assert all(found[1:])


FAULTS = {
    "keys of the next segment": ("inside = (rn < stop)[:, None]", "inside = (rn >= 0)[:, None]", ""),
    "keys of the next share": ("stop = tl.minimum(low + each, stop)", "stop = low + each", ""),
    "a share that is not read": ("low += share * each", "low += 0 * each", ""),
    "a rest that is left out": ("// shares + 63) // 64 * 64", "// shares) // 64 * 64", ""),
    "rows of another sequence": ("row + edge + i // 2", "row + edge + i % 2", ""),
    "heads of another group": ("head = kv * 2 + i % 2", "head = kv * 2 + 1 - i % 2 * 0", ""),
    "results of another edge": ("part + edge + i // 2", "part + edge + 0 * i", "race"),
    "more rows than there are": ("live = i // 2 < edges", "live = i // 2 <= edges", ""),
    "scores that are not masked": ("s = tl.where(inside, s, -float(\"inf\"))", "s = s", ""),
    "sums that keep their old base": ("total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)", ""),
    "outputs that keep their old base": ("acc * shrink[:, None])", "acc)", ""),
    "a natural logarithm": ("sums + mine, top + tl.log2(total)", "sums + mine, top + tl.log(total)", ""),
    "partial results as they are": ("os * w[:, None]", "os", ""),
    "partial results in one base": ("acc * shrink + tl.sum(os", "acc + tl.sum(os", ""),
    "a result left out": ("tl.load(first + b + 1)", "tl.load(first + b + 1) - 1", ""),
    "nothing where nothing is seen": ("acc / tl.where(total > 0.0, total, 1.0)", "acc / total", "NaN"),
}  # fmt: skip


def test_seeded_faults_are_found() -> None:
    text = emit(PAIRS)
    assert [name for name, (old, _, _) in FAULTS.items() if old not in text] == []
    found = check.run("interpret", [job(PAIRS, text.replace(old, new)) for old, new, _ in FAULTS.values()])
    missed = {
        name: words
        for (name, (_, _, by)), words in zip(FAULTS.items(), found, strict=True)
        if not words or by not in words
    }
    assert missed == {}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 900), min_size=3, max_size=5),
    paths=st.lists(st.lists(st.integers(0, 2), unique=True), min_size=1, max_size=90),
)
def test_a_plan_has_each_share_of_each_edge_once(lengths: list[int], paths: list[list[int]]) -> None:
    made = plan(PAIRS, lengths, paths)
    written = []
    for tasks, rows in ((made.few, FEW), (made.many, MANY)):
        for segment, edge, edges, share, shares in tasks.tolist():
            assert 0 < edges * PAIRS.group <= rows
            assert 0 <= share < shares
            assert shares == 1 or lengths[segment] > PAIRS.least * (shares - 1)
            for e in range(edge, edge + edges):
                assert segment in paths[int(made.row[e])]
                part, b = int(made.part[e]) + share, int(made.row[e])
                assert made.first[b] <= part < made.first[b + 1]
                written.append(part)
    assert sorted(written) == list(range(int(made.first[-1])))


def test_the_definition_is_attention_over_what_a_path_joins() -> None:
    dice = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 8, generator=dice).double() for n, h in ((2, 4), (9, 2), (9, 2)))
    begin, end = torch.tensor([0, 4, 6]), torch.tensor([3, 6, 9])
    out = reference(q, k, v, begin, end, [(0, 2), ()], 0.3)
    at = torch.tensor([0, 1, 2, 6, 7, 8])
    heads = [t.transpose(0, 1)[None] for t in (q[:1], k[at], v[at])]
    due = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], scale=0.3, enable_gqa=True)
    assert torch.allclose(out[0], due[0, :, 0], atol=1e-12)
    assert not out[1].any()


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, COMPILED, version)
    hold(found)
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
@pytest.mark.parametrize("version", [importlib.metadata.version("triton"), "3.6.0"])
def test_every_kernel_keeps_the_limits(version: str) -> None:
    hold(compiled(OP, (*COMPILED, *ALSO), version, beside(version), kept=True))
    narrow = compiled(OP, NARROW, version, beside(version), kept=True)
    assert [label for label, one in narrow.items() if one["wrong"]] == []


def hold(found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():
        if "join" not in label:
            assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
            assert "HMMA" not in one["counts"], label
            assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"
            if "head_dim=256" not in label:  # 64 keys and values of 256 take half the shared memory, twice
                assert one["together"] * one["warps"] >= 8, f"{label}: too few warps to hide loads"


def test_what_cannot_be_is_refused_in_words() -> None:
    fields = {"heads": 4, "kv_heads": 2, "head_dim": 64, "scale": 1.0}
    with pytest.raises(ValidationError, match="do not divide over 3"):
        SharedPrefixSpec.model_validate(fields | {"kv_heads": 3})
    with pytest.raises(ValidationError, match="32 query heads share a key head, a program takes 16"):
        SharedPrefixSpec.model_validate(fields | {"heads": 32, "kv_heads": 1})
    spec = SharedPrefixSpec.model_validate(fields)
    assert "a window of 8 tokens" in str(refuses(spec, 2, 100, window=8))
    with pytest.raises(ValidationError, match="multiple of 16"):
        SharedPrefixSpec.model_validate(fields | {"head_dim": 72})
    assert "beyond 31 bits" in str(refuses(spec, 2, 2**25))
    assert refuses(spec, 64, 2**20) is None
    with pytest.raises(ValueError, match="of sequence 1 names a segment twice or none of 2"):
        plan(spec, [4, 4], [[0], [1, 2]])
    assert spec.bytes(10, 2, 3) == 4 * 2 * 64 * 10 + 4 * 4 * 64 * 2 + 8 * 3 * 4 * 65
