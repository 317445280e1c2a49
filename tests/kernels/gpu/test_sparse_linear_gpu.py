"""sparse_linear in Triton, two of four: its layout, values, faults, compilation for Hopper."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from effc.kernels.gpu import check
from effc.kernels.quant_linear.spec_gpu import Tile
from effc.kernels.sparse_linear.emit_triton import emit
from effc.kernels.sparse_linear.gpu import example
from effc.kernels.sparse_linear.layout_gpu import by_members, pack, unpack
from effc.kernels.sparse_linear.spec_gpu import TILES, TwoOfFourSpec, refuses

from .compiled import compiled, differences
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "sparse_linear.gpu"
PAIR = (Tile(bm=16, bn=64, warps=4, stages=3), Tile(bm=16, bn=128, warps=4, stages=3, split=2))
SPECS = (TwoOfFourSpec(tiles=PAIR[:1]), TwoOfFourSpec(tiles=PAIR[1:], epilogue=("bias", "silu", "mul")))
GOLDEN = (TwoOfFourSpec(tiles=(TILES[0].model_copy(update={"split": 1}),)),)
LIMIT = 4.4
"""Instructions a column, zeros included, at 16 rows: at 9 bits a column that is above what memory gives."""


def job(spec: TwoOfFourSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    found = check.run("interpret", [job(spec) for spec in SPECS])
    assert {spec.describe(): words for spec, words in zip(SPECS, found, strict=True) if words} == {}


FAULTS = {
    "a mask of one bit": ("* 0xFFFF", "* 0x7FFF", ""),
    "bits of the lower quad alone": ("0x00010001", "0x00000001", ""),
    "positions of the first turn": ("4 * t + 2", "2", ""),
    "first and second swapped": ("m1 & ((m0 & second) | (~m0 & first))",
                                 "m1 & ((m0 & first) | (~m0 & second))", ""),
    "the third always second": ("m2 & ((m3 & first) | (~m3 & second))", "m2 & second", ""),
    "the fourth first": ("m3 & second", "m3 & first", ""),
    "columns of another member": ("(k + 64 + q)", "(k + 32 + q)", ""),
    "columns behind the last": ("(tl.where(k < K, rm, M) < M)[None, :]", "(rm < M)[None, :]", ""),
    "a lost block": ("(rounded // 512 + SPLIT - 1)", "(rounded // 1024)", ""),
    "rows that are not filled up": ("(rounded // 4)", "(K // 4)", ""),
    "first values twice": ("values + at + 16", "values + at", ""),
    "shares that store to one place": ("out += share * M * N", "out += 0", "race"),
    "x out of order": ("x if ordered else order(x)", "x", ""),
}  # fmt: skip


def test_seeded_faults_are_found() -> None:
    text = emit(SPECS[1])
    assert [name for name, (old, _, _) in FAULTS.items() if old not in text] == []
    found = check.run("interpret", [job(SPECS[1], text.replace(old, new)) for old, new, _ in FAULTS.values()])
    missed = {
        name: words
        for (name, (_, _, by)), words in zip(FAULTS.items(), found, strict=True)
        if not words or by not in words
    }
    assert missed == {}


def test_unpacking_undoes_packing() -> None:
    for n, k in ((1, 128), (130, 640), (128, 512)):
        w = example(n, k, seed=n)
        half = pack(w)
        assert torch.equal(unpack(half, n, k), w)
        assert sum(t.numel() * 4 for t in half) == TwoOfFourSpec().bytes(n, k)
    x = torch.arange(256).view(1, -1)
    assert by_members(x)[0, :3].tolist() == [0, 4, 8]
    assert by_members(x)[0, 32] == 1
    assert by_members(x)[0, 128] == 128


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, GOLDEN, version)
    hold(found)
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
@pytest.mark.parametrize("version", [importlib.metadata.version("triton"), "3.6.0"])
def test_every_tile_keeps_the_limits(version: str) -> None:
    hold(compiled(OP, (TwoOfFourSpec(),), version, beside(version), kept=True))


def hold(found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():
        if label.endswith(" kernel"):
            assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
            assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"
            assert not {"HMMA", "LDL", "STL"} & set(one["counts"]), label
            if " 16x128 " in label:
                assert one["each"] <= LIMIT, label


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="no epilogue is called swish"):
        TwoOfFourSpec(epilogue=("swish",))
    with pytest.raises(ValueError, match="columns 4 to 7 of row 0 have more than two numbers"):
        pack(torch.tensor([[0.0] * 5 + [1.0] * 3 + [0.0] * 120]).bfloat16())
    assert "not a multiple of 128" in str(refuses(TwoOfFourSpec(), 1, 64, 192))
    assert "beyond 31 bits" in str(refuses(TwoOfFourSpec(), 1, 2**20, 2**14))
    assert refuses(TwoOfFourSpec(), 1, 64, 640) is None
