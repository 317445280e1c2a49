"""C kernels under sanitizers, members in turns: nothing wrong is found in them, and in faulty ones it is."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.cached_attention.spec import CachedAttentionSpec
from effc.kernels.choose_token import ChooseTokenSpec
from effc.kernels.cpu import check
from effc.kernels.cpu.isa import available
from effc.kernels.cpu.sanitize import sanitizing
from effc.kernels.dense_linear.spec import DenseLinearSpec
from effc.kernels.elementwise import ElementwiseSpec
from effc.kernels.embed.spec import EmbedSpec
from effc.kernels.experts.combine import CombineSpec
from effc.kernels.experts.linear import ExpertLinearSpec
from effc.kernels.experts.route import RouteSpec
from effc.kernels.experts.spread import SpreadSpec
from effc.kernels.kernel import KernelSpec
from effc.kernels.linear_attention.spec_c import RecurrentSpec
from effc.kernels.multi_lora.spec import MultiLoraSpec
from effc.kernels.norm.spec import NormSpec
from effc.kernels.quant_linear.spec import QuantLinearSpec
from effc.kernels.recurrent_cell import RecurrentCellSpec
from effc.kernels.sparse_linear.spec import SparseLinearSpec

ROOT = Path(__file__).parents[2]
sanitized = pytest.mark.skipif(isinstance(sanitizing(), str), reason=str(sanitizing()))

QUANT, DENSE, NORM, EMBED = "quant_linear.cpu", "dense_linear.cpu", "norm.cpu", "embed.cpu"
ATTEND, PLAIN, TOKEN = "cached_attention.cpu", "elementwise", "choose_token"
LORA, RECUR, SPARSE = "multi_lora.cpu", "linear_attention.cpu", "sparse_linear.cpu"
PLANES = "binary_planes.cpu"
ROUTE, SPREAD, EXPERT, COMBINE = (f"experts.{name}" for name in ("route", "spread", "linear", "combine"))
SPECS: list[tuple[str, KernelSpec]] = [
    (QUANT, QuantLinearSpec(bits=4, group=32, symmetric=False, epilogue=("bias", "gelu", "residual"))),
    (QUANT, QuantLinearSpec(bits=8, group=0, scale="bfloat16", paired=True, epilogue=("silu", "row_scale"))),
    (QUANT, QuantLinearSpec(bits=3, group=64, epilogue=("relu", "mul"))),
    (QUANT, QuantLinearSpec(bits=2, group=16)),
    (DENSE, DenseLinearSpec(weight="bfloat16", epilogue=("bias", "gelu_tanh", "residual"))),
    (DENSE, DenseLinearSpec(weight="float16", paired=True, epilogue=("silu", "row_scale", "mul"))),
    (DENSE, DenseLinearSpec()),
    (NORM, NormSpec(eps=1e-6)),
    (NORM, NormSpec(form="layer", eps=1e-5, bias=True, offset=1.0)),
    (EMBED, EmbedSpec(table="bfloat16", scale=27.75, positions="float16", position_offset=2,
                      types="float32")),
    (EMBED, EmbedSpec(table=None, packed=QuantLinearSpec(bits=3, group=32))),
    (EMBED, EmbedSpec(table=None, packed=QuantLinearSpec(bits=8, group=0, symmetric=False))),
    (ATTEND, CachedAttentionSpec(heads=3, kv_heads=3, head_dim=20, scale=0.2)),
    (ATTEND, CachedAttentionSpec(heads=4, kv_heads=1, head_dim=32, scale=0.2, cap=5.0, rotated=16,
                                 norm=1e-6, norm_offset=1.0, window=16)),
    (ATTEND, CachedAttentionSpec(heads=2, kv_heads=1, head_dim=16, scale=3.0, rotated=16, window=40,
                                 ring=30, cell="bfloat16")),
    (PLAIN, ElementwiseSpec(form="add")),
    (PLAIN, ElementwiseSpec(form="softcap", factor=30.0)),
    (TOKEN, ChooseTokenSpec()),
    (LORA, MultiLoraSpec(factor="bfloat16")),
    (ROUTE, RouteSpec(form="best", experts=19, active=3)),
    (ROUTE, RouteSpec(form="above", experts=5, active=5, act="tanh", tau=0.5, least=0.2)),
    (ROUTE, RouteSpec(form="largest", experts=7, active=1)),
    (SPREAD, SpreadSpec(experts=4, active=2)),
    (EXPERT, ExpertLinearSpec(experts=4, active=2, packed=QuantLinearSpec(bits=4, group=32))),
    (EXPERT, ExpertLinearSpec(experts=4, active=2,
                              dense=DenseLinearSpec(paired=True, epilogue=("silu",)))),
    (COMBINE, CombineSpec(active=2, residual=True)),
    (RECUR, RecurrentSpec(heads=6, kv_heads=2, key_dim=24, value_dim=24, divisor=16.0, q="softmax",
                          k="softmax", norm=1e-6)),
    (RECUR, RecurrentSpec(heads=2, kv_heads=1, key_dim=33, value_dim=6, divisor=16.0, over="value",
                          v="entry", pool=4)),
    (SPARSE, SparseLinearSpec(packed=QuantLinearSpec(bits=8, group=64, epilogue=("bias",)))),
    ("recurrent_cell", RecurrentCellSpec(cell="lstm_cifg", width=21)),
    (PLAIN, ElementwiseSpec(form="mul", each=3)),
    (PLANES, BinaryPlanesSpec(planes=3, epilogue=("bias", "silu", "residual"))),
    (PLANES, BinaryPlanesSpec(planes=2, share=320, terms=2)),
    (PLANES, BinaryPlanesSpec(planes=2, side="rows", share=32, scale="float16", epilogue=("mul",))),
]  # fmt: skip
FAULTS: dict[str, tuple[int, str, str, str]] = {
    # what is wrong: the spec above, its text, what stands instead, how it is found
    "a block too far": (0, "block < last;", "block <= last;", "AddressSanitizer"),
    "scales of another vector": (0, "(const uint16_t *)p + 16 * (v0 + i * 1)",
                                 "(const uint16_t *)p + 16 * v0", "y["),
    "zero codes of another vector": (0, "widen(p + 128 + 16 * (v0 + i * 1))", "widen(p + 128 + 16 * v0)",
                                     "y["),
    "a wrong zero point": (3, "all_int(2)", "all_int(1)", "y["),
    "the high nibble first": (0, "(q >> 4) & 0x0f0f0f0f", "(q >> 3) & 0x0f0f0f0f", "y["),
    "planes in the wrong order": (0, "load_word(a + r * K + 4)", "load_word(a + r * K + 0)", "y["),
    "rows at a wrong stride": (0, "load_word(a + r * K + 0)", "load_word(a + r * (K - 4) + 0)", "y["),
    "sums of another group": (0, "zero * -xsum[(m0 + r) * groups + g]", "zero * -xsum[(m0 + r) * groups]",
                              "y["),
    "bytes that overflow": (0, "127.0f / m", "128.0f / m", "y["),
    "bytes past the row": (1, "width - k < 16 ? width - k : 16", "16", ""),
    "a store past the last channel": (0, "give(y + m * N + n, a, count)", "store(y + m * N + n, a)", ""),
    "an epilogue of other channels": (0, "take(bias + n, count)", "take(bias + n + 1, count)", "AddressSan"),
    "no barrier behind the bytes": (0, "a->team->meet(members);", "", "in turns"),
    "a lost rest of K": (4, "if (whole < K)", "if (0)", "y["),
    "a rest of K that is not cut": (4, "K - whole)", "16)", ""),
    "rows of W past its end": (4, "n + c0 + c < N ? n + c0 + c : N - 1", "n + c0 + c", "AddressSanitizer"),
    "rows of x past its end": (6, "M - m0 < MOST_ROWS ? M - m0 : MOST_ROWS", "MOST_ROWS", "AddressSanitizer"),
    "a second matrix unread": (5, "rows, x + m0 * K, w2,", "rows, x + m0 * K, w,", "y["),
    "a lost rest of a norm": (7, "+ rest;", ";", "y["),
    "eps left out": (7, " + 1e-06f)", ")", "y["),
    "a mean over too many": (8, "0.0f) / (float)D;", "0.0f) / (float)(D + 1);", "y["),
    "another row of positions": (9, "place[m] + 2L", "place[m] + 1L", "x["),
    "a row of the next block": (11, "row / 64 * groups", "(row / 64 + 1) * groups", "AddressSanitizer"),
    "a token that sees the next": (12, "position + t + 1 - base", "position + t + 2 - base", "y["),
    "a window one too wide": (13, "position + t - 16 + 1 - base", "position + t - 16 - base", "y["),
    "keys turned backwards": (13, "b * c[i] + a * s[i]", "b * c[i] - a * s[i]", "y["),
    "sums that keep their old base": (14, "*total *= shrink;", "", "y["),
    "a ring that is not closed": (14, "at = position[m] % S", "at = position[m]", "y["),
    "no barrier behind the cache": (12, "a->team->meet(members);", "", "in turns"),
    "a store past the last number": (15, "give(y + i, a, count)", "store(y + i, a)", ""),
    "the later of two equals": (17, "&& i < j)", "&& i > j)", "token["),
    "zeros behind the row": (17, "if (to - v < 16)", "if (0)", "token["),
    "no barrier behind the parts": (17, "a->team->meet(members);", "", "in turns"),
    "another adapter's rows": (18, "edges[index[m]] + item % most", "item % most", "y["),
    "sums of the next adapter": (18, "r < edges[i + 1] - edges[i]", "r <= edges[i + 1] - edges[i]", ""),
    "no barrier between the factors": (18, "a->team->meet(members);", "", "in turns"),
    "the later of two equal experts": (19, "p[i] > p[best]", "p[i] >= p[best]", "chosen["),
    "an expert chosen twice": (19, "taken[best] = 1;", "", "chosen["),
    "weights that do not sum to one": (19, "w[j] /= sum", "w[j] /= 1.0f", "weights["),
    "small weights that stay": (20, "stays ? i : 5", "i", "chosen["),
    "the last of equal scores": (21, "p[i] > p[best]", "p[i] >= p[best]", ""),
    "a place for no expert": (22, "if (at < 0) continue;", "", ""),
    "rows of another choice": (22, "i / 2 * bytes_a", "i * bytes_a", ""),
    "the next expert's matrix": (23, "w + e * apart", "w + (e + 1) * apart", ""),
    "rows of the expert before": (23, "xq + at * K", "xq + edges[0] * K", "y["),
    "results of the expert before": (24, "y + at * N", "y", "y["),
    "the first matrix twice": (24, "w2 + e * N * K", "w + e * N * K", "y["),
    "an expert's weight for all": (25, "weights[m * 2 + j] * take", "weights[m * 2] * take", "y["),
    "what stands in another place": (25, "z + at * D", "z + m * D", "y["),
    "a state that a new sequence finds": (26, "if (position[m] == 0) memset", "if (0) memset", "y["),
    "states of another sequence": (26, "((slot[m] * 2", "((0 * 2", "y["),
    "gates of the first key head": (26, "j * 24;\n    float mean", "0;\n    float mean", "y["),
    "keys of another head": (26, "keys + (m * 2 + j)", "keys + (m * 2)", "y["),
    "no barrier behind the rows": (26, "a->team->meet(members);", "", "in turns"),
    "what is forgotten is let in": (27, "entry(g)", "exponential(g)", "y["),
    "a store past the last value": (27, ", count);\n      }", ", 16);\n      }", ""),
    "codes of another block": (28, "codes + starts[block]", "codes + starts[0]", "y["),
    "codes that stay where they were": (28, "p += bits_of(*b++)", "p += bits_of(*b)", ""),
    "pruned weights that are no zeros": (28, "(u32x16)c ^ 0x80808080u", "(u32x16)c ^ 0x81818181u", "y["),
    "a code too many": (28, "from[n++]", "from[++n]", "y["),
    "a block written over the next": (28, "malloc(size + 64)", "malloc(size - 64)", ""),
    "a cell that a new sequence finds": (29, "if (position[m] == 0)", "if (0)", "y["),
    "the state of another sequence": (29, "slot[m] * 42", "0 * 42", "y["),
    "a share read too far": (30, "j < i + 16 && j < last", "j < i + 16", ""),
    "a shift out of range": (2, "<< 2)", "<< 34)", ""),
    "signs turned": (31, "s0 * x[0] + s1 * x[1]", "s1 * x[0] + s0 * x[1]", "y["),
    "a plane too few": (31, "p < 3;", "p < 2;", "y["),
    "columns of a word in another order": (31, ">> 4 * s", ">> 4 * (s ^ 1)", "y["),
    "signs of the first block": (31, "words + block * apart", "words", "y["),
    "x past its last column": (31, "some(x + k + 16, K - k - 16)", "load(x + k + 16)", "AddressSanitizer"),
    "a store past the last row": (31, "give(y + m * N + n, a, count)", "store(y + m * N + n, a)", ""),
    "scales of the first run": (32, "block * 64 / 320 * padded", "0 * padded", "y["),
    "a power that is one too large": (32, "(e + 127) << 23", "(e + 128) << 23", "y["),
    "the term of another plane": (32, "(p * 2 + 1)", "(p * 2 + 0)", "y["),
    "no power that is one": (32, "& (u32x16)(e != -128)", "", "y["),
    "scales of the first group": (33, "(block * groups + g)", "(block * groups)", "y["),
    "phases that are added twice": (6, "s + (i + 8) * by + at", "s + i * by + at", "y["),
    "a panel past the last channel": (6, "n + c + i < N ? n + c + i : N - 1", "n + c + i", "AddressSan"),
    "a panel past the last column": (6, "* K + k, end - k)", "* K + k, 16)", ""),
    "a chunk of columns forgotten": (6, "else if (from == 0) phase", "else if (1) phase", "y["),
    "the first panel twice": (5, "panel + WIDE * columns, from", "panel, from", "y["),
    "sums of the first plane": (33, "+= sum[p][v] * (", "+= sum[0][v] * (", "y["),
}  # fmt: skip
TILE_FAULTS: dict[str, tuple[int, str, str, str]] = {
    "a last tile of rows past the end": (0, "(t + 1) * R < M ? t * R + r : M - R + r", "t * R + r", ""),
    "rows of x past the end": (3, "at + R < M ? at : M - R;", "at;", ""),
    "rows of the whole tile": (0, "tiles_of(R,", "tiles_of(16,", "AddressSanitizer"),
    "sums of the tile before": (0, "e = d[g % 2]", "e = d[(g + 1) % 2]", ""),
    "codes still unsigned": (2, "u8x64 less = c - 4;", "u8x64 less = c;", "y["),
    "zero codes of the first vector": (0, "-widen(p + 128 + 16 * v)", "-widen(p + 128)", "y["),
    "a second matrix in the place of the first": (1, "f[0] + i)", "f[0])", ""),
}
"""Of matrix units, with plain C in their place."""


def job(op: str, spec: KernelSpec, isa: str, text: str | None = None) -> dict[str, Any]:
    return {"op": op, "spec": spec.model_dump(mode="json"), "isa": isa, "text": text}


@sanitized
def test_every_kernel_keeps_to_its_memory_and_to_defined_arithmetic() -> None:
    """Sets of instructions in turn, so that each op sees each; ragged shapes, one to three members."""
    sets = available()
    jobs = [job(op, spec, sets[i % len(sets)]) for i, (op, spec) in enumerate(SPECS)]
    found = check.run(jobs, sanitized=True)
    assert {str(one["spec"]): words for one, words in zip(jobs, found, strict=True) if words} == {}


@sanitized
def test_seeded_faults_are_found() -> None:
    jobs = []
    for name, (i, old, new, _) in FAULTS.items():
        op, spec = SPECS[i]
        text = emitted(op, spec)
        assert old in text, name
        jobs.append(job(op, spec, available()[-1], text.replace(old, new)))
    found = check.run(jobs, sanitized=True)
    missed = {
        name: words
        for (name, (*_, by)), words in zip(FAULTS.items(), found, strict=True)
        if not words or by not in words
    }
    assert missed == {}


@sanitized
def test_matrix_units_keep_to_their_memory_and_faults_in_their_use_are_found() -> None:
    """Plain C stands for the instructions, so every byte they would touch is watched, on any processor."""
    jobs = [job(op, spec, available()[-1]) for op, spec in SPECS if op == QUANT]
    for name, (i, old, new, _) in TILE_FAULTS.items():
        text = emitted(*SPECS[i])
        assert old in text, name
        jobs.append(job(*SPECS[i], available()[-1], text.replace(old, new)))
    found = check.run(jobs, sanitized=True, flags="-DTILES_IN_C")
    assert found[: -len(TILE_FAULTS)] == [""] * 4
    missed = {
        name: words
        for (name, (*_, by)), words in zip(TILE_FAULTS.items(), found[4:], strict=True)
        if not words or by not in words
    }
    assert missed == {}


@sanitized
def test_whole_programs_keep_to_their_memory_and_to_defined_arithmetic() -> None:
    """Packed and dense models, prompts of unequal lengths and single tokens, one member and two."""
    more = sanitizing()
    assert isinstance(more, dict)
    command = [sys.executable, "-m", "tests.kernels.programs"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | more, cwd=ROOT, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: words for name, words in found.items() if words != "as torch has it"} == {}
    assert len(found) == 7


def emitted(op: str, spec: KernelSpec) -> str:
    text: str = importlib.import_module(f"effc.kernels.{op}").emit(spec)
    return text
