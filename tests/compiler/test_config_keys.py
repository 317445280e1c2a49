"""Keys that no importer reads: what changes the function is refused by name, the rest is kept."""

from __future__ import annotations

from typing import Any

import pytest

from effc.compiler.architecture import architecture, read_config
from effc.compiler.importer import build
from effc.specs.diagnostic import EffcError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
CHANGE: list[dict[str, Any]] = [
    {"residual_multiplier": 0.22},
    {"embedding_multiplier": 12.0},
    {"attention_multiplier": 0.01},
    {"logits_scaling": 8.0},
    {"final_logit_softcapping": 30.0},
    {"sliding_window": 512},
    {"qk_norm": True},
    {"clip_qkv": 8},
    {"alibi": True},
    {"num_local_experts": 8},
    {"use_parallel_residual": True},
    {"layer_types": ["sliding_attention", "full_attention"]},
]
KEEP: list[dict[str, Any]] = [
    {"attention_dropout": 0.1},
    {"pretraining_tp": 2},
    {"initializer_range": 0.02},
    {"id2label": {"0": "no"}},
    {"unsloth_fixed": True},
    {"use_cache": True},
    {"sliding_window": None},
    {"layer_types": ["full_attention", "full_attention"]},
    {"residual_multiplier": 1.0},
    {"my_own_note": "a text"},
    {"_attn_implementation_autoset": True},
]


@pytest.mark.parametrize("more", CHANGE, ids=lambda m: next(iter(m)))
def test_a_key_that_changes_the_function_is_refused_by_name(more: dict[str, Any]) -> None:
    with pytest.raises(EffcError) as caught:
        read_config(architecture("llama"), LLAMA | more)
    assert [d.code for d in caught.value.diagnostics] == ["E432"]
    assert next(iter(more)) in str(caught.value)


@pytest.mark.parametrize("more", KEEP, ids=lambda m: next(iter(m)))
def test_a_harmless_key_is_kept(more: dict[str, Any]) -> None:
    assert build(architecture("llama"), LLAMA | more).config | more == LLAMA | more


def test_absent_and_null_differ_where_transformers_says_so() -> None:
    gemma = LLAMA | {"model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 8}
    family = architecture("gemma2")
    assert read_config(family, gemma)["logit_cap"] == 30.0
    assert read_config(family, gemma | {"final_logit_softcapping": None})["logit_cap"] is None
