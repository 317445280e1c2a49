"""sparse_low_rank in Triton: its layout, values, faults, compilation, and slopes in torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.kernels.gpu import check
from effc.kernels.sparse_low_rank.call_gpu import linear
from effc.kernels.sparse_low_rank.emit_triton import emit
from effc.kernels.sparse_low_rank.layout import pack, unpack
from effc.kernels.sparse_low_rank.spec import SparseLowRankSpec, bytes, refuses

from .compiled import compiled, differences
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "sparse_low_rank.gpu"
SPECS = (SparseLowRankSpec(rank=16, rows=16, step=16), SparseLowRankSpec(rank=32, rows=64, step=64))
COMPILED = (SparseLowRankSpec(),)
ALSO = (SparseLowRankSpec(rank=64, rows=16), SparseLowRankSpec(rank=256, rows=64, step=64))


def job(spec: SparseLowRankSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    assert check.run("interpret", [job(spec) for spec in SPECS]) == ["", ""]


FAULTS = {
    "the number behind": ("tl.cumsum(bit, 1) - bit", "tl.cumsum(bit, 1)", ""),
    "bits of another column": ("(c % 32)[None, :]", "(31 - c % 32)[None, :]", ""),
    "words of the first half": ("k0 // 32 + c // 32", "k0 // 32 + c // 64", ""),
    "numbers of another run": ("K // 64) + k0 // 64", "K // 64) + 0", ""),
    "numbers where there are none": (
        "tl.load(values + at, mask=bit == 1",
        "tl.load(values + at, mask=bit >= 0",
        "",
    ),
    "no thin product": ("range(0, 16, 16)", "range(0, 0, 16)", "y of"),
    "rows of another factor": ("b + rn[:, None] * 16", "b + (rn ^ 1)[:, None] * 16", "y of"),
    "a row too far": ("live = (rm < M)[None, :]", "live = (rm <= M)[None, :]", "out of bounds"),
    "S the wrong way round": ("tl.dot(tl.trans(s), g, acc)", "tl.dot(s, g, acc)", "dx of"),
    "rows of S left out": ("range(0, N, 64)", "range(64, N, 64)", "dx of"),
    "columns of another factor": ("a + rr[None, :] * K + (k0 + c)", "a + rr[None, :] * K + c", "dx of"),
    "a rest of rows left out": ("range(0, M, 16)", "range(0, M // 16 * 16, 16)", "dv of"),
    "slopes that are stored everywhere": (
        "dtype.element_ty), mask=bit == 1)",
        "dtype.element_ty), mask=bit >= 0)",
        "",
    ),
}


def test_seeded_faults_are_found() -> None:
    text = emit(SPECS[0])
    assert [name for name, (old, _, _) in FAULTS.items() if old not in text] == []
    found = check.run("interpret", [job(SPECS[0], text.replace(old, new)) for old, new, _ in FAULTS.values()])
    both = zip(FAULTS.items(), found, strict=True)
    assert {name: words for (name, (_, _, by)), words in both if not words or by not in words} == {}


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9), runs=st.integers(1, 3), seed=st.integers(0, 99))
def test_unpacking_undoes_packing(n: int, runs: int, seed: int) -> None:
    dice, k = torch.Generator().manual_seed(seed), 64 * runs
    places = torch.randperm(n * k, generator=dice)[: seed * n * k // 99]
    support = pack(places, n, k)
    assert torch.equal(unpack(support, n), places.sort().values)
    assert torch.equal(places[support.order], places.sort().values)
    size = sum(t.numel() * t.element_size() for t in support[:2])
    assert bytes(n, k, places.numel()) == size + 2 * places.numel()


def test_torch_differentiates_it() -> None:
    """In a process that interprets: slopes of a loss, at a rank below the kernel's."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "sparse_low_rank_slopes.py")],
        capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == ["a", "b", "values", "x", "y"]
    assert {name: off for name, off in found.items() if not off < 1e-2} == {}


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
        assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
        assert "HMMA" not in one["counts"], label
        assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"


def test_what_cannot_be_is_refused_in_words() -> None:
    spec = SparseLowRankSpec(rank=64)
    assert "rank 65, the kernel takes 64" in str(refuses(spec, 8, 64, 64, 65))
    assert "K = 96 is not a multiple of 64" in str(refuses(spec, 8, 64, 96, 8))
    assert "N = 32 is not a multiple of 64" in str(refuses(spec, 8, 32, 64, 8))
    assert "beyond 31 bits" in str(refuses(spec, 2**20, 4096, 64, 8))
    assert refuses(spec, 8, 64, 128, 64) is None
    with pytest.raises(ValueError, match="places are not 2 different ones of 128"):
        pack(torch.tensor([5, 5]), 2, 64)
    x, a, b = torch.zeros(1, 64), torch.zeros(8, 64), torch.zeros(64, 8)
    with pytest.raises(ValueError, match=r"operands are torch\.float32, the kernel takes torch\.bfloat16"):
        linear(spec, x, a, b, torch.zeros(1), pack(torch.tensor([3]), 64, 64), 1.0)
