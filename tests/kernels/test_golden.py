"""Emitted texts, held to those in tests/golden/kernels/: a changed emitter shows as a difference to read.

`--update-golden` writes them anew. What all C files begin with (vectors, team) is in `norm.c` alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import pytest

from effc.kernels import choose_token, elementwise
from effc.kernels import recurrent_cell as cell
from effc.kernels.attention import emit_triton as flash
from effc.kernels.attention.spec import AttentionGpuSpec
from effc.kernels.binary_planes import emit_c as planes
from effc.kernels.binary_planes import emit_triton as planes_gpu
from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.binary_planes.spec_gpu import BinaryPlanesGpuSpec
from effc.kernels.byte_linear import emit_triton as byte_gpu
from effc.kernels.byte_linear.spec import ByteLinearSpec
from effc.kernels.cached_attention import emit_c as attention
from effc.kernels.cached_attention.spec import CachedAttentionSpec
from effc.kernels.dense_linear import emit_c as dense
from effc.kernels.dense_linear.spec import DenseLinearSpec
from effc.kernels.embed import emit_c as embed
from effc.kernels.embed.spec import EmbedSpec
from effc.kernels.experts import combine, route, spread
from effc.kernels.experts import linear as expert_linear
from effc.kernels.gated import emit_triton as gated
from effc.kernels.grouped_linear import emit_triton as grouped_gpu
from effc.kernels.grouped_linear.spec_gpu import TILES as GROUP_TILES
from effc.kernels.grouped_linear.spec_gpu import GroupedLinearSpec
from effc.kernels.linear_attention import emit_c as recurrent
from effc.kernels.linear_attention import emit_triton as linear_attention_gpu
from effc.kernels.linear_attention.spec_c import RecurrentSpec
from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec
from effc.kernels.linear_loss import emit_triton as loss_gpu
from effc.kernels.linear_loss.spec import LinearLossSpec
from effc.kernels.merge import counts, dots, mix
from effc.kernels.merge.text import NUMBERS
from effc.kernels.multi_lora import emit_c as lora
from effc.kernels.multi_lora import emit_triton as lora_gpu
from effc.kernels.multi_lora.spec import MultiLoraGpuSpec, MultiLoraSpec
from effc.kernels.norm import emit_c as norm
from effc.kernels.norm import emit_triton as norm_gpu
from effc.kernels.norm.spec import NormSpec
from effc.kernels.program.emit import STRUCT, emit
from effc.kernels.quant_linear import emit_c as quant
from effc.kernels.quant_linear import emit_triton as quant_gpu
from effc.kernels.quant_linear.spec import QuantLinearSpec
from effc.kernels.quant_linear.spec_gpu import TILES, WeightOnlySpec
from effc.kernels.rope import emit_triton as rope_gpu
from effc.kernels.shared_prefix import emit_triton as prefix_gpu
from effc.kernels.shared_prefix.spec import SharedPrefixSpec
from effc.kernels.sparse_linear import bitmap_triton as bitmap_gpu
from effc.kernels.sparse_linear import emit_c as sparse
from effc.kernels.sparse_linear import emit_triton as half_gpu
from effc.kernels.sparse_linear.spec import SparseLinearSpec
from effc.kernels.sparse_linear.spec_bitmap import BitmapSpec
from effc.kernels.sparse_linear.spec_gpu import TwoOfFourSpec
from effc.kernels.sparse_low_rank import emit_triton as sparse_rank_gpu
from effc.kernels.sparse_low_rank.spec import SparseLowRankSpec
from effc.passes.lower.decoder import lower
from tests.passes.test_lower import quantized

GOLDEN = Path(__file__).parents[1] / "golden" / "kernels"
KERNELS = Path(__file__).parents[2] / "kernels"
W4 = QuantLinearSpec(bits=4, group=64, symmetric=False, epilogue=("bias", "residual"))
W8 = QuantLinearSpec(bits=8, group=64)
GATED = RecurrentSpec(heads=8, kv_heads=2, key_dim=64, value_dim=64, divisor=16.0, q="softmax", k="softmax")
HEADS = CachedAttentionSpec(heads=8, kv_heads=2, head_dim=64, scale=0.125, rotated=64)


def mixture() -> str:
    """The kernels of one mixture, but those of a single expert, which are those of any matrix."""
    choice = route.RouteSpec(form="best", experts=8, active=2)
    rows = spread.SpreadSpec(experts=8, active=2)
    each = expert_linear.ExpertLinearSpec(experts=8, active=2, packed=W8)
    back = combine.CombineSpec(active=2, residual=True)
    there = route.function(choice) + spread.function(rows) + expert_linear.function(each)
    return (there + combine.function(back)).replace(W8.key, "of_one")


def _after_numbers(text: str) -> str:
    """Of a kernel of merges what the others do not have."""
    return text.partition(NUMBERS)[2].lstrip()


def program() -> str:
    """What a program has beside the texts of its kernels: a part for each kind of layer, and their order."""
    text, _ = emit(lower(quantized()).plan)
    return text[text.index(STRUCT) :]


TEXTS: dict[str, Callable[[], str]] = {
    "norm.c": lambda: norm.emit(NormSpec(eps=1e-5)),
    "quant_linear.c": lambda: quant.function(W4),
    "dense_linear.c": lambda: dense.function(DenseLinearSpec(weight="bfloat16")),
    "embed.c": lambda: embed.function(EmbedSpec(table=None, packed=QuantLinearSpec(bits=4, group=64))),
    "cached_attention.c": lambda: attention.function(HEADS),
    "program.c": program,
    "experts.c": mixture,
    "recurrent_cell.c": lambda: cell.function(cell.RecurrentCellSpec(cell="gru", width=128)),
    "sparse_linear.c": lambda: sparse.function(SparseLinearSpec(packed=W8)).replace(W8.key, "dense"),
    "linear_attention.c": lambda: recurrent.function(GATED),
    "quant_linear.triton": lambda: quant_gpu.emit(
        WeightOnlySpec(bits=4, group=128, symmetric=False, epilogue=("bias", "silu"), tiles=TILES[:1])
    ),
    "norm.triton": lambda: norm_gpu.emit(norm_gpu.NormGpuSpec(eps=1e-5, run=64)),
    "gated.triton": lambda: gated.emit(gated.GatedSpec()),
    "attention.triton": lambda: flash.emit(
        AttentionGpuSpec(heads=32, kv_heads=8, head_dim=128, scale=0.125, window=4096)
    ),
    "multi_lora.triton": lambda: lora_gpu.emit(MultiLoraGpuSpec()),
    "multi_lora.c": lambda: lora.function(MultiLoraSpec(factor="bfloat16")),
    "binary_planes.c": lambda: planes.function(BinaryPlanesSpec(planes=2, share=128, epilogue=("bias",))),
    "choose_token.c": lambda: choose_token.function(choose_token.ChooseTokenSpec()),
    "elementwise.c": lambda: elementwise.function(elementwise.ElementwiseSpec(form="mul", each=3)),
    "merge_mix.c": lambda: _after_numbers(mix.emit(mix.MixSpec(models=("bfloat16",) * 2, out="bfloat16"))),
    "merge_dots.c": lambda: _after_numbers(dots.emit(dots.DotsSpec(models=("bfloat16", "float32")))),
    "merge_counts.c": lambda: _after_numbers(
        counts.emit(counts.CountsSpec(form="lower", models=("bfloat16",) * 2, base="bfloat16"))
    ),
    "binary_planes.triton": lambda: planes_gpu.emit(BinaryPlanesGpuSpec(planes=3, share=128)),
    "byte_linear.triton": lambda: byte_gpu.emit(ByteLinearSpec(kind="float8", tiles=TILES[:1])),
    "grouped_linear.triton": lambda: grouped_gpu.emit(
        GroupedLinearSpec(experts=64, active=8, tiles=GROUP_TILES[:1])
    ),
    "linear_attention.triton": lambda: linear_attention_gpu.emit(
        LinearAttentionGpuSpec(heads=16, kv_heads=4, key_dim=128, value_dim=128, scale=0.09, gate="head")
    ),
    "linear_loss.triton": lambda: loss_gpu.emit(LinearLossSpec()),
    "rope.triton": lambda: rope_gpu.emit(
        rope_gpu.RopeGpuSpec(heads=32, kv_heads=8, head_dim=128, rotated=64, cache=True)
    ),
    "shared_prefix.triton": lambda: prefix_gpu.emit(
        SharedPrefixSpec(heads=32, kv_heads=8, head_dim=128, scale=0.088)
    ),
    "sparse_linear.triton": lambda: half_gpu.emit(TwoOfFourSpec()),
    "sparse_linear_bitmap.triton": lambda: bitmap_gpu.emit(
        BitmapSpec(values="int8", group=64, epilogue=("bias",))
    ),
    "sparse_low_rank.triton": lambda: sparse_rank_gpu.emit(SparseLowRankSpec()),
}
"""File -> the text that it holds. Files of Triton do not end in .py, as they are not this project's code."""


@pytest.mark.parametrize("name", TEXTS)
def test_an_emitter_gives_its_golden_text(name: str, request: pytest.FixtureRequest) -> None:
    text, place = TEXTS[name](), GOLDEN / name
    if request.config.getoption("--update-golden"):
        place.write_text(text)
    due = place.read_text()
    changed = difflib.unified_diff(due.splitlines(), text.splitlines(), "golden", "emitted", lineterm="", n=1)
    assert text == due, "\n".join(changed)


def test_every_golden_text_has_its_emitter_and_every_emitter_its_text() -> None:
    kept = {path.name for path in GOLDEN.iterdir() if path.suffix in (".c", ".triton")}
    assert kept == set(TEXTS)
    for form, suffix in (("emit_c", "c"), ("emit_triton", "triton")):
        emitters = {path.parent.name for path in KERNELS.glob(f"*/{form}.py")}
        assert len(emitters) > 6
        assert {f"{name}.{suffix}" for name in emitters} <= kept
