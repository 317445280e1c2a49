"""Merge three fine-tunes by `effc compile`, against a plain numpy program, and mergekit where it is at hand.

    python benchmarks/merge.py [--model m110|m400] [--runs 3] [--work DIR] [--mergekit PYTHON]

Makes random llama folders in bfloat16, then runs every job as a command of its own, alternating: the floor
(read three models, add them in numpy, write one; in pieces, and holding all inputs), effc on models of no
size (its start-up), effc and mergekit by each method. Medians; seconds, processor seconds and resident memory
are those of the whole process tree. Ratios are to the floor in pieces, without start-up. `--mergekit` is the
python of an environment that has it, `--work` a folder to keep the models in. Prints a table last and writes
JSON to out/bench.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SHAPES = {
    "none": {"layers": 1, "width": 64, "hidden": 64, "heads": 2, "vocab": 64, "tied": False},
    "m110": {"layers": 12, "width": 768, "hidden": 2048, "heads": 12, "vocab": 32000, "tied": True},
    "m400": {"layers": 24, "width": 1024, "hidden": 2816, "heads": 16, "vocab": 32000, "tied": False},
}
CALLS = {
    "linear": "merge.linear([a, b, c])",
    "slerp": "merge.slerp([a, b])",
    "task_arithmetic": "merge.task_arithmetic([b, c], base = a, lambda = 0.5)",
    "dare_ties": "merge.dare_ties([b, c], base = a, density = 50%)",
    "ties": "merge.ties([b, c], base = a, density = 20%, scope = tensor)",
}
LIMITS = {
    "linear": (1.5, 2),
    "slerp": (1.5, 2),
    "task_arithmetic": (1.5, 2),
    "dare_ties": (3.0, 5),
    "ties": (3.0, 8),
}
"""Seconds over start-up allowed, as a multiple of the floor; how many times faster than mergekit at least."""
PIECE = 1 << 20
"""Numbers that the floor works on at once."""
MEMORY = 1000
"""Megabytes of resident memory allowed."""

Found = dict[str, float]


def make(folder: Path, shape: Mapping[str, int], seed: int, base: Path | None) -> None:
    """A random checkpoint, or one that moved a little from `base`."""
    import torch
    from safetensors.torch import load_file, save_file

    width, hidden, vocab = shape["width"], shape["hidden"], shape["vocab"]
    sizes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for i in range(shape["layers"]):
        at = f"model.layers.{i}"
        sizes |= {f"{at}.self_attn.{x}_proj.weight": (width, width) for x in "qkvo"}
        sizes |= {f"{at}.mlp.{x}_proj.weight": (hidden, width) for x in ("gate", "up")}
        sizes |= {f"{at}.mlp.down_proj.weight": (width, hidden), f"{at}.input_layernorm.weight": (width,)}
        sizes |= {f"{at}.post_attention_layernorm.weight": (width,)}
    if not shape["tied"]:
        sizes["lm_head.weight"] = (vocab, width)
    dice = torch.Generator().manual_seed(seed)
    old = load_file(base / "model.safetensors") if base else {}
    tensors = {}
    for name, size in sizes.items():
        noise = torch.randn(size, generator=dice) * (0.002 if base else 0.02)
        tensors[name] = (noise + old[name].float() if base else noise).to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": bool(shape["tied"]),
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def family(work: Path, model: str) -> list[Path]:
    """Three folders, made unless they are there."""
    folders = [work / f"{model}-{name}" for name in "abc"]
    for seed, folder in enumerate(folders):
        if not (folder / "config.json").is_file():
            make(folder, SHAPES[model], seed, folders[0] if seed else None)
    return folders


def floor(way: str, out: Path, folders: Sequence[Path]) -> None:
    """Read, add in float32, write: "whole" holds all inputs, "pieces" reads into one small buffer."""
    import numpy as np

    files = [os.open(folder / "model.safetensors", os.O_RDONLY) for folder in folders]
    held = [np.fromfile(folder / "model.safetensors", np.uint16) for folder in folders if way == "whole"]
    room, bits, total = np.empty(PIECE, np.uint16), np.empty(PIECE, np.uint32), np.empty(PIECE, np.float32)
    numbers = os.fstat(files[0]).st_size // 2
    with open(out / "sum.bin", "wb", buffering=0) as merged:
        for start in range(0, numbers, PIECE):
            size = min(PIECE, numbers - start)
            total.fill(0)
            for number, file in enumerate(files):
                if not held:
                    os.preadv(file, [room[:size].data.cast("B")], 2 * start)
                np.copyto(bits[:size], held[number][start : start + size] if held else room[:size])
                bits <<= 16
                total[:size] += bits.view(np.float32)[:size]
            np.copyto(room, total.view(np.uint32) >> 16, casting="unsafe")
            merged.write(room[:size].data.cast("B"))


def effc(job: str, folders: Sequence[Path], out: Path) -> list[str]:
    """The command that merges the folders to `out`/merged."""
    loads = [f'model {name} = load("{folder}")' for name, folder in zip("abc", folders, strict=True)]
    loads = loads[:2] if job == "slerp" else loads
    lines = ["effc 1", f"recipe {job}", *loads, f"m = {CALLS[job]}", f'export m as hf("{out}/merged")']
    (out / "recipe.effc").write_text("\n".join(lines) + "\n")
    verb = ["compile", str(out / "recipe.effc"), "--store", str(out / "store"), "--quiet", "--json"]
    return [sys.executable, "-m", "effc", *verb]


def mergekit(python: str, job: str, folders: Sequence[Path], out: Path) -> list[str]:
    """The same by mergekit, with the same arguments; without a tokenizer, which the folders lack."""
    weight = {"linear": 1.0, "task_arithmetic": 0.5}.get(job, 1.0)
    settings: dict[str, Any] = {"weight": weight}
    if job in ("ties", "dare_ties"):
        settings["density"] = 0.2 if job == "ties" else 0.5
    used = folders if job == "linear" else folders[:2] if job == "slerp" else folders[1:]
    config: dict[str, Any] = {
        "merge_method": job,
        "models": [{"model": str(folder), "parameters": settings} for folder in used],
        "dtype": "bfloat16",
    }
    if job == "slerp":
        config["parameters"] = {"t": 0.5}
    if job != "linear":
        config["base_model"] = str(folders[0])
    (out / "config.yml").write_text(json.dumps(config))
    tool = Path(python).with_name("mergekit-yaml")
    return [str(tool), str(out / "config.yml"), str(out / "merged"), "--no-copy-tokenizer"]


def watched(command: Sequence[str]) -> tuple[Found, str]:
    """Run a command, with its bytecode kept as where it is installed; what it took, and what it printed."""
    installed = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as wrong:
        child = subprocess.Popen(command, stdout=said, stderr=wrong, env=installed)
        while True:
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, resident(child.pid), highest(child.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        wrong.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)}\n{wrong.read()}")
        return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak_mb": peak / 1e6}, said.read()


def resident(pid: int) -> int:
    """Bytes that a process and its children hold now."""
    try:
        held = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return held + sum(resident(int(child)) for child in children)


def highest(pid: int) -> int:
    """The most bytes that a process has held; the system's own count of a child starts with its parent's."""
    try:
        said = Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2]
    except OSError:
        return 0
    return 1024 * int(said.split()[0]) if said else 0


def run(job: str, python: str | None, folders: Sequence[Path], none: Sequence[Path], work: Path) -> Found:
    """One run of one job, in a folder of its own."""
    out = Path(tempfile.mkdtemp(dir=work))
    try:
        tool, _, method = job.partition(" ")
        if tool == "floor":
            found, said = watched([sys.executable, __file__, "--floor", method, str(out), *map(str, folders)])
            seconds, cpu = map(float, said.split())
            return found | {"seconds": seconds, "cpu": cpu}
        if tool == "mergekit":
            assert python is not None
            return watched(mergekit(python, method, folders, out))[0]
        found, said = watched(effc(method or "linear", folders if method else none, out))
        record = json.loads(said)
        stages = {stage["name"]: stage["seconds"] for stage in record["stages"]}
        split = {"load": sum(s for n, s in stages.items() if n != "m"), "merge": stages["m"]}
        return found | split | {"export": sum(export["seconds"] for export in record["exports"])}
    finally:
        shutil.rmtree(out)


def report(model: str, found: Mapping[str, Sequence[Found]]) -> None:
    """The table, and the JSON beside it."""
    middle = {
        job: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for job, runs in found.items()
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    out = Path("out/bench")
    out.mkdir(parents=True, exist_ok=True)
    record = {"model": model, "machine": machine, "medians": middle, "runs": found}
    (out / f"merge-{model}.json").write_text(json.dumps(record, indent=1))
    base, start = middle["floor pieces"], middle["start-up"]
    print(f"merging three {model} in bfloat16 ({machine}); x floor is without start-up")
    print(f"{'job':<25}{'seconds':>8}{'cpu':>7}{'x floor':>9}{'of cpu':>8}{'peak MB':>9}  {'allowed'}")
    for job, row in middle.items():
        tool, _, method = job.partition(" ")
        ratio = {key: (row[key] - start[key] * (tool == "effc")) / base[key] for key in ("seconds", "cpu")}
        times = f"{row['seconds']:>8.2f}{row['cpu']:>7.2f}{ratio['seconds']:>9.2f}{ratio['cpu']:>8.2f}"
        print(f"{job:<25}{times}{row['peak_mb']:>9.0f}  {allowed(tool, method, middle)}")


def allowed(tool: str, method: str, middle: Mapping[str, Found]) -> str:
    """What a job of effc must reach, and how it stands to mergekit."""
    if tool != "effc":
        return ""
    most, least = LIMITS[method]
    words = f"{most} x floor, {MEMORY} MB"
    if (peer := middle.get(f"mergekit {method}")) is None:
        return words
    row = middle[f"effc {method}"]
    times = [f"{peer[key] / row[key]:.1f}" for key in ("seconds", "cpu")]
    return f"{words}; {times[0]} times as fast as mergekit ({times[1]} by cpu), at least {least}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("m110", "m400"), default="m400")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", default=",".join(CALLS), help="methods, with commas")
    parser.add_argument("--work", type=Path, help="keep the models in this folder")
    parser.add_argument("--mergekit", metavar="PYTHON")
    parser.add_argument("--floor", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.floor:
        import numpy  # noqa: F401  start-up is no part of the floor

        start, begun = time.perf_counter(), time.process_time()
        way, out, *folders = options.floor
        floor(way, Path(out), [Path(folder) for folder in folders])
        print(time.perf_counter() - start, time.process_time() - begun)
        return
    tools = ["effc", "mergekit"] if options.mergekit else ["effc"]
    jobs = [
        "floor pieces",
        "floor whole",
        "start-up",
        *(f"{tool} {job}" for job in options.jobs.split(",") for tool in tools),
    ]
    found: dict[str, list[Found]] = {job: [] for job in jobs}
    with tempfile.TemporaryDirectory(prefix="effc-bench-merge-") as place:
        work = (options.work or Path(place)).resolve()
        folders, none = family(work, options.model), family(work, "none")
        for _ in range(options.runs):
            for job in jobs:
                found[job].append(run(job, options.mergekit, folders, none, work))
    report(options.model, found)


if __name__ == "__main__":
    main()
