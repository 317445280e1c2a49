"""multi_lora in Triton, and adapters as further columns of a low-bit layer: values, faults, compilation."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
from pydantic import ValidationError

from effc.kernels.gpu import check
from effc.kernels.kernel import KernelSpec
from effc.kernels.multi_lora.emit_triton import emit
from effc.kernels.multi_lora.spec import MultiLoraGpuSpec, refuses
from effc.kernels.quant_linear import emit_triton as quant
from effc.kernels.quant_linear.spec_gpu import Tile, WeightOnlySpec

from .compiled import compiled, differences
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP, QUANT = "multi_lora.gpu", "quant_linear.gpu"
SPECS = (
    MultiLoraGpuSpec(rank=64, columns=64, channels=64, split=2),
    MultiLoraGpuSpec(rank=32, block=32, rows=32, columns=128, split=1),
)
PAIR = (Tile(bm=16, bn=64, warps=4, stages=4), Tile(bm=16, bn=128, warps=4, stages=4, split=2))
EXTENDED = WeightOnlySpec(bits=4, group=128, symmetric=False, tiles=PAIR, extension=16, epilogue=("bias",))
ONE = WeightOnlySpec(bits=4, group=128, tiles=PAIR[1:], extension=16, within=True)
COMPILED: dict[str, tuple[KernelSpec, ...]] = {OP: (MultiLoraGpuSpec(),), QUANT: (EXTENDED,)}


def job(op: str, spec: KernelSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": op, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    jobs = [*(job(OP, spec) for spec in SPECS), job(QUANT, EXTENDED)]
    found = check.run("interpret", jobs)
    assert {str(one["spec"]): words for one, words in zip(jobs, found, strict=True) if words} == {}


FAULTS = {
    "another adapter's rows of A": ("(begin + r)[:, None] * K", "r[:, None] * K", ""),
    "another adapter's rows of B": ("(begin + r)[None, :] * N", "r[None, :] * N", ""),
    "another adapter's scale": ("scales + adapter)", "scales)", ""),
    "ranks of the next adapter": ("[None, :], mask=(r < rank)[:, None], other=0.0)",
                                  "[None, :], mask=(r < 64)[:, None], other=0.0)", "out of bounds"),
    "sums that nobody wrote": ("some = (r < rank)[:, None] & live[None, :]",
                               "some = (r < 64)[:, None] & live[None, :]", ""),
    "rows out of order": ("rm = tl.load(order + at + i, mask=live, other=0)", "rm = at + i", ""),
    "rows of the next tile": ("live = i < count", "live = i < count + 1", ""),
    "a share that is not added": ("static_range(SPLIT)", "static_range(SPLIT - 1)", ""),
    "shares that store to one place": ("h + (share * M + rm[None, :])", "h + (0 * M + rm[None, :])", "race"),
    "a lost tail of K": ("(K // BK + SPLIT - 1) // SPLIT", "K // BK // SPLIT", ""),
    "the lower half of the way between left out": ("            acc = tl.dot(w, low, acc)\n", "", ""),
    "a rest of ranks left out": ("range(0, rank, BR)", "range(0, rank // BR * BR, BR)", ""),
    "no base": ("acc += tl.load(base", "acc += 0.0 * tl.load(base", ""),
    "a channel too far": ("live[None, :] & (rn < N)[:, None]", "live[None, :] & (rn <= N)[:, None]", ""),
    "tiles too few": ("index.shape[0] // ROWS", "0", ""),
    "tiles at their adapter's first row": ("begin[adapter] + inside", "begin[adapter] + 0 * inside", ""),
}  # fmt: skip
QUANT_FAULTS = {
    "an extension in every share": ("if share == 0:", "if share >= 0:", ""),
    "an extension of other rows": ("inner + rm[None, :] * 16", "inner + rm[None, :] * 0", ""),
    "an extension of other channels": ("outer + rn[:, None] * 16", "outer + (rn[:, None] ^ 1) * 16", ""),
}


def test_seeded_faults_are_found() -> None:
    jobs, due = [], {}
    for op, spec, text, faults in (
        (OP, SPECS[0], emit(SPECS[0]), FAULTS),
        (QUANT, EXTENDED, quant.emit(EXTENDED), QUANT_FAULTS),
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
    version, update = importlib.metadata.version("triton"), request.config.getoption("--update-golden")
    for op, specs in COMPILED.items():
        found = compiled(op, specs, version)
        hold(found)
        assert differences(op, version, found, update) == []


@pytest.mark.kernels
def test_compilation_keeps_the_limits_with_3_6() -> None:
    for op, specs in (COMPILED | {QUANT: (EXTENDED, ONE)}).items():
        hold(compiled(op, specs, "3.6.0", beside("3.6.0"), kept=True))


def hold(found: dict[str, Any]) -> None:
    """What every compiled kernel must be; the few ranks of the first product are no matrix for wgmma."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():
        if not label.endswith("finish"):
            assert one["counts"].get("LDGSTS") or "expand" in label, f"{label}: nothing is copied ahead"
            assert one["counts"].get("HGMMA") or "shrink" in label, f"{label}: no wgmma"


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="steps of 64 ranks of 16"):
        MultiLoraGpuSpec(rank=16, block=64)
    spec = MultiLoraGpuSpec()
    assert "has rank 65" in str(refuses(spec, 1, 64, 128, 65, 65))
    assert "not a multiple of 128" in str(refuses(spec, 1, 64, 192, 8, 8))
    assert "beyond 31 bits" in str(refuses(spec, 2**20, 64, 4096, 8, 8))
    assert refuses(spec, 16, 64, 128, 100, 64) is None
