"""quant_linear in Triton: its layout, its values in the interpreter, and faults that must not go unseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from effc.kernels.gpu import check
from effc.kernels.quant_linear.emit_triton import emit
from effc.kernels.quant_linear.gpu import parse
from effc.kernels.quant_linear.layout_gpu import pack, unpack
from effc.kernels.quant_linear.spec_gpu import TILES, Tile, WeightOnlySpec, refuses

pytest.importorskip("triton", reason="Triton has builds for Linux only")

PAIR = (Tile(bm=16, bn=64, warps=4, stages=4), Tile(bm=16, bn=128, warps=4, stages=4, split=2))
SPECS = (
    WeightOnlySpec(bits=4, group=128, symmetric=False, tiles=PAIR),
    WeightOnlySpec(bits=4, group=32, tiles=PAIR, epilogue=("bias", "gelu", "residual")),
    WeightOnlySpec(bits=4, group=256, symmetric=False, tiles=PAIR[:1], epilogue=("silu", "mul")),
    WeightOnlySpec(bits=4, group=0, scale="bfloat16", tiles=PAIR, epilogue=("row_scale", "relu")),
    WeightOnlySpec(bits=8, group=128, tiles=PAIR),
    WeightOnlySpec(bits=8, group=32, columns=64, symmetric=False, tiles=PAIR[:1], epilogue=("gelu_tanh",)),
    WeightOnlySpec(bits=2, group=64, symmetric=False, tiles=PAIR),
    WeightOnlySpec(bits=3, group=128, symmetric=False, tiles=PAIR, epilogue=("bias",)),
    WeightOnlySpec(bits=3, group=0, columns=160, tiles=PAIR[1:]),
    WeightOnlySpec(bits=4, group=128, tiles=PAIR[1:], extension=16, within=True),
    WeightOnlySpec(bits=3, group=64, tiles=PAIR[:1], extension=32, within=True),
)
SUBJECT = WeightOnlySpec(bits=4, group=64, symmetric=False, tiles=PAIR, epilogue=("bias",))


def job(spec: WeightOnlySpec, text: str | None = None) -> dict[str, Any]:
    return {"op": "quant_linear.gpu", "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    """Rows 1, 5, 16 and 17, ragged channels, uneven shares of the columns, results poisoned before."""
    found = check.run("interpret", [job(spec) for spec in SPECS])
    assert {spec.describe(): words for spec, words in zip(SPECS, found, strict=True) if words} == {}


FAULTS = {
    "a bound one too far": ("live = rm[None, :] < M", "live = rm[None, :] <= M", "out of bounds"),
    "scales of another layout": ("scales + g * stride + rn", "scales + rn * (K // 64) + g", ""),
    "scales of the next group": ("g = (k0 + 64 * i) // 64", "g = (k0 + 64 * i) // 64 ^ 1", ""),
    "a wrong group": ("g = (k0 + 64 * i) // 64", "g = (k0 + 64 * i) // 128", ""),
    "sums of another run": ("xsum + (k0 + 64 * i) // 64", "xsum + k0 // 64", ""),
    "a store without mask": (
        "acc.to(out.dtype.element_ty), mask=mask)",
        "acc.to(out.dtype.element_ty))",
        "out of bounds",
    ),
    "a load without mask": ("mask=rm < M, other=0.0)", "other=0.0, mask=rm >= 0)", "out of bounds"),
    "shares that store to one place": ("out += share * M * N", "out += 0", "race"),
    "a wrong zero point": ("+ 128.0", "+ 127.0", ""),
    "a wrong shift": ("w >> (4 *", "w >> (3 *", ""),
    "a wrong mask": ("0x000F000F", "0x0007000F", ""),
    "a wrong exponent": ("0x43004300", "0x43004280", ""),
    "a lost tail of K": ("(K // 128 + SPLIT - 1) // SPLIT", "K // 128 // SPLIT", ""),
    "shares that overlap": ("range(first, last", "range(first, K", ""),
    "halves in the wrong order": ("tl.join(low, high)", "tl.join(high, low)", ""),
    "planes in the wrong order": ("64 * i + 32 * j + rk", "64 * i + 32 * (1 - j) + rk", ""),
    "a dropped epilogue": (
        "    else:\n        acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]\n",
        "",
        "",
    ),
    "an epilogue of other channels": ("bias + rn, mask=rn < N", "bias + rn + 1, mask=rn + 1 < N", ""),
    "a share that is not added": ("static_range(SPLIT)", "static_range(SPLIT - 1)", ""),
    "a result the wrong way round": ("out + rm[None, :] * N + rn[:, None]", "out + rn[:, None] * M + rm", ""),
    "sums in bfloat16": ("+= scale[:, None] * (", "= acc.to(tl.bfloat16) + scale[:, None] * (", ""),
    "a value where nothing was loaded": ("mask=mask, other=0.0)", "mask=mask & (rn[:, None] > 0))", ""),
}


OTHER = WeightOnlySpec(bits=3, group=128, symmetric=False, tiles=PAIR[1:], extension=16, within=True)
OTHER_FAULTS = {
    "columns behind the last": ("(tl.where(k0 + 64 * i < K, rm, M) < M)[None, :]", "live", ""),
    "sums behind the last": ("mask=tl.where(k0 + 64 * i < K, rm, M) < M", "mask=rm < M", "out of bounds"),
    "rows that are not filled up": ("rn[:, None] * (rounded // 10)", "rn[:, None] * (K // 10)", ""),
    "a lost turn": ("(rounded // 320 + SPLIT - 1)", "(K // 320 + SPLIT - 1)", ""),
    "five planes at the places of four": ("(3 * (1 * i + j))", "(4 * (1 * i + j))", ""),
    "codes of four bits": ("0x00070007", "0x000F000F", ""),
    "a factor's first columns": ("re[:, None] * K + k[None", "re[:, None] * K + rk[None", ""),
    "the first share's part alone": ("acc = tl.dot(u, high, acc)",
                                     "acc += tl.dot(u, high) * tl.where(share == 0, 1.0, 0.0)", ""),
    "the way between in bfloat16": ("acc = tl.dot(u, (low -", "acc += 0.0 * tl.dot(u, (low -", ""),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "faults"), [(SUBJECT, FAULTS), (OTHER, OTHER_FAULTS)])
def test_seeded_faults_are_found(spec: WeightOnlySpec, faults: dict[str, tuple[str, str, str]]) -> None:
    text = emit(spec)
    assert {name: text.count(old) for name, (old, _, _) in faults.items() if old not in text} == {}
    changed = [text.replace(old, new) for old, new, _ in faults.values()]
    found = check.run("interpret", [job(spec, one) for one in changed])
    missed = {
        name: words
        for (name, (_, _, by)), words in zip(faults.items(), found, strict=True)
        if not words or by not in words
    }
    assert missed == {}


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    groups=st.integers(1, 3),
    n=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_unpacking_undoes_packing(bits: int, groups: int, n: int, seed: int) -> None:
    columns = {3: 320 if seed % 2 else 640, 8: 128 if seed % 3 else 64}.get(bits, 128)
    spec = parse({"bits": bits, "group": 128, "symmetric": seed % 2 == 0, "columns": columns})
    dice = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, 128 * groups), generator=dice, dtype=torch.uint8)
    scales = torch.rand(n, groups, generator=dice).half()
    zeros = torch.randint(0, 2**bits, (n, groups), generator=dice, dtype=torch.uint8)
    packed = pack(spec, codes, scales, zeros)
    back, back_scales, back_zeros = unpack(spec, packed, n, codes.shape[1])
    assert torch.equal(back, codes)
    assert torch.equal(back_scales, scales)
    assert back_zeros is None if spec.symmetric else torch.equal(back_zeros, zeros)  # type: ignore[arg-type]
    tensors = [packed.words, packed.scales, *([] if packed.zeros is None else [packed.zeros])]
    assert sum(t.numel() * t.element_size() for t in tensors) == spec.bytes(n, 128 * groups)
    assert not packed.scales[:, n:].any()


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="no epilogue is called swish"):
        WeightOnlySpec(bits=4, group=64, epilogue=("swish",))
    with pytest.raises(ValidationError, match="a group is a multiple of 64 that divides"):
        WeightOnlySpec(bits=8, group=32)
    with pytest.raises(ValidationError, match="64 columns of 2 bits a turn"):
        WeightOnlySpec(bits=2, group=64, columns=64)
    with pytest.raises(ValidationError, match="128 rows with runs of 32 columns spill"):
        WeightOnlySpec(bits=4, group=32, tiles=TILES)
    with pytest.raises(ValidationError, match="8 warps take 128 channels"):
        Tile(bm=16, bn=64, warps=8, stages=4)
    with pytest.raises(ValidationError, match="128 columns a turn; 160, 320 or 640 with 3 bits"):
        WeightOnlySpec(bits=3, group=64, columns=128)
    with pytest.raises(ValidationError, match="more than 32 rows with 3 bits"):
        WeightOnlySpec(bits=3, group=64, tiles=TILES[:2])
    with pytest.raises(ValidationError, match="inner of 128 columns is not made within"):
        WeightOnlySpec(bits=4, group=64, extension=128, within=True)
    assert "not a multiple of 64" in str(refuses(OTHER.model_copy(update={"group": 64}), 1, 64, 96))
    with pytest.raises(ValueError, match="needs zero codes"):
        pack(SUBJECT, torch.zeros(4, 128, dtype=torch.uint8), torch.zeros(4, 2), None)
    assert "not a multiple of 128" in str(refuses(SUBJECT, 1, 64, 192))
    assert "beyond 31 bits" in str(refuses(SUBJECT, 1, 2**20, 2**16))
    assert refuses(SUBJECT, 1, 64, 256) is None
