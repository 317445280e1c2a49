"""Keys of a config.json that no importer reads: harmless ones are kept, those that change the function named.

Nobody can list all keys there will ever be. So a key is known when its family reads it, harmless when its
name says that it is about training, tokens, labels or caching, or when its value switches nothing on; and it
is taken to change the function when its name speaks of a part of the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rope_type"}
_WINDOWS = {"sliding_window", "layer_types", "max_window_layers", "use_sliding_window"}
_ALWAYS = {
    "architectures", "attn_implementation", "cross_attention_hidden_size", "dtype", "head_dim", "hidden_act",
    "hidden_activation", "is_encoder_decoder", "max_position_embeddings", "max_window_layers", "model_type",
    "n_ctx", "n_positions", "num_key_value_heads", "original_max_position_embeddings", "pretraining_tp",
    "problem_type", "reorder_and_upcast_attn", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "use_cache", "use_sliding_window",
}  # fmt: skip
"""Harmless, switched off by another key, or seen in the shapes of the tensors."""
_HARMLESS = re.compile(
    r"^_|dropout|pdrop|token_id|initializer|^output_|label|^summary_|^router_(aux|jitter|z)|loss|cache|pooler"
    r"|^unsloth|version|checkpointing|^num_beams|^max_length|stride|chunk_size|tokenizer"
)
_PART = re.compile(
    r"(^|_)(act|activation|alibi|attn|attention|bias|cap|clip|conv|embed|embedding|embeddings|experts?|gate|gated"
    r"|head|heads|lambda|layers?|logits?|mamba|mask|mlp|moe|multiplier|norm|parallel|position|positions|qk|qkv"
    r"|quantization|residual|rope|rotary|router|scale|scaled|scaling|shared|sliding|soft(cap|capping)|ssm|window"
    r"|windows)(_|$)"
)


def unread(read: Mapping[str, Any], only: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Keys that would change what the model computes and that its family does not read, sorted.

    Args:
        read: how the family reads its values (Architecture.config).
        only: keys of which the family knows the values it can express.
        config: config.json as it is.
    """
    known = _known(read) | set(only) | _ALWAYS
    return sorted(
        key
        for key, value in config.items()
        if key not in known and not _off(key, value) and not _HARMLESS.search(key) and _PART.search(key)
    )


def _known(read: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for how in read.values():
        if isinstance(how, str):
            found.add(how)
            continue
        found |= {str(how[word]) for word in ("key", "theta_key", "partial_key", "gate") if word in how}
        found |= {"rope": _ROPE, "windows": _WINDOWS}.get(how.get("is", ""), set())
    return found


def _off(key: str, value: Any) -> bool:
    """Does the value switch nothing on? Zero, nothing, a factor of one, layers that all attend in full."""
    if value is None or value is False or value in (0, "", [], {}):
        return True
    if key.endswith(("multiplier", "scale", "scaling", "factor")):
        return bool(value == 1)
    return isinstance(value, list) and set(map(str, value)) == {"full_attention"}
