"""Every family: logits equal to those of transformers on small random configs, whatever the padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effc.compiler.importer import import_folder
from effc.runtime.generate import generate

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VIT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", COMMON),
    "llama-tied-bias": (
        "LlamaForCausalLM",
        COMMON | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama3": ("LlamaForCausalLM", COMMON | {"rope_parameters": LLAMA3}),
    "mistral": ("MistralForCausalLM", COMMON | {"sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        COMMON | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", COMMON | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2ForCausalLM",
        COMMON | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 20, "num_hidden_layers": 4},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "phi3": ("Phi3ForCausalLM", COMMON | {"sliding_window": 6}),
    "gpt_neox": ("GPTNeoXForCausalLM", COMMON | {"rotary_pct": 0.25}),
    "gpt_neox-serial": ("GPTNeoXForCausalLM", COMMON | {"use_parallel_residual": False}),
    "mistral-tied": ("MistralForCausalLM", COMMON | {"tie_word_embeddings": True}),
    "qwen2-tied": ("Qwen2ForCausalLM", COMMON | {"tie_word_embeddings": True}),
    "gemma2-untied": ("Gemma2ForCausalLM", COMMON | {"head_dim": 16, "tie_word_embeddings": False}),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        {
            "vocab_size": 97,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral-tied": (
        "MixtralForCausalLM",
        COMMON | {"num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    ),
    "phi3-tied": ("Phi3ForCausalLM", COMMON | {"tie_word_embeddings": True}),
    "gpt_neox-tied": ("GPTNeoXForCausalLM", COMMON | {"rotary_pct": 0.25, "tie_word_embeddings": True}),
    "bert": ("BertModel", COMMON),
    "vit": ("ViTModel", VIT),
    "vit-plain": ("ViTModel", VIT | {"qkv_bias": False, "image_size": 8, "num_channels": 1}),
}


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A random transformers model and what effc reads from its folder."""
    name, settings = FAMILIES[request.param]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    theirs = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.15)
    theirs.save_pretrained(tmp_path)
    return theirs, import_folder(tmp_path).materialize()


def reference(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Positions count real tokens; an encoder counts padding too."""
    more: dict[str, Tensor] = {}
    if model.config.model_type != "bert":
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, **more)
    found: Tensor = out.last_hidden_state if "logits" not in out else out.logits
    return found


def test_equals_transformers_with_padding_on_both_sides(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    if theirs.config.model_type == "vit":
        sizes = theirs.config.num_channels, theirs.config.image_size, theirs.config.image_size
        for batch in (1, 3):
            images = torch.randn(batch, *sizes)
            with torch.no_grad():
                want, got = theirs(pixel_values=images).last_hidden_state, ours(images)
            assert (got - want).abs().max() / want.abs().max() < 1e-5
        return
    ids = torch.randint(3, 97, (3, 14))
    for left in (False, True):
        mask = torch.ones_like(ids)
        for row, pad in enumerate((0, 3, 6)):
            if pad:
                mask[row, slice(None, pad) if left else slice(-pad, None)] = 0
        want = reference(theirs, ids, mask)
        with torch.no_grad():
            got = ours(ids, attention_mask=mask)
        real = mask.bool()
        error = (got - want)[real].abs().max() / want[real].abs().max()
        assert error < 1e-5


def test_cached_decoding_equals_the_full_forward(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    if theirs.config.model_type in ("bert", "vit"):
        return
    ids = torch.randint(3, 97, (2, 9))
    out = generate(ours, ids, max_new_tokens=6)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, ours(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    assert out.tolist() == ids.tolist() or out.tolist() == ids[:, 9:].tolist()


def test_a_head_is_tied_where_the_config_says_so(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    if theirs.config.model_type in ("bert", "vit"):
        return
    assert ("head.weight" in ours.ties()) is theirs.config.tie_word_embeddings


def test_padding_on_the_left_changes_no_token_of_cached_decoding(pair: tuple[Any, Any]) -> None:
    """A padded batch with a cache against transformers, row by row, without padding and without a cache."""
    theirs, ours = pair
    if theirs.config.model_type in ("bert", "vit"):
        return
    ids = torch.randint(3, 97, (3, 9))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 2, 6)):
        mask[row, :pad] = 0
    got = generate(ours, ids, attention_mask=mask, max_new_tokens=5)
    for row, pad in enumerate((0, 2, 6)):
        plain = ids[row : row + 1, pad:]
        for _ in range(5):
            with torch.no_grad():
                logits = theirs(input_ids=plain).logits[:, -1]
            plain = torch.cat((plain, logits.argmax(-1, keepdim=True)), 1)
        assert got[row, pad:].tolist() == plain[0].tolist()
