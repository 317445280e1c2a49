"""Generate on this processor: effc's C program against what a user would pick instead.

    python benchmarks/decode.py [--models m110 m400 zoo:pylm] [--threads 1 2] [--runs 5] [--work DIR]
                                [--peers effc transformers torchao ...] [--only NAME ...] [--fresh]
                                [--torchao PYTHON] [--bitsandbytes PYTHON] [--hqq PYTHON] [--quanto PYTHON]
                                [--llama-cpp PYTHON]

Each contender is a process that loads the model once and waits; runs alternate between them, and reading
memory takes its turn. Measured: a token of one sequence behind a prompt of 64, of eight sequences, and
reading a prompt of 512; on zoo:pylm the loss on held-out text too, token by token. Medians; ratios are to
transformers in float32, which takes part in every run. The share of the read rate counts every byte of
weights that a token needs; bits are those bytes over the weights they stand for. Each option names the
python of an environment that has the peer; a peer that no python has is a row `not installed`. llama.cpp
reads GGUF files that effc writes of the same weights.

What is measured joins the rows of earlier runs on this machine in out/bench/decode.json (--fresh begins
anew), so models and peers can be measured in parts. Prints the table of all rows last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from merge import SHAPES, make

CONTENDER = Path(__file__).parent / "decoding" / "contender.py"
OURS = ("effc:4", "effc:4g32", "effc:8", "effc:bfloat16", "effc:float32")
TRANSFORMERS = ("transformers:float32", "transformers:bfloat16", "transformers:int8")
PEERS = {
    "torchao": ("torchao:int8", "torchao:int4", "torchao:dynamic8"),
    "bitsandbytes": ("bitsandbytes:nf4", "bitsandbytes:llm8"),
    "hqq": ("hqq:4",),
    "quanto": ("quanto:qint8",),
    "llama_cpp": ("llama.cpp:q4_0", "llama.cpp:q8_0", "llama.cpp:q4_0-plain", "llama.cpp:q8_0-plain"),
}
MODULES = {
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
    "quanto": "optimum",
    "llama_cpp": "llama_cpp",
}
"""Peer -> the module that shows whether this python has it."""
BASE = "transformers:float32"
HELD = (128, 192)
"""Sequences and tokens of held-out text; with fewer, grids of 4 bits differ by less than the text does."""
JOBS = {"decode": (1, 64, 24), "batch 8": (8, 64, 8), "prefill": (1, 512, 0)}
"""Name -> (sequences, tokens of prompt, new tokens)."""
TARGETS = {
    ("zoo:pylm", "effc:4"): 10.0,
    ("zoo:pylm", "effc:8"): 10.0,
    ("", "effc:4"): 5.0,
    ("", "effc:8"): 3.5,
}
"""Decoding speed as a multiple of transformers in float32."""
SHARES = {"effc:4": 0.55, "effc:4g32": 0.55, "effc:8": 0.60}
"""Of the measured read rate."""


class Contender:
    """A waiting process; `problem` says why there is none."""

    def __init__(self, python: str, name: str, folder: str, threads: int) -> None:
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
        self.name, self.problem, self.log = name, "", tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(CONTENDER), name, folder, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, **quiet},
        )  # fmt: skip
        self.about = self.answer()
        self.found: dict[str, list[dict[str, float]]] = {job: [] for job in JOBS}

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@ "):
                return dict(json.loads(line[2:]))
        self.process.wait()
        self.log.seek(0)
        words = self.log.read().strip().splitlines()
        self.problem = words[-1][:160] if words else f"ended with {self.process.returncode}"
        return {}

    def run(self, job: str, keep: bool) -> None:
        if (found := self.ask(*JOBS[job])) and keep:
            self.found[job].append(found)

    def ask(self, *words: object) -> dict[str, Any]:
        """What it answers to a line; nothing once it has a problem."""
        if self.problem:
            return {}
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            print(*words, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()

    def median(self, job: str, what: str) -> float | None:
        found = [run[what] for run in self.found[job]]
        return statistics.median(found) if found else None


def folder_of(model: str, work: Path) -> Path:
    """A folder of the model as transformers reads it, with GGUF files beside it where they can be written."""
    from effc.runtime.data.corpus import Corpus
    from effc.runtime.exports.gguf import Gguf
    from effc.runtime.exports.hf import Hf
    from effc.runtime.load import load

    folder = work / model.replace(":", "-")
    if not (folder / "config.json").is_file():
        if model in SHAPES:
            make(folder, SHAPES[model], 0, None)
            (folder / "tokenizer.json").write_text(json.dumps(tokenizer(SHAPES[model]["vocab"])))
        else:
            found = load(model).materialize()
            Hf(path=str(folder)).write(found, folder)
    if model not in SHAPES:
        held = folder.with_name(f"{folder.name}.held.json")
        if not held.is_file() or len(json.loads(held.read_text())) != HELD[0]:
            files = dict(getattr(load(model).tokenizer, "files", {}))
            data = Corpus(name="python-stdlib", seq=HELD[1]).open(files)
            held.write_text(json.dumps(data.batch("heldout", range(HELD[0])).ids.tolist()))
    for kind in ("q4_0", "q8_0"):
        file = folder.with_name(f"{folder.name}.{kind}.gguf")
        if not file.is_file():
            aside = file.with_suffix(".part")
            Gguf.model_validate({"path": str(file), "type": kind}).write(load(folder), aside)
            aside.rename(file)
    return folder


def tokenizer(vocab: int) -> dict[str, Any]:
    """A byte-level tokenizer of so many tokens: bytes and pairs of them."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [(a, b) for a in letters for b in letters][: vocab - len(letters)]
    tokens = [*letters, *(a + b for a, b in merges)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges},
    }


def weights_of(folder: Path) -> int:
    """Weights that a token reads: of all linear layers, of a table of tokens only where it is the head's."""
    from effc.runtime.load import load

    model = load(folder)
    return sum(t.numel() for name, t in model.tensors().items() if t.ndim == 2 and not _table(model, name))


def _table(model: Any, name: str) -> bool:
    """Whether a matrix is looked up and nothing else."""
    return name.startswith("embedding") and name not in model.ties().values()


def measured(
    model: str, folder: Path, threads: int, names: dict[str, str | None], runs: int
) -> list[dict[str, Any]]:
    """One row a contender; `names`: contender -> python, None where no python has it."""
    from effc.runtime.bandwidth import read_rate

    start = {"model": model, "threads": threads}
    rows: list[dict[str, Any]] = [
        start | {"name": name, "problem": "not installed"} for name, python in names.items() if python is None
    ]
    contenders = [Contender(python, name, str(folder), threads) for name, python in names.items() if python]
    rates = []
    for run in range(runs + 1):
        rates.append(read_rate(threads=threads, runs=1))
        for job in JOBS:
            for contender in contenders:
                contender.run(job, keep=run > 0)
        print(f"{model}, {threads} threads: run {run} of {runs}", file=sys.stderr)
    rate, weights = statistics.median(rates), weights_of(folder)
    losses = {c.name: c.ask("loss") for c in contenders} if model not in SHAPES else {}
    for contender in contenders:
        contender.end()
    base = next(c for c in contenders if c.name == BASE)
    for c in contenders:
        row: dict[str, Any] = start | {"name": c.name, **c.about, **losses.get(c.name, {})}
        if c.problem:
            rows.append(row | {"problem": c.problem})
            continue
        for job, (_, _, new) in JOBS.items():
            row[job] = c.median(job, "step" if new else "prefill")
        row["work"], row["read_rate"] = c.median("decode", "work"), rate
        for job in JOBS:
            first, mine = base.median(job, "step" if JOBS[job][2] else "prefill"), row[job]
            row[f"{job} ratio"] = first / mine if first and mine else None
        first = base.median("decode", "work")
        row["work ratio"] = first / row["work"] if first and row["work"] else None
        if "bytes" in c.about and row["decode"]:
            row["share"] = c.about["bytes"] / row["decode"] / rate
            row["bits"] = 8 * c.about["bytes"] / weights
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios to transformers in float32: above 1 is faster."""
    heads = (
        "model",
        "threads",
        "contender",
        "ms a token",
        "decode",
        "by work",
        "batch 8",
        "prefill",
        "share",
        "bits",
        "loss",
    )
    lines = [heads]
    for row in rows:
        start = (row["model"], str(row["threads"]), row["name"])
        if "problem" in row:
            lines.append((*start, row["problem"][:60], *[""] * 7))
            continue
        keys = ("decode ratio", "work ratio", "batch 8 ratio", "prefill ratio")
        ratios = ("" if row[key] is None else f"{row[key]:.2f}x" for key in keys)
        share = f"{row['share']:.0%}" if "share" in row else ""
        bits = f"{row['bits']:.2f}" if "bits" in row else ""
        loss = f"{row['loss']:.4f}" if "loss" in row else ""
        lines.append((*start, f"{1e3 * row['decode']:.2f}", *ratios, share, bits, loss))
    widths = [max(len(line[i]) for line in lines if len(line[3]) < 20 or i < 3) for i in range(len(heads))]
    return "\n".join(
        "  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was aimed at, and what was reached."""
    said = []
    for row in rows:
        if "problem" in row:
            continue
        due = TARGETS.get((row["model"], row["name"]), TARGETS.get(("", row["name"])))
        if due is None or row["threads"] != max(r["threads"] for r in rows) or not row.get("decode ratio"):
            continue
        got, share = row["decode ratio"], row["share"]
        words = f"{row['model']} {row['name']}: {got:.1f}x of at least {due:g}x"
        if row["model"] in SHAPES:
            words += f", {share:.0%} of the read rate of at least {SHARES[row['name']]:.0%}"
        said.append(words)
    return said


def machine() -> str:
    """The processor by its own name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def earlier(place: Path) -> list[dict[str, Any]]:
    """The rows of earlier runs on this machine."""
    if not place.is_file():
        return []
    record = json.loads(place.read_text(encoding="utf-8"))
    return list(record["rows"]) if record["machine"] == machine() else []


def joined(rows: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows in the place of those of the same model, threads and contender, by model and threads."""
    found = {(r["model"], r["threads"], r["name"]): r for r in (*rows, *new)}
    order = [*OURS, *TRANSFORMERS, *(name for names in PEERS.values() for name in names)]
    return sorted(found.values(), key=lambda r: (r["model"], r["threads"], order.index(r["name"])))


def write(place: Path, rows: Sequence[dict[str, Any]], runs: int) -> None:
    """What has been measured so far."""
    place.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"machine": machine(), "date": date, "runs": runs, "rows": rows}
    place.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def pythons(options: argparse.Namespace) -> dict[str, str | None]:
    """Contender -> the python that has it, of those that were asked for; None where none has it."""
    names: dict[str, str | None] = {BASE: sys.executable}
    wanted = options.peers or ["effc", "transformers", *PEERS]
    for peer, settings in {"effc": OURS, "transformers": TRANSFORMERS, **PEERS}.items():
        python = getattr(options, peer, None)
        if python is None and (peer not in MODULES or find_spec(MODULES[peer]) is not None):
            python = sys.executable
        if peer in wanted:
            names |= dict.fromkeys(settings, python)
    return {n: p for n, p in names.items() if not options.only or n in {*options.only, BASE}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["m110", "m400", "zoo:pylm"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None)
    for peer in PEERS:
        parser.add_argument(f"--{peer.replace('_', '-')}", metavar="PYTHON", default=None)
    parser.add_argument("--peers", nargs="+", choices=("effc", "transformers", *PEERS), help="all by default")
    parser.add_argument("--only", nargs="+", help="contenders, by name")
    parser.add_argument("--fresh", action="store_true", help="forget rows of earlier runs")
    options = parser.parse_args()
    names = pythons(options)
    place = Path("out/bench/decode.json")
    rows = [] if options.fresh else earlier(place)
    with tempfile.TemporaryDirectory() as aside:
        work = options.work or Path(aside)
        work.mkdir(parents=True, exist_ok=True)
        for model in options.models:
            folder = folder_of(model, work)
            for threads in options.threads:
                rows = joined(rows, measured(model, folder, threads, names, options.runs))
                write(place, rows, options.runs)
    print(f"{machine()}; medians of {options.runs} alternated runs; written to {place}")
    print(table(rows))
    print("\n".join(verdicts(rows)))


if __name__ == "__main__":
    main()
