"""linear_attention in Triton: chunks forward and backward, steps: values, faults, compilation, torch."""

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
from pydantic import ValidationError

from effc.compiler.scan import scan
from effc.kernels.gpu import check
from effc.kernels.linear_attention.call_gpu import attend
from effc.kernels.linear_attention.emit_triton import emit
from effc.kernels.linear_attention.reference import reference
from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec, refuses

from .compiled import compiled, differences, interpreted
from .test_compile import beside

pytest.importorskip("triton", reason="Triton has builds for Linux only")

OP = "linear_attention.gpu"
PARTS = (OP, "linear_attention.gpu_slopes", "linear_attention.gpu_step")
KEY = LinearAttentionGpuSpec(heads=2, kv_heads=1, key_dim=64, value_dim=64, scale=0.125)
HEAD = LinearAttentionGpuSpec(heads=2, kv_heads=2, key_dim=64, value_dim=64, scale=0.1, gate="head", keys=32)
COMPILED = tuple(
    LinearAttentionGpuSpec(heads=16, kv_heads=hk, key_dim=128, value_dim=v, scale=0.09, gate=gate)
    for gate, hk, v in (("key", 16, 128), ("head", 4, 256))
)


def job(spec: LinearAttentionGpuSpec, text: str | None = None) -> dict[str, Any]:
    return {"op": OP, "spec": spec.model_dump(mode="json"), "text": text}


def test_values_bounds_and_races() -> None:
    """Mild gates, gates of e^-50, gates of 1 and 0; packed, ragged, with and without a first state."""
    found = check.run("interpret", [job(spec) for spec in (KEY, HEAD)])
    assert {spec.gate: words for spec, words in zip((KEY, HEAD), found, strict=True) if words} == {}


CHAIN = "number = tl.load(before + b)\n    kv = tl.program_id(1)\n    d ="
FORWARD_FAULTS = {
    "natural logarithms": ("other=0.0) * 1.4426950408889634", "other=0.0)", "forward"),
    "pairs of one size left out": (
        "range(0, 6):\n                z",
        "range(0, 5):\n                z",
        "forward",
    ),
    "an edge in the wrong place": ("+ (1 << n) - 1", "+ (1 << n) + 1", "forward"),
    "tokens that see later ones": ("i[:, None] >= i[None, :], acc", "i[:, None] >= 0, acc", "forward"),
    "a state that forgets nothing": ("state * tl.exp2(edge)[:, None]", "state", "forward"),
    "no first state": ("state += tl.load(past + here)", "state += 0.0", "forward"),
    "tokens of the next sequence": (
        "live = rows < end\n        ks",
        "live = rows <= end\n        ks",
        "out of",
    ),
    "chunks of another sequence": (CHAIN, CHAIN.replace("before + b", "before"), "race"),
}
SLOPE_FAULTS = {
    "gates that no floor holds": ("tl.maximum(each, -100.0)", "each", ""),
    "queries of even blocks": ("n & 1 == 1)[:, None], qs", "n & 1 == 0)[:, None], qs", "forward"),
    "pairs of all sizes at once": (">> n == 1, tl.dot", ">> n >= 1, tl.dot", "forward"),
    "keys that are not decayed": ("ks * tl.exp2(edge[:, None] - gs)", "ks * tl.exp2(0.0 * gs)", "forward"),
    "no scale": ("acc = tl.dot(ws, vs, acc) * 0.125", "acc = tl.dot(ws, vs, acc)", "forward"),
    "a last slope that is not heard": ("slope += tl.load(dlast + here)", "slope += 0.0", "backward"),
    "one head of a group": ("(kv + 1) * 2):\n            qs", "kv * 2 + 1):\n            qs", "backward"),
    "gates without what the state keeps": ("(whole * tl.exp2(end))", "(0.0 * tl.exp2(end))", "dg"),
    "gates behind their query": ("after & (apart == 0)", "after & (apart <= 3)", "dg"),
    "a query's own gate left out": ("odd, i[None, :] >= i[:, None]", "odd, i[None, :] > i[:, None]", "dg"),
    "no slope of a token to itself": ("dks += own * qs", "dks += 0.0 * qs", "dk"),
    "slopes of keys to queries": (
        "dqs += tl.where((i >> n & 1 == 1)",
        "dqs += tl.where((i >> n & 1 < 1)",
        "dq",
    ),
    "values without the state": ("acc = tl.dot(ks, tl.load(dstates + at), acc)", "acc += 0.0", "dv"),
    "a step without its gate": ("tl.load(past + at) * gate[:, None]", "tl.load(past + at)", "step"),
}
DECAYED = "tl.exp2(tl.minimum(gs[:, None] - gs[None, :], 0.0))"
HEAD_FAULTS = {
    "weights that are not decayed": (f"        acc *= {DECAYED}", "        acc *= 1.0", "forward"),
    "outputs that are not decayed": ("acc *= tl.exp2(tl.load", "acc *= tl.exp2(0.0 * tl.load", "forward"),
}
HEAD_SLOPE_FAULTS = {
    "pairs counted by every share": ("if tl.program_id(2) == 0:", "if tl.program_id(2) >= 0:", "dg"),
    "a share that is not added": ("shares.sum(0)", "shares[0]", "dg"),
    "gates before their key": ("tl.where(behind, after, 0.0)", "after", "dg"),
    "slopes that are not decayed": (f"dws *= {DECAYED}", "dws *= 1.0", "d"),
}


def missed(
    by_spec: dict[LinearAttentionGpuSpec, dict[str, tuple[str, str, str]]], kept: bool = False
) -> dict[str, str]:
    """Faults that no check finds, or that another finds than is due; with `kept`, from earlier runs too."""
    jobs, due = [], {}
    for spec, faults in by_spec.items():
        text = emit(spec)
        for name, (old, new, by) in faults.items():
            assert old in text, name
            jobs.append(job(spec, text.replace(old, new)))
            due[name] = by
    found = interpreted(jobs) if kept else check.run("interpret", jobs)
    both = zip(due.items(), found, strict=True)
    return {name: words for (name, by), words in both if not words or by not in words}


def test_seeded_faults_are_found() -> None:
    assert missed({KEY: FORWARD_FAULTS, HEAD: HEAD_FAULTS}) == {}


@pytest.mark.kernels
def test_seeded_faults_of_slopes_are_found() -> None:
    assert missed({KEY: SLOPE_FAULTS, HEAD: HEAD_SLOPE_FAULTS}, kept=True) == {}


def test_the_definition_is_the_scan_of_the_blocks() -> None:
    dice = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(9, h, 4, generator=dice).double() for h in (4, 2, 2, 2))
    past = torch.randn(1, 2, 4, 4, generator=dice).double()
    g = -g.abs()
    out, last = reference(q, k, v, g, torch.tensor([0, 9]), past, scale=0.5)
    heads = [x.transpose(0, 1)[None] for x in (q, k, v, g)]
    due, state = scan(*heads, past, scale=0.5, chunk=4, sub=2)
    assert torch.allclose(out, due[0].transpose(0, 1), atol=1e-12)
    assert torch.allclose(last, state, atol=1e-12)


def test_torch_differentiates_it() -> None:
    """In a process that interprets: slopes of a loss, through packed sequences and a first state."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "linear_attention_slopes.py")],
        capture_output=True, text=True, check=False, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == ["g", "k", "out", "past", "q", "step", "v"]
    assert {name: off for name, off in found.items() if not off < 1.5e-2} == {}


def test_forward_compiles_to_the_golden_numbers(request: pytest.FixtureRequest) -> None:
    version = importlib.metadata.version("triton")
    found = compiled(OP, COMPILED[:1], version)
    hold(found)
    assert differences(OP, version, found, request.config.getoption("--update-golden")) == []


@pytest.mark.kernels
@pytest.mark.parametrize("version", [importlib.metadata.version("triton"), "3.6.0"])
def test_every_kernel_keeps_the_limits(version: str) -> None:
    for op in PARTS:
        hold(compiled(op, COMPILED, version, beside(version), kept=True))


def hold(found: dict[str, Any]) -> None:
    """What every compiled kernel must be, whatever the golden numbers say."""
    assert {label: one["wrong"] for label, one in found.items() if one["wrong"]} == {}
    for label, one in found.items():
        if "sums_kernel" not in label and "step_kernel" not in label:
            assert one["counts"].get("HGMMA"), f"{label}: no wgmma"
            assert "HMMA" not in one["counts"], label
            assert one["counts"].get("LDGSTS"), f"{label}: nothing is copied ahead"


def test_what_cannot_be_is_refused_in_words() -> None:
    given = {"heads": 4, "kv_heads": 2, "key_dim": 64, "value_dim": 64, "scale": 1.0}
    with pytest.raises(ValidationError, match="do not divide over 3"):
        LinearAttentionGpuSpec.model_validate(given | {"kv_heads": 3})
    with pytest.raises(ValidationError, match="programs of 128 of 64"):
        LinearAttentionGpuSpec.model_validate(given | {"values": 128})
    with pytest.raises(ValidationError, match="spill registers, take 32"):
        LinearAttentionGpuSpec.model_validate(given | {"keys": 64})
    spec = LinearAttentionGpuSpec.model_validate(given)
    assert "gates over values" in str(refuses(spec, 10, over="value"))
    assert "beyond 31 bits" in str(refuses(spec, 2**23))
    assert refuses(spec, 4096) is None
    q, k = torch.zeros(3, 4, 64).bfloat16(), torch.zeros(3, 2, 64).bfloat16()
    with pytest.raises(ValueError, match=r"g is \[3, 2, 64\] torch.bfloat16, the kernel takes \[3, 2, 64\]"):
        attend(spec, q, k, k, k)
    with pytest.raises(ValueError, match=r"past is \[2, 64, 64\] torch.float32, the kernel takes"):
        attend(spec, q, k, k, k.float(), torch.zeros(2, 64, 64))
    assert spec.operations(1) == 4 * (2 * 64 * 64 + 64 * 128) + 2 * 2 * 64 * 64
    assert spec.bytes(64) == 64 * (2 * 4 * 128 + 2 * 2 * 128 + 4 * 2 * 64) + 4 * 2 * 64 * 64
