"""C kernels of merges under sanitizers, on every instruction set: bits, bounds, and faults that are found."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from effc.compiler.shapes import Spot
from effc.kernels.cpu import check
from effc.kernels.cpu.isa import available
from effc.kernels.cpu.sanitize import sanitizing
from effc.kernels.kernel import KernelSpec
from effc.kernels.merge.counts import CountsSpec
from effc.kernels.merge.dots import DotsSpec
from effc.kernels.merge.draws import drawn
from effc.kernels.merge.mix import MixSpec
from effc.kernels.merge.reference import dotted

MIX, DOTS, COUNTS = "merge.mix", "merge.dots", "merge.counts"
B, H, F = "bfloat16", "float16", "float32"
SPECS: list[tuple[str, KernelSpec]] = [
    (MIX, MixSpec(models=(B, H, F), out=B)),
    (MIX, MixSpec(models=(F, B), base=H, out=H)),
    (MIX, MixSpec(models=(B, B), base=B, out=B, join="elected", keep="above")),
    (MIX, MixSpec(models=(H, F), base=B, out=F, join="voted", keep="drawn")),
    (DOTS, DotsSpec(models=(B, F))),
    (COUNTS, CountsSpec(form="upper", models=(F, F), base=F)),
    (COUNTS, CountsSpec(form="lower", models=(H, B), base=B)),
]
FAULTS = {
    # what is wrong: the spec above, its text, what stands instead, how it is found
    "a store past the last number": (0, "memcpy(a->out + i, last_out, sizeof *last_out * (size_t)(N - i))",
                                     "memcpy(a->out + i, last_out, sizeof last_out)", "AddressSanitizer"),
    "numbers that are cut off": (0, "(bits >> 16 & 1u) + 0x7fffu", "0u", "out["),
    "a threshold that is not kept": (2, ">= above[0]", "> above[0] + 0.001f", "out["),
    "another model's share": (2, "c1 = c1 * shares[1]", "c1 = c1 * shares[0]", "out["),
    "the sign of the first": (2, "lead = lead + c1;", "", "out["),
    "the count before": (3, "count + 1 + (uint64_t)n", "count + (uint64_t)n", "out["),
    "draws of the chunk's begin": (3, "draws[0] + place % DRAWN", "draws[0]", "out["),
    "sums in another order": (4, "sum += lanes[i]", "sum += lanes[32 - i]", "dots["),
    "a table of the first model": (5, "a->counts + 32768L * 1", "a->counts", "counts["),
    "a rest that is counted whole": (5, "(int)(N - i)", "LANES", "counts["),
    "a row of the first model": (6, "a->rows + N * 1", "a->rows", "rows["),
}  # fmt: skip
sanitized = pytest.mark.skipif(isinstance(sanitizing(), str), reason=str(sanitizing()))


def job(op: str, spec: KernelSpec, isa: str, text: str | None = None) -> dict[str, object]:
    return {"op": op, "spec": spec.model_dump(mode="json"), "isa": isa, "text": text}


@pytest.mark.parametrize("isa", [isa for isa in available() if isa != "amx"])
def test_kernels_give_the_bits_of_their_definitions(isa: str) -> None:
    found = check.run([job(op, spec, isa) for op, spec in SPECS])
    assert found == [""] * len(SPECS)


@sanitized
def test_kernels_keep_to_their_memory_and_to_defined_arithmetic() -> None:
    sets = available()[-3:]
    jobs = [job(op, spec, sets[i % len(sets)]) for i, (op, spec) in enumerate(SPECS)]
    assert check.run(jobs, sanitized=True) == [""] * len(jobs)


@sanitized
def test_seeded_faults_are_found() -> None:
    jobs = []
    for name, (i, old, new, _) in FAULTS.items():
        op, spec = SPECS[i]
        text = importlib.import_module(f"effc.kernels.{op}").emit(spec)
        assert old in text, name
        jobs.append(job(op, spec, available()[-1], text.replace(old, new)))
    found = dict(zip(FAULTS, check.run(jobs, sanitized=True), strict=True))
    assert {name: said for name, said in found.items() if FAULTS[name][3] not in said} == {}


def test_products_are_added_in_the_stated_order() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 4999)).astype(np.float32)
    lanes = [0.0] * 32
    for i in range(4999):
        lanes[i % 32] += float(a[i]) * float(b[i])
    total = lanes[0]
    for lane in lanes[1:]:
        total += lane
    assert dotted(a, b) == total


def test_draws_do_not_depend_on_where_a_stretch_begins() -> None:
    whole = drawn(3, 1, Spot("a", 0), 200)
    for start in (1, 16, 33):
        assert (drawn(3, 1, Spot("a", start), 200 - start) == whole[start:]).all()
