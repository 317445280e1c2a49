"""sparse_linear in Triton, any zeros: its layout, values, faults, compilation for Hopper."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from effc.kernels.gpu import check
from effc.kernels.quant_linear.spec_gpu import Tile
from effc.kernels.sparse_linear.bitmap_triton import emit
from effc.kernels.sparse_linear.gpu_bitmap import example
from effc.kernels.sparse_linear.layout_bitmap import pack, unpack
from effc.kernels.sparse_linear.spec_bitmap import TILES, BitmapSpec, refuses

from .compiled import compiled, differences, interpreted
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "sparse_linear.gpu_bitmap"
PAIR = (Tile(bm=16, bn=64, warps=4, stages=2), Tile(bm=16, bn=64, warps=4, stages=2, split=2))
NUMBERS = BitmapSpec(tiles=PAIR[:1])
CODES = BitmapSpec(values="int8", group=64, tiles=PAIR[1:], epilogue=("bias", "silu", "mul"))
GOLDEN = (BitmapSpec(tiles=(TILES[0].model_copy(update={"split": 1}),)),)
EVERY = (
    BitmapSpec(),
    BitmapSpec(values="int8"),
    BitmapSpec(values="int8", group=128, scale="bfloat16"),
    BitmapSpec(values="int8", group=64),
)
LIMITS = {"bfloat16": 15.0, "int8": 19.8}
"""Instructions a weight, zeros included, at 16 rows."""


def job(spec: BitmapSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    found = check.run("interpret", [job(spec) for spec in (NUMBERS, CODES)])
    assert found == ["", ""]


FAULTS = {
    "a count that overflows": (NUMBERS, "& 0x0F0F0F0F", "& 0x07070707", ""),
    "a rank that counts itself": (NUMBERS, "((1 << pair) - 1)", "((2 << pair) - 1)", ""),
    "the first of a pair twice": (NUMBERS, "values + here + first", "values + here", ""),
    "a second that is not there": (NUMBERS, "mask=second != 0", "mask=second >= 0", ""),
    "pairs turned": (NUMBERS, "tl.join(a, b)", "tl.join(b, a)", ""),
    "values of the first word": (NUMBERS, "at += count(w)", "at += 0 * count(w)", ""),
    "starts of the first section": (NUMBERS, "starts + k0 // 256 * stride", "starts", ""),
    "words of the next columns": (NUMBERS, "(k // 32 + 1)", "(k // 32 + 2)", ""),
    "columns behind the last": (NUMBERS, "(tl.where(k + 96 < K, rm, M) < M)", "(rm < M)", ""),
    "a store past the last channel": (NUMBERS, "(rn[:, None] < N)", "(rn[:, None] < N + 1)", ""),
    "zeros that are a code": (CODES, "other=128", "other=0", ""),
    "top bits of every second": (CODES, "0x00800080", "0x00800000", ""),
    "scales of the group before": (CODES, "tl.minimum(k + 64, K - 1)", "tl.minimum(k + 0, K - 1)", ""),
    "a lost section": (CODES, "(rounded // 256 + SPLIT - 1)", "(rounded // 512)", ""),
    "shares that store to one place": (CODES, "out += share * M * N", "out += 0", "race"),
}


def test_seeded_faults_are_found() -> None:
    jobs = []
    for spec, old, new, _ in FAULTS.values():
        assert old in emit(spec), old
        jobs.append(job(spec, emit(spec).replace(old, new)))
    both = zip(FAULTS.items(), check.run("interpret", jobs), strict=True)
    assert {name: words for (name, (*_, by)), words in both if not words or by not in words} == {}


@pytest.mark.parametrize("spec", [NUMBERS, CODES], ids=["numbers", "codes"])
def test_unpacking_undoes_packing(spec: BitmapSpec) -> None:
    for n, k in ((1, 64), (130, 320), (128, 512)):
        w, scales, _ = example(spec, n, k, seed=n)
        packed = pack(spec, w, scales)
        assert torch.equal(unpack(spec, packed, n, k), w)
        assert packed.bytes == spec.bytes(n, k, packed.values.numel())
    assert packed.values.numel() == int((w != (0 if spec is NUMBERS else 128)).sum())
    with pytest.raises(ValueError, match="codes alone have scales"):
        pack(spec, w.float(), scales)


def test_half_of_the_weights_take_little_more_than_half_of_the_bytes() -> None:
    n, k = 4096, 14336
    assert BitmapSpec().bytes(n, k, n * k // 2) == n * k * 9 // 8 + n * k // 64
    assert BitmapSpec(values="int8", group=128).bytes(n, k, n * k // 2) == n * k * 5 // 8 + n * k // 32


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, GOLDEN, version)
    hold(found)
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
@pytest.mark.parametrize("version", [importlib.metadata.version("triton"), "3.6.0"])
def test_every_tile_keeps_the_limits(version: str) -> None:
    found = compiled(OP, EVERY, version, beside(version), kept=True)
    hold(found)
    assert sum(label.endswith(" kernel") for label in found) == len(EVERY) * len(TILES)


def hold(found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():
        if label.endswith(" kernel"):
            assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
            assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"
            assert not {"HMMA", "LDL", "STL"} & set(one["counts"]), label
            if " 16x128 " in label:
                assert one["each"] <= LIMITS["int8" if "values=int8" in label else "bfloat16"], label


@pytest.mark.kernels
def test_other_groups_give_the_values() -> None:
    more = [BitmapSpec(values="int8", group=group, tiles=PAIR[:1]) for group in (0, 128, 256)]
    assert interpreted([job(spec) for spec in more]) == ["", "", ""]


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="no epilogue is called swish"):
        BitmapSpec(epilogue=("swish",))
    with pytest.raises(ValidationError, match="16 bits have no groups"):
        BitmapSpec(group=64)
    with pytest.raises(ValidationError, match="groups of 96 columns"):
        BitmapSpec(values="int8", group=96)
    with pytest.raises(ValidationError, match="more than 64 rows spill"):
        BitmapSpec(tiles=(Tile(bm=128, bn=128, warps=8, stages=2),))
    spec = BitmapSpec()
    assert "not a multiple of 32" in str(refuses(spec, 1, 64, 80, 0))
    assert "beyond 31 bits" in str(refuses(spec, 1, 2**20, 2**14, 2**31))
    assert "and 32768 without a bitmap" in str(refuses(spec, 1, 128, 128, 128 * 128))
    assert refuses(spec, 1, 256, 512, 256 * 256) is None
