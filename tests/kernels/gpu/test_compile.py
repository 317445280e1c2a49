"""What kernels take of a Hopper, compiled without one: matrix instructions, registers, instructions a weight.

`make test` compiles a part with the installed Triton and holds it to golden numbers; `make kernels` does so
with 3.6.0 too, which it puts into a folder beside, and holds every kernel and tile to the limits below with
either. `--update-golden` rewrites the golden numbers of what it compiles.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from effc.kernels.gpu import check
from effc.kernels.quant_linear.emit_triton import emit
from effc.kernels.quant_linear.spec_gpu import TILES, WeightOnlySpec

from .compiled import compiled, differences, golden, interpreted, title

pytest.importorskip("triton", reason="Triton has builds for Linux only")

INSTALLED = importlib.metadata.version("triton")
OP = "quant_linear.gpu"
PART = (
    WeightOnlySpec(bits=4, group=128, symmetric=False, epilogue=("bias", "silu", "mul")),
    WeightOnlySpec(bits=4, group=32, tiles=TILES[:1]),
    WeightOnlySpec(bits=8, group=128, tiles=TILES[:1]),
    WeightOnlySpec(bits=2, group=64, symmetric=False, tiles=TILES[:1]),
)
LIMITS = {2: 3.7, 3: 4.1, 4: 3.3, 8: 4.4}
"""Instructions a weight at 16 rows and 128 channels where a run fills a turn, by bits. At 132 multiprocessors
of 4 x 1.98e9 instructions a second, 3.3 with 4 bits is 5 TB of weights a second, more than memory gives."""


def every() -> list[WeightOnlySpec]:
    """All bits, groups and kinds of zero, each with every tile; 256 columns compile as 128 do."""
    found = []
    for bits in (2, 3, 4, 8):
        for group in (32, 64, 128, 0):
            for symmetric in (True, False):
                fields = {"bits": bits, "group": group, "symmetric": symmetric}
                try:
                    spec = WeightOnlySpec.model_validate(fields)
                except ValidationError:  # 8 and 3 bits in groups of 32 need shorter turns
                    columns = 160 if bits == 3 else 64
                    spec = WeightOnlySpec.model_validate(fields | {"columns": columns})
                found.append(spec)
    return found


def hold(specs: Sequence[WeightOnlySpec], found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    products = {label: one for label, one in found.items() if label.endswith(" kernel")}
    assert len(products) == sum(len(spec.tiles) for spec in specs)
    slow = {"HMMA", "LDL", "STL"}
    for label, one in products.items():
        counts = one["counts"]
        assert counts.get("HGMMA"), f"{label}: no wgmma"
        assert not slow & set(counts), f"{label}: {counts}"
        assert counts.get("LDGSTS"), f"{label}: nothing is copied ahead"
    for spec in specs:
        for label, one in products.items():
            if label.startswith(f"{title(spec)} 16x"):
                assert one["together"] >= 2, f"{label}: one program a multiprocessor"
                whole = spec.run == spec.columns == 128 or spec.columns == 320
                if whole and " 16x128 " in label:
                    assert one["each"] <= LIMITS[spec.bits], label


def test_a_part_compiles_to_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    found = compiled(OP, PART, INSTALLED)
    hold(PART, found)
    assert differences(OP, INSTALLED, found, request.config.getoption("--update-golden")) == []


def test_slow_paths_are_found() -> None:
    """Right values by the wrong instructions, which only compilation shows."""
    spec = PART[1]
    text = emit(spec)
    product = "part = tl.dot(wv, a, part)"
    faults = {
        "x as the first operand": "part += tl.trans(tl.dot(tl.trans(a), tl.trans(wv)))",
        "scales in the product": "part = tl.dot(wv * scale.to(tl.bfloat16)[:, None], a, part)",
    }
    assert product in text
    data = spec.model_dump(mode="json")
    jobs = [{"op": OP, "spec": data, "text": text.replace(product, new)} for new in faults.values()]
    swapped, scaled = (answer[0] for answer in check.run("compile", jobs))
    assert "HGMMA" not in swapped["counts"]
    assert "HMMA" in swapped["counts"]
    usual = golden(OP, INSTALLED)[f"{title(spec)} {scaled['label']} kernel"]
    assert scaled["each"] > 1.1 * usual["each"]


@pytest.mark.kernels
def test_a_part_compiles_to_the_golden_numbers_of_3_6(request: pytest.FixtureRequest) -> None:
    found = compiled(OP, PART, "3.6.0", beside("3.6.0"), kept=True)
    hold(PART, found)
    assert differences(OP, "3.6.0", found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("version", [INSTALLED, "3.6.0"])
def test_every_kernel_and_tile_keeps_the_limits(version: str, bits: int) -> None:
    specs = [spec for spec in every() if spec.bits == bits]
    hold(specs, compiled(OP, specs, version, beside(version), kept=True))


def beside(version: str) -> str:
    """The folder of a Triton that is not the installed one."""
    folder = "" if version == INSTALLED else os.environ.get("EFFC_TRITON_3_6", "")
    assert version == INSTALLED or folder, "run it by `make kernels`, which installs Triton 3.6.0 beside"
    return folder


@pytest.mark.kernels
def test_every_kernel_gives_the_values() -> None:
    jobs = [{"op": OP, "spec": spec.model_dump(mode="json"), "text": None} for spec in every()]
    found = interpreted(jobs)
    assert {job["spec"]["bits"]: words for job, words in zip(jobs, found, strict=True) if words} == {}
