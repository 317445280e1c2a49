"""attention in Triton, forward and backward: values, faults that must not go unseen, compilation."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from effc.kernels.attention.emit_triton import emit
from effc.kernels.attention.reference import reference
from effc.kernels.attention.spec import AttentionGpuSpec, Tile, refuses
from effc.kernels.gpu import check

from .compiled import compiled, differences
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "attention.gpu"
SMALL = dict.fromkeys(("forward", "of_keys", "of_queries"), Tile(queries=64, keys=32, warps=4, stages=2))
SPECS = (
    AttentionGpuSpec(heads=4, kv_heads=2, head_dim=64, scale=0.125, **SMALL),
    AttentionGpuSpec(heads=2, kv_heads=1, head_dim=64, scale=0.2, window=100, **SMALL),
    AttentionGpuSpec(heads=2, kv_heads=2, head_dim=64, scale=0.125, causal=False, **SMALL),
)
ODD = AttentionGpuSpec(heads=2, kv_heads=1, head_dim=48, scale=0.3, cap=2.0, window=70, **SMALL)
WIDTHS = (
    AttentionGpuSpec(heads=16, kv_heads=8, head_dim=256, scale=0.0625, window=4096, cap=50.0),
    AttentionGpuSpec(heads=32, kv_heads=32, head_dim=96, scale=0.1),
    AttentionGpuSpec(heads=8, kv_heads=4, head_dim=32, scale=0.2, cap=30.0),
    AttentionGpuSpec(heads=8, kv_heads=4, head_dim=128, scale=0.2, cap=30.0),
)
COMPILED = (
    AttentionGpuSpec(heads=32, kv_heads=8, head_dim=128, scale=0.08838834764831845),
    AttentionGpuSpec(heads=32, kv_heads=8, head_dim=64, scale=0.125, window=4096),
)


def job(spec: AttentionGpuSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    found = check.run("interpret", [job(spec) for spec in SPECS])
    assert {spec.describe(): words for spec, words in zip(SPECS, found, strict=True) if words} == {}


FAULTS = {
    "a query that sees the next key": ("(rn <= rm)", "(rn <= rm + 1)", ""),
    "a window one too wide": ("(rn > rm - 100)", "(rn > rm - 101)", ""),
    "keys of the next sequence": ("inside = rn < end", "inside = rn >= 0", "out of bounds"),
    "a mask that is not asked for": ("(first + 1 - begin) // 32 * 32", "(first + 64 - begin) // 32 * 32", ""),
    "a far edge without its mask": ("(tl.maximum(first + -36 - begin, 0) + 31) // 32", "0 // 32", ""),
    "a step that is left out": ("range(some, most, 32)", "range(some + 32, most, 32)", ""),
    "heads of another group": ("kv = head // 2", "kv = head % 2", ""),
    "another head's queries": ("(rm[:, None] * 2 + head) * 64 + d[None, :]",
                               "(rm[:, None] * 2 + kv) * 64 + d[None, :]", ""),
    "sums that keep their old base": ("total * shrink + tl.sum(p, 1)", "total + tl.sum(p, 1)", ""),
    "results that keep their old base": ("acc * shrink[:, None]", "acc", ""),
    "a store past the sequence": ("(out.dtype.element_ty), mask=live[:, None])",
                                  "(out.dtype.element_ty), mask=rm[:, None] >= 0)", ""),
    "a natural logarithm": ("top + tl.log2(total)", "top + tl.log(total)", "lse"),
    "slopes without delta": ("(tl.dot(vs, tl.trans(gs)) - less[None, :])", "tl.dot(vs, tl.trans(gs))", "dk"),
    "slopes of keys without scale": ("(dks * 0.2)", "dks", "dk"),
    "slopes of queries without scale": ("(dqs * 0.2)", "dqs", "dq"),
    "queries out of sight": ("first + 131)", "first + 101)", "backward"),
    "the second head of a group left out": ("(kv + 1) * 2", "kv * 2 + 1", "backward"),
    "weights of another base": ("- sums[None, :]", "- sums[None, :] * 1.02", "backward"),
}  # fmt: skip


SLOPES = ("backward", "dk", "dq")
"""What is said of faults that show in slopes alone."""


def test_seeded_faults_are_found() -> None:
    text = emit(SPECS[1])
    assert [name for name, (old, _, _) in FAULTS.items() if old not in text] == []
    jobs = [
        job(SPECS[1], text.replace(old, new)) | {"entry": "backward" if by in SLOPES else "forward"}
        for old, new, by in FAULTS.values()
    ]
    found = check.run("interpret", jobs)
    missed = {
        name: words
        for (name, (_, _, by)), words in zip(FAULTS.items(), found, strict=True)
        if not words or by not in words
    }
    assert missed == {}


ODD_FAULTS = {
    "numbers of the next head": (" & (d < 48)[None, :]", "", ""),
    "keys of the next head": (" & (d < 48)[:, None]", "", ""),
    "scores without their cap": ("- 0.5)", "- 0.4)", ""),
    "slopes without that of the cap": ("(1.0 - s * s *", "(1.0 - 0.0 *", "backward"),
}


def test_heads_of_any_width_and_capped_scores() -> None:
    text = emit(ODD)
    assert [name for name, (old, _, _) in ODD_FAULTS.items() if old not in text] == []
    jobs = [job(ODD), *(job(ODD, text.replace(old, new)) for old, new, _ in ODD_FAULTS.values())]
    right, *found = check.run("interpret", jobs)
    assert right == ""
    both = zip(ODD_FAULTS.items(), found, strict=True)
    assert {name: words for (name, (_, _, by)), words in both if not words or by not in words} == {}


def test_the_definition_is_what_torch_computes_on_one_sequence() -> None:
    t = 30
    q, k, v = (torch.randn(t, h, 64, dtype=torch.float64) for h in (4, 2, 2))
    for spec in (SPECS[0], SPECS[0].model_copy(update={"window": 7})):
        out, _ = reference(spec, q, k, v, torch.tensor([0, t]))
        sight = torch.ones(t, t, dtype=torch.bool).tril().triu(1 - (spec.window or t))
        heads = [x.transpose(0, 1) for x in (q, k, v)]
        due = F.scaled_dot_product_attention(*heads, attn_mask=sight, enable_gqa=True)
        assert torch.allclose(out, due.transpose(0, 1), atol=1e-12)


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, COMPILED, version)
    hold(found)
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
def test_compilation_keeps_the_limits_with_3_6() -> None:
    hold(compiled(OP, COMPILED, "3.6.0", beside("3.6.0"), kept=True))


@pytest.mark.kernels
@pytest.mark.parametrize("version", [importlib.metadata.version("triton"), "3.6.0"])
def test_every_width_keeps_the_limits(version: str) -> None:
    found = compiled(OP, WIDTHS, version, beside(version), kept=True)
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():  # dk and dv of heads of 256 leave no room for the 64 keys of a wgmma
        if "delta" not in label and not ("head_dim=256" in label and "keys_kernel" in label):
            assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
            assert "HMMA" not in one["counts"], label


def hold(found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():
        if "delta" not in label:
            assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
            assert "HMMA" not in one["counts"], label
            assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"


def test_what_cannot_be_is_refused_in_words() -> None:
    given = {"heads": 4, "kv_heads": 2, "head_dim": 64, "scale": 1.0}
    with pytest.raises(ValidationError, match="do not divide over 3"):
        AttentionGpuSpec.model_validate(given | {"kv_heads": 3})
    with pytest.raises(ValidationError, match="so its attention is causal"):
        AttentionGpuSpec.model_validate(given | {"window": 8, "causal": False})
    tile = {"queries": 64, "keys": 64, "warps": 8, "stages": 2}
    with pytest.raises(ValidationError, match="8 warps take 128 queries"):
        AttentionGpuSpec.model_validate(given | {"forward": tile})
    spec = AttentionGpuSpec.model_validate(given)
    with pytest.raises(ValidationError, match="less than or equal to 256"):
        AttentionGpuSpec.model_validate(given | {"head_dim": 320})
    assert "beyond 31 bits" in str(refuses(spec, 2**24))
    assert refuses(spec, 4096) is None
    assert spec.operations([3]) == 4 * 6 * 4 * 64
    assert spec.model_copy(update={"window": 2}).operations([3]) == 4 * 5 * 4 * 64
