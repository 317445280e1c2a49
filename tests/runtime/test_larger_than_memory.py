"""A model larger than the memory it is allowed is compiled and exported: the peak follows its layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effc.compiler.architecture import architecture
from effc.compiler.checkpoint_write import write_folder
from effc.compiler.exporter import stored_tensors
from effc.compiler.importer import build
from effc.compiler.weights import LazyTensor
from tests.runtime.doubles import tokenizer_files

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
MB = 10**6


def folder(place: Path, layers: int, width: int) -> tuple[int, int]:
    """A random llama in bfloat16 on disk, never whole in memory; bytes of the model and of a layer."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "vocab_size": 300,
        "tie_word_embeddings": True,
    }
    model = build(architecture("llama"), config, torch.bfloat16)
    model.config = config
    sizes = {name: t.numel() * 2 for name, t in model.tensors().items()}
    most = max(t.numel() for t in model.tensors().values())
    noise = (torch.randn(most, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def lazy(shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(shape, torch.bfloat16, lambda: noise[: torch.Size(shape).numel()].view(shape))

    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    for name, content in tokenizer_files().items():
        (place / name).write_bytes(content)
    write_folder(place, {name: lazy(t.shape) for name, t in stored_tensors(model).items()})
    return sum(sizes.values()), sum(n for name, n in sizes.items() if name.startswith("layers.0."))


def compiled(tmp_path: Path, memory: int, stages: str) -> tuple[int, str]:
    """Bytes that a run needs over start-up, and what was said of its exports."""
    pieces = (f"def f{i}(first, second):\n    return first + {i} * second\n" for i in range(400))
    (tmp_path / "code.txt").write_text("\n\n".join(pieces))
    recipe = tmp_path / "large.effc"
    recipe.write_text(f"""effc 1
recipe large "Larger than memory"
model base = load("{tmp_path}/model")
data  code = text("{tmp_path}/code.txt", seq = 64)
{stages}
""")
    script = Path(__file__).with_name("larger.py")
    command = [sys.executable, str(script), str(recipe), str(tmp_path / "store"), str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after, *said = done.stdout.split()
    return int(after) - int(before), " ".join(said)


def test_memory_follows_the_layers(tmp_path: Path) -> None:
    size, layer = folder(tmp_path / "model", layers=14, width=768)
    needed, said = compiled(
        tmp_path,
        size // 3,
        f"""thin  = prune.magnitude(base, sparsity = 50%)
small = quantize.rtn(thin, bits = 4, group = 64)
export small as artifact("{tmp_path}/small.effc")""",
    )
    assert size > 200 * MB
    assert needed <= 2 * layer + 120 * MB < size * 0.75
    assert "too_large" in said
