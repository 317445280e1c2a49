"""A sound little llama folder, and the tools to spoil it: the start of every hostile input."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from effc.specs.diagnostic import EffcError

SECONDS = 2.0
"""Of this process alone, since the machine may be busy."""
MEMORY = 400 << 20
"""Bytes by which the process may grow while it refuses one input."""

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "vocab_size": 32,
}


def tensors() -> dict[str, torch.Tensor]:
    """The weights of CONFIG, by their names on disk."""
    stream = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens": (32, 16),
        "model.norm": (16,),
        "lm_head": (32, 16),
        "model.layers.0.input_layernorm": (16,),
        "model.layers.0.post_attention_layernorm": (16,),
        "model.layers.0.self_attn.q_proj": (16, 16),
        "model.layers.0.self_attn.k_proj": (8, 16),
        "model.layers.0.self_attn.v_proj": (8, 16),
        "model.layers.0.self_attn.o_proj": (16, 16),
        "model.layers.0.mlp.gate_proj": (24, 16),
        "model.layers.0.mlp.up_proj": (24, 16),
        "model.layers.0.mlp.down_proj": (16, 24),
    }
    return {f"{name}.weight": torch.randn(shape, generator=stream) * 0.2 for name, shape in shapes.items()}


def sound(folder: Path) -> Path:
    """A folder in Hugging Face layout that loads."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    return folder


def configured(folder: Path, **changes: Any) -> None:
    """Change keys of config.json."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def raw(
    folder: Path, header: bytes | str | dict[str, Any], body: bytes = b"", length: int | None = None
) -> None:
    """Write model.safetensors from a header as it is, however wrong."""
    text = json.dumps(header) if isinstance(header, dict) else header
    head = text.encode() if isinstance(text, str) else text
    size = len(head) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + head + body)


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def resign(folder: Path, *names: str) -> None:
    """Bring an artefact's manifest in line with files that were edited, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in names:
        content = (folder / name).read_bytes()
        manifest["files"][name] = [len(content), blake3(content).hexdigest()]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@contextmanager
def refused(*codes: str) -> Iterator[None]:
    """The block raises EffcError with one of the codes and nothing else, soon, in bounded memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(EffcError) as caught:
        yield
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY
    found = {d.code for d in caught.value.diagnostics}
    assert found <= set(codes), f"{found} is not within {codes}: {caught.value}"
    assert len(str(caught.value)) < 4000
    assert all(d.title for d in caught.value.diagnostics)


Spoil = Callable[[Path], object]
