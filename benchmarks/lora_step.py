"""One step of LoRA training on this processor: effc against PEFT.

    python benchmarks/lora_step.py [--model m110|m400] [--steps 6] [--runs 3] [--rank 16] [--peft PYTHON]

Makes a random llama folder in bfloat16; each contender is a process that trains adapters of the same rank on
all linears of the layers with batches of 4 x 256 random tokens (AdamW, gradients clipped, dropout off) and
reports the median time of a step after two to warm up. Runs alternate. effc runs as `adapt.lora` does, in the
precision that it would choose itself and in float32; PEFT in float32 and in bfloat16. Prints a table last and
writes JSON to out/bench.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from decode import machine, tokenizer
from merge import SHAPES, make

BATCH, LENGTH, WARM = 4, 256, 2
CONTENDERS = ("effc:auto", "effc:fp32", "peft:float32", "peft:bfloat16")
LIMIT = 0.6
"""Of PEFT's time, at most."""
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def by_effc(folder: str, precision: str, steps: int, rank: int) -> list[float]:
    """Times between the steps that `adapt.lora` reports."""
    import torch

    from effc.compiler.method import Context
    from effc.passes.adapt.lora import Lora
    from effc.runtime.data.text import Text
    from effc.runtime.fit import fit
    from effc.runtime.load import load
    from effc.specs.recipe import Ref

    model = load(folder)
    with tempfile.TemporaryDirectory() as place:
        dice = torch.Generator().manual_seed(0)
        letters = torch.randint(97, 123, (40 * BATCH * LENGTH,), generator=dice).tolist()
        parts = [bytes(letters[at : at + LENGTH]) for at in range(0, len(letters), LENGTH)]
        (Path(place) / "text.txt").write_bytes(b"\n\n".join(parts))
        data = Text(path=place, seq=LENGTH).open(dict(model.tokenizer.files if model.tokenizer else {}))
        stamps: list[float] = []
        method = Lora.model_validate(
            {"data": Ref("data"), "steps": steps + 1, "batch": BATCH, "rank": rank, "precision": precision}
        )
        told = Context(data={"data": data}, progress=lambda *_: stamps.append(time.perf_counter()))
        fit(method, model, told)
    return [after - before for before, after in itertools.pairwise(stamps)]


def by_peft(folder: str, dtype: str, steps: int, rank: int) -> list[float]:
    """The loop that its documentation shows, with a gradient clip as effc has."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[f"{name}_proj" for name in TARGETS])
    model = get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    dice = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(steps):
        ids = torch.randint(0, 4096, (BATCH, LENGTH), generator=dice)
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def work(name: str, folder: str, steps: int, rank: int) -> None:
    """One contender, in this process: prints what it took."""
    tool, _, how = name.partition(":")
    taken = (by_effc if tool == "effc" else by_peft)(folder, how, steps, rank)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"seconds": statistics.median(taken[WARM:]), "peak_mb": peak}))


def run(python: str, name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    line = [python, __file__, "--work", name, str(folder), "--steps", str(options.steps + WARM)]
    done = subprocess.run(
        [*line, "--rank", str(options.rank)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    best = min(row["seconds"] for name, row in rows.items() if name.startswith("peft"))
    lines = [f"{'contender':<16}{'s a step':>9}{'tokens/s':>10}{'peak MB':>9}  of PEFT's best"]
    for name, row in rows.items():
        rate, share = BATCH * LENGTH / row["seconds"], row["seconds"] / best
        lines.append(f"{name:<16}{row['seconds']:>9.3f}{rate:>10.0f}{row['peak_mb']:>9.0f}  {share:.2f}")
    for ours, theirs in (("effc:auto", "peft:float32"), ("effc:fp32", "peft:float32")):
        share = rows[ours]["seconds"] / rows[theirs]["seconds"]
        lines.append(f"{ours} takes {share:.2f} of the time of {theirs}, {LIMIT} at most allowed")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("m110", "m400"), default="m110")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--peft", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.work:
        work(*options.work, options.steps, options.rank)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="effc-bench-lora-") as place:
        folder = Path(place) / options.model
        make(folder, SHAPES[options.model], 0, None)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer(SHAPES[options.model]["vocab"])))
        for _ in range(options.runs):
            for name in CONTENDERS:
                python = options.peft if name.startswith("peft") else sys.executable
                found[name].append(run(python, name, folder, options))
    rows = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    out = Path("out/bench")
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "model": options.model, "rank": options.rank, "rows": rows, "runs": found}
    (out / "lora_step.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"LoRA rank {options.rank} of {options.model}, {BATCH} x {LENGTH} tokens a step; {machine()}")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
