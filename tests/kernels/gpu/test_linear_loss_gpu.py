"""linear_loss in Triton, forward and backward: values, faults that must not go unseen, compilation."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from effc.kernels.gpu import check
from effc.kernels.linear_loss.emit_triton import emit
from effc.kernels.linear_loss.gpu import reference
from effc.kernels.linear_loss.spec import LinearLossSpec, Tile, refuses

from .compiled import compiled, differences
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "linear_loss.gpu"
TILE = Tile(rows=32, columns=32, depth=32, warps=4, stages=2)
SMALL = {"losses": TILE, "of_weights": TILE, "of_rows": TILE, "shares": 2, "chunk": 48}
SPECS = (
    LinearLossSpec(**SMALL),
    LinearLossSpec(smoothing=0.1, z=1e-2, cap=5.0, **SMALL),
)
COMPILED = (LinearLossSpec(chunk=512), LinearLossSpec(smoothing=0.1, z=1e-4, cap=30.0, chunk=512))


def job(spec: LinearLossSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    found = check.run("interpret", [job(spec) for spec in SPECS])
    assert {spec.describe(): words for spec, words in zip(SPECS, found, strict=True) if words} == {}


FAULTS = {
    "labels past the last": ("live = (rv < V)[None, :]", "live = (rv <= V)[None, :]", "forward"),
    "sums of an old base": ("total * tl.exp2(top - now)", "total", "forward"),
    "a share left out": ("for share in tl.static_range(SHARES):\n        shrink",
                         "for share in tl.static_range(SHARES - 1):\n        shrink", "forward"),
    "shares on one place": ("tops + share * T + rm, top", "tops + rm, top", "race"),
    "losses where there are none": ("tl.where(label < 0, 0.0, l - ", "tl.where(label < -999, 0.0, l - ", ""),
    "slopes where there are none": ("due = tl.where(label < 0, 0.0, ", "due = (", "backward"),
    "no target": ("label[:, None], 0.9, 0.0)", "label[:, None], 0.0, 0.0)", "backward"),
    "no smoothing": (" - 0.1 / V", "", "backward"),
    "the mean over a share": ("mean / V", "mean / BLOCK", "forward"),
    "z once": ("0.02 * sums", "0.01 * sums", "backward"),
    "no z": (" + 0.01 * l * l", "", "forward"),
    "a cap without its slope": ("slope *= 1.0 - l * l * 0.04", "slope *= 1.0", "backward"),
    "labels of the first chunk": ("rv = first + i", "rv = i", "backward"),
    "weights of the first chunk": ("w + (first + i0 + i)", "w + (i0 + i)", "backward"),
    "one chunk alone": ("acc = tl.load(before", "acc = 0.0 * tl.load(before", "backward"),
    "rows past the last": ("live = t0 + t < T", "live = t0 + t < T + 1", "out of bounds"),
    "a gradient in another's place": ("dw + (first + i)", "dw + (first + i + 1)", ""),
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


def test_the_definition_is_that_of_torch() -> None:
    x, w = torch.randn(6, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    labels = torch.tensor([0, 10, -100, 3, 3, 7])
    for e in (0.0, 0.2):
        loss, _ = reference(LinearLossSpec(smoothing=e), x, w, labels)
        due = F.cross_entropy(x @ w.t(), labels, reduction="none", label_smoothing=e)
        assert torch.allclose(loss, due, atol=1e-12)


def test_compilation_gives_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, COMPILED[:1], version)
    hold(found)
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
@pytest.mark.parametrize("version", [importlib.metadata.version("triton"), "3.6.0"])
def test_compilation_keeps_the_limits(version: str) -> None:
    hold(compiled(OP, COMPILED, version, beside(version), kept=True))


def hold(found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():
        if not label.endswith("finish"):
            assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
            assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"
            assert not {"HMMA", "LDL", "STL"} & set(one["counts"]), label


def test_what_cannot_be_is_refused_in_words() -> None:
    spec = LinearLossSpec()
    assert "not a multiple of 256" in str(refuses(spec, 128, 320, 1000))
    assert "beyond 31 bits" in str(refuses(spec, 2**20, 4096, 32000))
    assert refuses(spec, 8192, 4096, 128256) is None


def test_scratch_is_less_than_the_logits() -> None:
    """8192 tokens of a model with 128256 labels: bytes beside inputs and results, by the formula."""
    spec, tokens, width, labels = LinearLossSpec(), 8192, 4096, 128256
    assert spec.scratch(tokens, width, labels) == 2 * tokens * 8192 + 4 * tokens * width
    assert spec.scratch(tokens, width, labels) < 2 * tokens * labels / 7
    assert spec.scratch(tokens, width, 1000) == 2 * tokens * 1000
