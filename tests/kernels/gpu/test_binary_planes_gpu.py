"""binary_planes in Triton: its layout, its values in the interpreter, faults, compilation."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from effc.compiler.planes import scale_values, unpack_signs
from effc.kernels.binary_planes.emit_triton import emit
from effc.kernels.binary_planes.gpu import parse
from effc.kernels.binary_planes.layout_gpu import pack, unpack
from effc.kernels.binary_planes.reference import example
from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.binary_planes.spec_gpu import BinaryPlanesGpuSpec, refuses
from effc.kernels.gpu import check
from effc.kernels.quant_linear.spec_gpu import Tile

from .compiled import compiled, differences, interpreted
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "binary_planes.gpu"
ONE = (Tile(bm=16, bn=64, warps=4, stages=3, split=2),)
SPECS = (
    BinaryPlanesGpuSpec(planes=2, share=128, epilogue=("bias", "silu"), tiles=ONE),
    BinaryPlanesGpuSpec(planes=3, scale="bfloat16", tiles=ONE),
    BinaryPlanesGpuSpec(planes=2, side="columns", share=128, scale="bfloat16", tiles=ONE),
    BinaryPlanesGpuSpec(planes=1, side="columns", tiles=ONE),
)
MORE = (
    BinaryPlanesGpuSpec(planes=4, share=32, tiles=ONE),
    BinaryPlanesGpuSpec(planes=1, share=512, scale="float32", epilogue=("residual",), tiles=ONE),
)
COMPILED = (BinaryPlanesGpuSpec(planes=3, share=128),)
ALSO = tuple(
    BinaryPlanesGpuSpec(planes=planes, side=side, share=share)
    for planes, side, share in ((4, "rows", 128), (3, "columns", 0))
)


def job(spec: BinaryPlanesGpuSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    found = check.run("interpret", [job(spec) for spec in SPECS])
    assert {spec.describe(): words for spec, words in zip(SPECS, found, strict=True) if words} == {}


@pytest.mark.kernels
def test_values_of_other_shares() -> None:
    assert interpreted([job(spec) for spec in MORE]) == ["", ""]


ROW_FAULTS = {
    "a wrong place": ("w << (15 - j)", "w << (14 - j)", ""),
    "signs the other way": ("^ -1082081408", "^ 1065369472", ""),
    "halves in the wrong order": ("tl.join(low, high)", "tl.join(high, low)", ""),
    "the other plane": ("w1 = tl.load(words + (1 * stride", "w1 = tl.load(words + (0 * stride", ""),
    "scales of the other plane": ("scales + (1 * (K // 128)", "scales + (0 * (K // 128)", ""),
    "scales of the next group": ("((k0 + 128 * i) // 128)", "((k0 + 128 * i) // 128 ^ 1)", ""),
    "columns of another place": (
        "k = k0 + 128 * i + 16 * j + rk",
        "k = k0 + 128 * i + 16 * (j ^ 1) + rk",
        "",
    ),
    "a bound one too far": ("live = rm[None, :] < M", "live = rm[None, :] <= M", "out of bounds"),
    "a lost tail of K": ("(K // 256 + SPLIT - 1) // SPLIT", "K // 256 // SPLIT", ""),
    "shares that store to one place": ("out += share * M * N", "out += 0", "race"),
    "a share that is not added": ("static_range(SPLIT)", "static_range(SPLIT - 1)", ""),
    "an epilogue that is not taken": ("acc = acc * tl.sigmoid(acc)", "acc = acc", ""),
}
COLUMN_FAULTS = {
    "x of the first plane": ("* 2 + 1) * M", "* 2 + 0) * M", ""),
    "x of the first rows": ("tl.program_id(0) * BN // 128", "0 * BN // 128", ""),
    "scales of other columns": (
        "scales.float().transpose(0, 1)",
        "scales.float().flip(2).transpose(0, 1)",
        "",
    ),
}


def test_seeded_faults_are_found() -> None:
    jobs, due = [], {}
    for spec, faults in ((SPECS[0], ROW_FAULTS), (SPECS[2], COLUMN_FAULTS)):
        text = emit(spec)
        for name, (old, new, by) in faults.items():
            assert old in text, name
            jobs.append(job(spec, text.replace(old, new)))
            due[name] = by
    found = check.run("interpret", jobs)
    both = zip(due.items(), found, strict=True)
    assert {name: words for (name, by), words in both if not words or by not in words} == {}


@settings(max_examples=20, deadline=None)
@given(planes=st.integers(1, 4), turns=st.integers(1, 2), n=st.integers(1, 130), seed=st.integers(0, 99))
def test_unpacking_undoes_packing(planes: int, turns: int, n: int, seed: int) -> None:
    side, k = ("rows", "columns")[seed % 2], 256 * turns
    spec = parse({"planes": planes, "side": side, "scale": "float32"})
    stored = BinaryPlanesSpec.model_validate({"planes": planes, "side": side, "terms": 2})
    _, signs, scales = example(stored, 1, n, k, seed)
    packed = pack(spec, signs, scales, k)
    back, values = unpack(spec, packed, n)
    assert torch.equal(back, unpack_signs(signs, k))
    assert torch.equal(values, scale_values(scales))
    assert sum(t.numel() * t.element_size() for t in packed) == spec.bytes(n, k)


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, COMPILED, version)
    hold(found)
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
@pytest.mark.parametrize("version", [importlib.metadata.version("triton"), "3.6.0"])
def test_every_kernel_keeps_the_limits(version: str) -> None:
    hold(compiled(OP, (*COMPILED, *ALSO), version, beside(version), kept=True))


def hold(found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():
        if label.endswith(" kernel"):
            assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
            assert "HMMA" not in one["counts"], label
            assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"
            planes = int(label.partition("planes=")[2][0])
            if " 16x" in label:
                assert one["each"] <= 3.2 * planes, f"{label}: {one['each']} instructions a weight"


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="no epilogue is called swish"):
        BinaryPlanesGpuSpec(planes=2, epilogue=("swish",))
    with pytest.raises(ValidationError, match="48 columns share a scale"):
        BinaryPlanesGpuSpec(planes=2, share=48)
    with pytest.raises(ValidationError, match="64 rows share a scale; a multiple of 128"):
        BinaryPlanesGpuSpec(planes=2, side="columns", share=64)
    wide = (Tile(bm=64, bn=128, warps=4, stages=2),)
    with pytest.raises(ValidationError, match="sums of 3 planes spill registers"):
        BinaryPlanesGpuSpec(planes=3, tiles=wide)
    spec = BinaryPlanesGpuSpec(planes=2, share=128)
    assert "K = 300 is not a multiple of 256" in str(refuses(spec, 1, 64, 300))
    long = BinaryPlanesGpuSpec(planes=2, share=512)
    assert "512 columns that share a scale do not divide 768" in str(refuses(long, 1, 64, 768))
    assert "beyond 31 bits" in str(refuses(spec, 2**20, 2**12, 256))
    assert refuses(spec, 16, 100, 512) is None
    _, signs, scales = example(BinaryPlanesSpec(planes=1, terms=3, side="rows"), 1, 64, 256, 0)
    with pytest.raises(ValueError, match="scales that bfloat16 does not hold"):
        pack(parse({"planes": 1, "scale": "bfloat16"}), signs, scales, 256)
