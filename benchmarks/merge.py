"""Merge speed and memory against reading the inputs, adding them in numpy and writing the output.

    python benchmarks/merge.py [--model m110|m400] [--models 3] [--runs 3]

Makes random llama folders in bfloat16 in a temporary place, runs every job in a process of its own,
alternating, and takes medians. Seconds are without start-up; peak is resident memory of the whole process,
start-up included. The floor holds all inputs in memory and adds them in float32. Prints a table last and
writes JSON to out/bench.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SHAPES = {
    "m110": {"layers": 12, "width": 768, "hidden": 2048, "heads": 12, "tied": True},
    "m400": {"layers": 24, "width": 1024, "hidden": 2816, "heads": 16, "tied": False},
}
JOBS = ("floor", "linear", "slerp", "task_arithmetic", "ties (tensor)", "ties (model)")
LIMITS = {"linear": 1.5, "slerp": 1.5, "task_arithmetic": 1.5, "ties (tensor)": 3.0, "ties (model)": 3.0}
"""Seconds allowed, as a multiple of the floor."""


def make(folder: Path, shape: dict[str, int], seed: int, base: Path | None) -> None:
    """A random checkpoint, or one that moved a little from `base`."""
    import torch
    from safetensors.torch import load_file, save_file

    width, hidden = shape["width"], shape["hidden"]
    sizes = {"model.embed_tokens.weight": (32000, width), "model.norm.weight": (width,)}
    for i in range(shape["layers"]):
        at = f"model.layers.{i}"
        sizes |= {f"{at}.self_attn.{x}_proj.weight": (width, width) for x in "qkvo"}
        sizes |= {f"{at}.mlp.{x}_proj.weight": (hidden, width) for x in ("gate", "up")}
        sizes |= {f"{at}.mlp.down_proj.weight": (width, hidden), f"{at}.input_layernorm.weight": (width,)}
        sizes |= {f"{at}.post_attention_layernorm.weight": (width,)}
    if not shape["tied"]:
        sizes["lm_head.weight"] = (32000, width)
    dice = torch.Generator().manual_seed(seed)
    old = load_file(base / "model.safetensors") if base else {}
    tensors = {}
    for name, size in sizes.items():
        noise = torch.randn(size, generator=dice) * (0.002 if base else 0.02)
        tensors[name] = (noise + old[name].float() if base else noise).to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": shape["tied"],
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def floor(folders: list[Path], out: Path) -> Callable[[], None]:
    import numpy as np

    def run() -> None:
        total = None
        for folder in folders:
            bits = np.fromfile(folder / "model.safetensors", np.uint16).astype(np.uint32)
            bits <<= 16
            numbers = bits.view(np.float32)
            total = numbers if total is None else np.add(total, numbers, out=total)
        assert total is not None
        bits = total.view(np.uint32)
        bits >>= 16
        bits.astype(np.uint16).tofile(out / "sum.bin")

    return run


def effc(job: str, folders: list[Path], out: Path) -> Callable[[], None]:
    from effc.compiler.importer import import_folder
    from effc.compiler.method import Context
    from effc.passes.merge.linear import Linear
    from effc.passes.merge.slerp import Slerp
    from effc.passes.merge.task_arithmetic import TaskArithmetic
    from effc.passes.merge.ties import Ties
    from effc.runtime.merge import merge
    from effc.specs.recipe import Ref

    base = Ref("base")
    method = {
        "linear": lambda: Linear(),
        "slerp": lambda: Slerp(),
        "task_arithmetic": lambda: TaskArithmetic(base=base, lambda_=0.5),
        "ties (tensor)": lambda: Ties(base=base, scope="tensor"),
        "ties (model)": lambda: Ties(base=base, scope="model"),
    }[job]()

    def run() -> None:
        models = [import_folder(folder) for folder in folders]
        if job == "slerp":
            merge(method, models[:2], Context(workdir=out))
        elif job == "linear":
            merge(method, models, Context(workdir=out))
        else:
            merge(method, models[1:], Context(workdir=out, models={"base": models[0]}))

    return run


def peak_kb() -> int:
    """Most resident memory so far; getrusage would count that of the parent before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def child(job: str, folders: list[Path]) -> None:
    with tempfile.TemporaryDirectory(dir=folders[0].parent) as work:
        run = floor(folders, Path(work)) if job == "floor" else effc(job, folders, Path(work))
        before = peak_kb()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        peak = peak_kb()
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1024, "startup_mb": before / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="m110")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], [Path(text) for text in options.child[1:]])
        return
    found: dict[str, list[dict[str, float]]] = {job: [] for job in JOBS}
    with tempfile.TemporaryDirectory(prefix="effc-bench-merge-") as work:
        folders = [Path(work) / f"model{number}" for number in range(options.models)]
        for number, folder in enumerate(folders):
            make(folder, SHAPES[options.model], number, folders[0] if number else None)
        for _ in range(options.runs):
            for job in JOBS:
                command = [sys.executable, __file__, "--child", job, *map(str, folders)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[job].append(json.loads(done.stdout.splitlines()[-1]))
    report(options.model, options.models, found)


def report(model: str, models: int, found: dict[str, list[dict[str, float]]]) -> None:
    middle = {
        job: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for job, runs in found.items()
    }
    base = middle["floor"]["seconds"]
    allowed = (models + 2) * 64 + 400
    out = Path("out/bench")
    out.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"
    record = {"model": model, "models": models, "machine": machine, "medians": middle, "runs": found}
    (out / f"merge-{model}.json").write_text(json.dumps(record, indent=1))
    print(f"merging {models} x {model}, bfloat16 ({machine})")
    print(f"{'job':<17} {'seconds':>8} {'x floor':>8} {'allowed':>8} {'peak MB':>8} {'allowed':>8}")
    for job, row in middle.items():
        limit = f"{LIMITS[job]:.1f}" if job in LIMITS else ""
        memory = f"{allowed}" if job in LIMITS else ""
        ratio = row["seconds"] / base
        print(f"{job:<17} {row['seconds']:>8.2f} {ratio:>8.2f} {limit:>8} {row['peak_mb']:>8.0f} {memory:>8}")


if __name__ == "__main__":
    main()
