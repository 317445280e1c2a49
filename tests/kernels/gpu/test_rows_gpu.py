"""norm and gated in Triton, forward and backward: values, faults that must not go unseen, compilation."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from effc.kernels.gated import emit_triton as gated
from effc.kernels.gated.emit_triton import GatedSpec
from effc.kernels.gpu import check
from effc.kernels.kernel import KernelSpec
from effc.kernels.norm import emit_triton as norm
from effc.kernels.norm.emit_triton import NormGpuSpec

from .compiled import compiled, differences

pytest.importorskip("triton", reason="Triton has builds for Linux only")

NORMS = (
    NormGpuSpec(eps=1e-5, run=64, programs=2),
    NormGpuSpec(form="layer", eps=1e-6, bias=True, offset=1.0, programs=4),
)
BYTES = (
    NormGpuSpec(eps=1e-5, run=64, to="int8"),
    NormGpuSpec(form="layer", eps=1e-6, bias=True, to="float8"),
)
GATED = (GatedSpec(run=128), GatedSpec(activation="gelu_tanh"))


def job(op: str, spec: KernelSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": op, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    jobs = [*(job("norm.gpu", spec) for spec in NORMS + BYTES), *(job("gated.gpu", spec) for spec in GATED)]
    found = check.run("interpret", jobs)
    assert {str(one["spec"]): words for one, words in zip(jobs, found, strict=True) if words} == {}


NORM_FAULTS = {
    "eps left out": (" + 1e-06)", ")", "forward"),
    "a mean over the block": ("a - tl.sum(a) / D, 0.0", "a - tl.sum(a) / BLOCK, 0.0", "forward [5"),
    "dead lanes that count": ("c = tl.where(i < D, a - tl.sum(a) / D, 0.0)",
                              "c = a - tl.sum(a) / D", "forward [5"),
    "a gain without its offset": ("n = c * factor * (1.0 +", "n = c * factor * (0.0 +", "forward"),
    "a store past the row": ("tl.store(y + row.to(tl.int64) * D + i, r, mask=i < D)",
                             "tl.store(y + row.to(tl.int64) * D + i, r, mask=i <= D)", "race"),
    "a slope without its second term": (" - tl.sum(w) / D - n", " - n", "backward"),
    "rows taken twice": ("range(tl.program_id(0).to(tl.int64), M, 4)", "range(0, M, 4)", "race"),
    "gains not added up": ("gain_sum += d * n", "gain_sum = d * n", "dgain"),
    "one part left out": ("for p in range(P):", "for p in range(P - 1):", "d"),
}  # fmt: skip
BYTES_FAULTS = {
    "a row's scale upside down": ("rows + row, most *", "rows + row, stretch *", "rows"),
    "one too many": ("12582912.0) - 12582912.0", "12582912.0) - 12582911.0", ""),
    "sums before rounding": ("b.to(tl.int32), (BLOCK", "(n * stretch).to(tl.int32), (BLOCK", "totals"),
    "a row of the largest alone": ("tl.max(tl.abs(n))", "tl.max(n)", "forward"),
}
GATED_FAULTS = {
    "halves swapped": ("a * s * b", "b * s * a * s", "forward"),
    "sums of rows": ("sums + g * M + row", "sums + row * M + g", ""),
    "a slope of the activation itself": ("(d * b * slope)", "(d * b * s)", "backward"),
    "a block too far": ("live = i < F", "live = i < F + 1", ""),
}


def test_seeded_faults_are_found() -> None:
    jobs, due = [], {}
    for op, spec, text, faults in (
        ("norm.gpu", NORMS[1], norm.emit(NORMS[1]), NORM_FAULTS),
        ("norm.gpu", BYTES[0], norm.emit(BYTES[0]), BYTES_FAULTS),
        ("gated.gpu", GATED[0], gated.emit(GATED[0]), GATED_FAULTS),
    ):
        for name, (old, new, by) in faults.items():
            assert old in text, name
            jobs.append(job(op, spec, text.replace(old, new)))
            due[name] = by
    found = check.run("interpret", jobs)
    missed = {
        name: words
        for (name, by), words in zip(due.items(), found, strict=True)
        if not words or by not in words
    }
    assert missed == {}


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    update = request.config.getoption("--update-golden")
    for op, specs in (("norm.gpu", NORMS), ("gated.gpu", GATED[:1])):
        found = compiled(op, specs, version)
        assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
        assert all(one["together"] * one["warps"] >= 16 for one in found.values()), (
            "too few warps to hide loads"
        )
        assert differences(op, version, found, update) == []
