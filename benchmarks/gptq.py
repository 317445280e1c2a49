"""Quantize a model by GPTQ on this processor: effc against llm-compressor.

    python benchmarks/gptq.py [--model m110|m400] [--runs 1] [--samples 64] [--seq 512]
                              [--llmcompressor PYTHON]

Makes a random llama folder in bfloat16 and random tokens, so that both see the same; four bits, groups of
128, symmetric. Measured: the stage alone (weights on disk to packed weights), without imports, and the
relative error of what the first MLP gives and of what enters the head against the dense model, on fresh
tokens. llm-compressor needs an environment of its own, whose python `--llmcompressor` names; it works in
float32. Prints a table last and writes JSON to out/bench.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from decode import machine, tokenizer
from merge import SHAPES, make

GROUP = 128
LIMIT = 2.0
"""Times as fast as llm-compressor, at least."""
CONTENDERS = ("effc:gptq", "effc:rtn")


def ids_of(count: int, length: int, seed: int) -> Any:
    """Random ids [count, length]; the tokens of a byte-level tokenizer's letters and their pairs."""
    import torch

    return torch.randint(0, 4096, (count, length), generator=torch.Generator().manual_seed(seed))


class Given:
    """The ids as data that is open: packed sequences, no padding."""

    def __init__(self, ids: Any, model: Any) -> None:
        self.ids, self.model, self.fingerprint, self.vocabulary = ids, model, "random", None

    def size(self, split: str) -> int:
        return len(self.ids)

    def tokens(self, split: str) -> int:
        return int(self.ids.numel())

    def batch(self, split: str, rows: Any) -> Any:
        from effc.compiler.method import Batch

        ids = self.ids[list(rows)]
        return Batch(ids, ids, self.model.step(ids))


def by_effc(folder: str, how: str, options: argparse.Namespace) -> dict[str, float]:
    from effc.compiler.method import Context
    from effc.passes.quantize.gptq import GPTQ
    from effc.passes.quantize.rtn import RTN
    from effc.runtime.load import load
    from effc.runtime.stage import run_stage
    from effc.specs.recipe import Ref

    model = load(folder)
    grid = {"bits": 4, "group": GROUP, "scheme": "symmetric"}
    data = Given(ids_of(options.samples, options.seq, 0), model)
    method: Any = RTN.model_validate(grid)
    if how == "gptq":
        method = GPTQ.model_validate(grid | {"data": Ref("data"), "samples": options.samples})
    start = time.perf_counter()
    out = run_stage(method, [model], Context(data={"data": data})).model.materialize()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    fresh = ids_of(4, options.seq, 1)
    before = states(load(folder).materialize(), fresh)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(states(out, fresh), before, strict=True)]
    return {"seconds": seconds, "peak_mb": peak, "first": errors[0], "last": errors[-1]}


def states(model: Any, ids: Any) -> list[Any]:
    """What the first layer's MLP adds to its input, and what enters the head."""
    import torch

    kept: dict[str, Any] = {}
    watched = {"layers.0.mlp": "first", "norm": "last"}
    handles = [
        model.module(path).register_forward_hook(
            lambda _, __, out, key=key: kept.__setitem__(key, out.float())
        )
        for path, key in watched.items()
    ]
    with torch.inference_mode():
        model(ids, step=model.step(ids))
    for handle in handles:
        handle.remove()
    return [kept["first"], kept["last"]]


def by_llmcompressor(folder: str, options: argparse.Namespace) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = ids_of(options.samples, options.seq, 0)
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    fresh = ids_of(4, options.seq, 1)
    before = peer_states(model, fresh)
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=options.seq,
        num_calibration_samples=options.samples,
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    after = peer_states(model, fresh)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(after, before, strict=True)]
    return {"seconds": seconds, "peak_mb": peak, "first": errors[0], "last": errors[-1]}


def peer_states(model: Any, ids: Any) -> list[Any]:
    import torch

    kept: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, key=key: kept.__setitem__(key, out.float().clone()))
        for module, key in ((model.model.layers[0].mlp, "first"), (model.model.norm, "last"))
    ]
    with torch.inference_mode():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return [kept["first"], kept["last"]]


def work(name: str, folder: str, options: argparse.Namespace) -> None:
    tool, _, how = name.partition(":")
    found = by_effc(folder, how, options) if tool == "effc" else by_llmcompressor(folder, options)
    print(json.dumps(found))


def run(python: str, name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    line = [python, __file__, "--work", name, str(folder), "--samples", str(options.samples)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*line, "--seq", str(options.seq)], capture_output=True, text=True, env={**os.environ, **quiet}
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("m110", "m400"), default="m110")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options)
        return
    names = dict.fromkeys(CONTENDERS, sys.executable)
    if options.llmcompressor:
        names["llmcompressor"] = options.llmcompressor
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="effc-bench-gptq-") as place:
        folder = Path(place) / options.model
        make(folder, SHAPES[options.model], 0, None)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer(SHAPES[options.model]["vocab"])))
        for _ in range(options.runs):
            for name, python in names.items():
                found[name].append(run(python, name, folder, options))
    rows = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    out = Path("out/bench")
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "model": options.model, "rows": rows, "runs": found}
    (out / "gptq.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{options.model}, four bits, {options.samples} x {options.seq} tokens; {machine()}")
    print(f"{'contender':<16}{'seconds':>9}{'peak MB':>9}{'first MLP':>11}{'last state':>12}")
    for name, row in rows.items():
        print(
            f"{name:<16}{row['seconds']:>9.1f}{row['peak_mb']:>9.0f}{row['first']:>11.4f}{row['last']:>12.4f}"
        )
    if peer := rows.get("llmcompressor"):
        times = peer["seconds"] / rows["effc:gptq"]["seconds"]
        print(f"effc is {times:.1f} times as fast as llm-compressor, of at least {LIMIT:g}")


if __name__ == "__main__":
    main()
