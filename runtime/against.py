"""`effc bench --against transformers`: the same weights, dense, as a user would run them otherwise.

A child process loads a folder that is written for it and waits; runs of it and of the model here alternate,
so that whatever else the machine does disturbs both alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effc.compiler.exporter import inexpressible
from effc.compiler.model import Model
from effc.runtime.bench import prompts, timed
from effc.runtime.choice import Choice
from effc.runtime.consumer import need
from effc.runtime.exports.hf import Hf
from effc.specs.diagnostic import Diagnostic, EffcError

DTYPES = ("float32", "bfloat16")
RUNS = 5


def against(
    model: Model, prompt_tokens: int, new_tokens: int, batch: int, choice: Choice, runs: int = RUNS
) -> dict[str, Any]:
    """Medians of alternating runs: seconds of the first token and of a step, here and in transformers.

    Raises:
        EffcError: E550 without transformers, E553 for a model that it cannot express.
    """
    need("transformers")
    if why := inexpressible(model, dense=True):
        raise EffcError(Diagnostic("E553", "transformers cannot express this model", notes=tuple(why)))
    ids = prompts(model, prompt_tokens, batch)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("effc", *DTYPES)}
    with tempfile.TemporaryDirectory(prefix="effc-against-") as work:
        folder = Path(work) / "dense"
        Hf(path=str(folder), dense=True).write(model, folder)
        children = {dtype: _Child(folder, dtype) for dtype in DTYPES}
        try:
            for run in range(runs + 1):
                pairs = {"effc": timed(model, ids, new_tokens, choice)}
                pairs |= {dtype: child.timed(ids, new_tokens) for dtype, child in children.items()}
                for name, pair in pairs.items():
                    if run:  # the first run warms up
                        found[name].append(pair)
        finally:
            for child in children.values():
                child.end()
        versions = {child.version for child in children.values()}
    rows = {name: [statistics.median(column) for column in zip(*f, strict=True)] for name, f in found.items()}
    return {
        "peer": versions.pop(),
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "first_token_seconds": {name: row[0] for name, row in rows.items()},
        "step_seconds": {name: row[1] for name, row in rows.items()},
        "prefill_ratio": {name: rows[name][0] / rows["effc"][0] for name in DTYPES},
        "decode_ratio": {name: rows[name][1] / rows["effc"][1] for name in DTYPES},
    }


def against_text(record: dict[str, Any]) -> str:
    """A short table; ratios say how many times faster effc is."""
    lines = [f"{'':<26}{'first token':>14}{'a step':>12}{'effc is faster by':>24}"]
    for name, first in record["first_token_seconds"].items():
        step, what = record["step_seconds"][name], "effc" if name == "effc" else f"{record['peer']} {name}"
        ratios = ""
        if name != "effc":
            ratios = f"{record['prefill_ratio'][name]:.2f}x, {record['decode_ratio'][name]:.2f}x"
        lines.append(f"{what:<26}{1e3 * first:>11.1f} ms{1e3 * step:>9.2f} ms{ratios:>24}".rstrip())
    return "\n".join(lines)


class _Child:
    """transformers in a process of its own, which dies with this one."""

    def __init__(self, folder: Path, dtype: str) -> None:
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        job = [str(folder), dtype, str(torch.get_num_threads()), str(os.getpid())]
        self.log = (folder.parent / f"{dtype}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "effc.runtime.against", *job],
            cwd=folder.parent, env={**os.environ, **quiet}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        self.version = str(self._answer())

    def timed(self, ids: Tensor, new_tokens: int) -> tuple[float, float]:
        assert self.process.stdin is not None
        print(json.dumps([ids.tolist(), new_tokens]), file=self.process.stdin, flush=True)
        first, step = self._answer()
        return first, step

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@ "):
                return json.loads(line[2:])
        self.process.wait()
        self.log.seek(0)
        words = tuple(self.log.read().strip().splitlines()[-3:])
        raise EffcError(Diagnostic("E551", "`transformers` does not run the model", notes=words))


# ---- the child ----


def _main(folder: str, dtype: str, threads: str, parent: str) -> None:
    threading.Thread(target=_die_with, args=(int(parent),), daemon=True).start()
    import transformers

    torch.set_num_threads(int(threads))
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    print("@", json.dumps(f"transformers {transformers.__version__}"), flush=True)
    for line in sys.stdin:
        ids, new = json.loads(line)
        print("@", json.dumps(_timed(model, torch.tensor(ids), new)), flush=True)


@torch.inference_mode()
def _timed(model: Any, ids: Tensor, new: int) -> tuple[float, float]:
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1)
    read = time.perf_counter()
    for _ in range(new):
        out = model(input_ids=token[:, None], past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1].argmax(-1)
    return read - start, (time.perf_counter() - read) / max(1, new)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
