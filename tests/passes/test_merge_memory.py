"""A merge needs memory for its pieces, not for its models."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from effc.compiler.architecture import architecture
from effc.compiler.checkpoint_write import SafetensorsWriter
from effc.compiler.importer import build
from effc.compiler.places import places
from tests.claims import Measured

MEASURE = """
import sys
from pathlib import Path
from effc.compiler.importer import import_folder
from effc.compiler.method import Context
from effc.passes.merge.dare_ties import DareTies
from effc.passes.merge.linear import Linear
from effc.passes.merge.slerp import Slerp
from effc.passes.merge.task_arithmetic import TaskArithmetic
from effc.passes.merge.ties import Ties
from effc.runtime.merge import merge
from effc.specs.recipe import Ref


def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


models = [import_folder(Path(sys.argv[1])) for _ in range(3)]
before = peak()
out, base = Path(sys.argv[2]), Ref("base")
merge(Linear(), models, Context(workdir=out))
merge(Slerp(), models[1:], Context(workdir=out))
ties = Ties(base=base), Ties(base=base, scope="tensor")
for method in (*ties, TaskArithmetic(base=base), DareTies(base=base)):
    merge(method, models[1:], Context(workdir=out, models={"base": models[0]}))
print(before, peak())
"""

LARGE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_models(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    family = architecture("llama")
    model = build(family, LARGE, torch.bfloat16)
    tensors = model.tensors()
    layout = {p.name: (tuple(tensors[n].shape), tensors[n].dtype) for n, p in places(family, model).items()}
    with SafetensorsWriter(folder / "model.safetensors", layout) as file:
        for name, (shape, dtype) in layout.items():
            file.put(name, torch.full(shape, 0.5, dtype=dtype))
    (folder / "config.json").write_text(json.dumps(LARGE))
    stored = (folder / "model.safetensors").stat().st_size / 1e6
    out = tmp_path / "out"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(out)], capture_output=True, text=True, check=True
    )
    before, peak = map(float, done.stdout.split())
    assert stored > 80
    assert peak - before < 64
    assert peak < (3 + 2) * 64 + 400


@pytest.fixture(scope="module")
def bench() -> Any:
    """The benchmark of merges, which makes models and watches commands."""
    file = Path(__file__).parents[2] / "benchmarks/merge.py"
    spec = importlib.util.spec_from_file_location("bench_merge", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    found: list[Path] = bench.family(tmp_path_factory.mktemp("m400"), "m400")
    return found


@pytest.mark.claim
@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "dare_ties", "ties"])
def test_merging_three_large_models_needs_little_memory(
    method: str, bench: Any, folders: list[Path], tmp_path: Path, measured: Measured
) -> None:
    found, _ = bench.watched(bench.effc(method, folders, tmp_path))
    inputs = 2 if method == "slerp" else 3
    claim = "compiling a merge of three 400M models stays below (inputs + 2) x 64 MB + 400 MB, in MB"
    measured(f"merge.{method}", claim, found["peak_mb"], below=(inputs + 2) * 64 + 400)
