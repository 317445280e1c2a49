"""byte_linear in Triton: int8 and float8 rows, 4 and 8 bits; values, faults, compilation for Hopper."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from effc.kernels.byte_linear.emit_triton import emit
from effc.kernels.byte_linear.layout import DTYPES, pack, quantize_rows, unpack
from effc.kernels.byte_linear.spec import TILES, ByteLinearSpec, refuses
from effc.kernels.gpu import check
from effc.kernels.quant_linear.spec_gpu import Tile

from .compiled import compiled, differences, title
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "byte_linear.gpu"
PAIR = (Tile(bm=16, bn=64, warps=4, stages=4), Tile(bm=16, bn=128, warps=4, stages=4, split=2))
SPECS = (
    ByteLinearSpec(tiles=PAIR),
    ByteLinearSpec(bits=4, group=64, symmetric=False, tiles=PAIR, epilogue=("bias",)),
    ByteLinearSpec(bits=4, tiles=PAIR, epilogue=("residual",)),
    ByteLinearSpec(bits=4, group=256, tiles=PAIR[:1], scale="float16"),
    ByteLinearSpec(bits=4, symmetric=False, tiles=PAIR[1:]),
    ByteLinearSpec(group=128, tiles=PAIR[:1], scale="bfloat16"),
    ByteLinearSpec(kind="float8", tiles=PAIR, epilogue=("bias", "silu")),
    ByteLinearSpec(kind="float8", group=64, columns=64, tiles=PAIR[:1]),
)
SUBJECT = SPECS[1]
GOLDEN = (ByteLinearSpec(bits=4, group=128, tiles=TILES[:1]),)
LIMITS = {4: 2.4, 8: 1.2}
"""Instructions a weight at 16 rows and 128 channels, symmetric and a run to a turn: fewer than with bfloat16
rows, 3.3 and 4.1, because one instruction unpacks four codes of 4 bits and none those of 8."""


def job(spec: ByteLinearSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    """A row with an outlier's magnitude, one of zeros, codes at both ends; int32 sums are exact."""
    found = check.run("interpret", [job(spec) for spec in SPECS])
    assert {spec.describe(): words for spec, words in zip(SPECS, found, strict=True) if words} == {}


FAULTS = {
    "a bound one too far": ("live = rm[None, :] < M", "live = rm[None, :] <= M", "out of bounds"),
    "scales of the next group": ("scales + k0 // 64", "scales + (k0 // 64 ^ 1)", ""),
    "zeros of the first group": ("zeros + (k0 + 64) // 64", "zeros + k0 // 64", ""),
    "totals of another run": ("totals + (k0 + 64) // 64", "totals + k0 // 64", ""),
    "no sixteenth": ("part.to(tl.float32) * 0.0625", "part.to(tl.float32)", ""),
    "a wrong shift": ("w << 4", "w << 3", ""),
    "a wrong mask": ("-0x0F0F0F10", "-0x0F0F0F20", ""),
    "bytes in the wrong order": ("tl.join(even, odd)", "tl.join(odd, even)", ""),
    "halves in the wrong order": ("(k0 + 64 + rk)", "(k0 + rk)", ""),
    "the scale of the first row": (
        "tl.load(rows + rm, mask=rm < M",
        "tl.load(rows + rm * 0, mask=rm < M",
        "",
    ),
    "a scale for all rows": ("most = tl.max(tl.abs(a))", "most = 3.0 + 0.0 * tl.max(tl.abs(a))", ""),
    "one too many": ("+ 12582912.0) - 12582912.0", "+ 12582912.0) - 12582911.0", ""),
    "shares that store to one place": ("to + share * M * N", "to", "race"),
    "shares that overlap": ("range(first, last", "range(first, K", ""),
    "a lost tail of K": ("(K // 128 + SPLIT - 1) // SPLIT", "K // 128 // SPLIT", ""),
    "a share that is not added": ("static_range(SPLIT)", "static_range(SPLIT - 1)", ""),
    "a dropped epilogue": ("acc += tl.load(bias", "acc += 0.0 * tl.load(bias", ""),
}


def test_seeded_faults_are_found() -> None:
    text = emit(SUBJECT)
    assert [name for name, (old, _, _) in FAULTS.items() if old not in text] == []
    found = check.run("interpret", [job(SUBJECT, text.replace(old, new)) for old, new, _ in FAULTS.values()])
    missed = {
        name: words
        for (name, (_, _, by)), words in zip(FAULTS.items(), found, strict=True)
        if not words or by not in words
    }
    assert missed == {}


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 130), turns=st.integers(1, 3), seed=st.integers(0, 99))
def test_unpacking_undoes_packing(n: int, turns: int, seed: int) -> None:
    columns = 64 if seed % 3 == 0 else 128
    dice = torch.Generator().manual_seed(seed)
    scales = torch.rand(n, turns, generator=dice)
    zeros = torch.randint(0, 16, (n, turns), generator=dice, dtype=torch.uint8)
    for bits, symmetric in ((4, True), (4, False), (8, True)):
        spec = ByteLinearSpec(bits=bits, group=columns, columns=columns, symmetric=symmetric)
        codes = torch.randint(0, 2**bits, (n, turns * columns), generator=dice, dtype=torch.uint8)
        codes = codes.view(torch.int8) if bits == 8 else codes
        packed = pack(spec, codes, scales, None if symmetric else zeros)
        back, back_scales, back_zeros = unpack(spec, packed, n)
        assert torch.equal(back, codes)
        assert torch.equal(back_scales, scales)
        assert back_zeros is None if symmetric else torch.equal(back_zeros, zeros)  # type: ignore[arg-type]
        tensors = [packed.words, packed.scales, *([] if packed.zeros is None else [packed.zeros])]
        assert sum(t.numel() * t.element_size() for t in tensors) == spec.bytes(n, turns * columns)


def test_bytes_keep_a_row_within_half_a_step() -> None:
    x = torch.randn(7, 256) * torch.tensor([1e-6, 1.0, 300.0, 1e20, 0.0, 1.0, 2.0])[:, None]
    q, rows = quantize_rows("int8", x)
    assert bool(((q.float() * rows[:, None] - x).abs() <= rows[:, None] * 0.5001).all())
    q, rows = quantize_rows("float8", x)
    error = (q.float() * rows[:, None] - x).abs()
    assert bool((error <= x.abs() * 2**-4 + rows[:, None] * 2**-10).all())


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, GOLDEN, version)
    hold(GOLDEN, found)
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


def every() -> list[ByteLinearSpec]:
    """Both kinds, all bits and zero codes, groups of 64, 128 and whole rows."""
    found = []
    for fields in ({"kind": "float8"}, {"bits": 8}, {"bits": 4}, {"bits": 4, "symmetric": False}):
        for group in (64, 128, 0):
            columns = 64 if group == 64 and "bits" in fields and fields["bits"] == 8 else 128
            columns = 64 if group == 64 and "kind" in fields else columns
            found.append(ByteLinearSpec.model_validate(fields | {"group": group, "columns": columns}))
    return found


@pytest.mark.kernels
@pytest.mark.parametrize("version", [importlib.metadata.version("triton"), "3.6.0"])
def test_every_kernel_and_tile_keeps_the_limits(version: str) -> None:
    hold(every(), compiled(OP, every(), version, beside(version), kept=True))


def hold(specs: Any, found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for spec in specs:
        unit = "IGMMA" if spec.kind == "int8" else "QGMMA"
        starts = tuple(f"{title(spec)} {tile.bm}x{tile.bn} " for tile in spec.tiles)
        products = {
            label: one
            for label, one in found.items()
            if label.startswith(starts) and label.endswith(" kernel")
        }
        assert len(products) == len(spec.tiles)
        for label, one in products.items():
            assert one["counts"].get(unit), f"{label}: no wgmma"
            assert not {"HMMA", "IMMA", "LDL", "STL"} & set(one["counts"]), label
            assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"
            if " 16x128 " in label and spec.run == 128 and spec.symmetric:
                assert one["each"] <= LIMITS[spec.bits], label


def test_what_cannot_be_is_refused_in_words() -> None:
    for words, fields in {
        "no epilogue is called swish": {"epilogue": ("swish",)},
        "4 bits multiply int8 alone": {"bits": 4, "kind": "float8"},
        "8 bits have no zero codes": {"symmetric": False},
        "a group is a multiple of 128 that divides": {"group": 64},
        "zero codes spill registers": {"bits": 4, "symmetric": False, "tiles": TILES},
    }.items():
        with pytest.raises(ValidationError, match=words):
            ByteLinearSpec.model_validate(fields)
    with pytest.raises(ValueError, match="needs zero codes"):
        pack(SUBJECT, torch.zeros(4, 128, dtype=torch.uint8), torch.zeros(4, 2), None)
    assert "not a multiple of 128" in str(refuses(SUBJECT, 1, 64, 192))
    assert "do not fit 32 bits" in str(refuses(SPECS[0], 1, 64, 2**18))
    assert "beyond 31 bits" in str(refuses(SPECS[0], 1, 2**20, 2**14))
    assert refuses(SUBJECT, 1, 64, 256) is None
    assert DTYPES["float8"] == torch.float8_e4m3fn
