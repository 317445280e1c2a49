"""This machine as a target: measured by `effc bench --calibrate`, else estimated from what the system says.

The measured description lies in the user's cache, under the host's processor, so that a shared home directory
serves unlike machines. Rates are lower quartiles of short runs: matrix products, a copy larger than the
caches, a file that is written and synced, and small additions for the price of starting one operation.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from effc.specs import user_cache
from effc.specs.diagnostic import EffcError
from effc.specs.target import Target, named_target, read_target

if TYPE_CHECKING:
    import torch

_IDLE = 330_000_000
_HALF_AND_WHOLE = ("float32", "bfloat16")
_GEMM, _SOLVED, _COPY_BYTES, _FILE_BYTES = 1024, 384, 256 << 20, 64 << 20


def this_machine(device: str = "cpu") -> Target:
    """The calibrated description if there is one, else a quick estimate; imports no torch for the CPU."""
    path = calibrated_path(device)
    return read_target(path) if path.is_file() else estimate(device)


def chosen_target(target: Path | None, device: str | None = None) -> Target:
    """What `--target` and `--device` mean together."""
    return named_target(target) if target is not None else this_machine(device or "cpu")


def calibrated_path(device: str) -> Path:
    key = hashlib.sha256(f"{_processor()}|{cores()}".encode()).hexdigest()[:12]
    return user_cache.folder() / f"target-{device}-{key}.yaml"


def estimate(device: str = "cpu") -> Target:
    """A description without a measurement: rates by instruction set, deliberately modest."""
    if device == "cuda":
        import torch

        at_hand = torch.cuda.is_available()
        memory = (
            torch.cuda.get_device_properties(0).total_memory if at_hand else named_target("h200").memory_bytes
        )
        return named_target("h200").model_copy(update={"name": "estimated-gpu", "memory_bytes": memory})
    flags = _cpu_flags()
    per_core = 45e9 if "avx512f" in flags else 30e9 if "avx2" in flags else 8e9
    half = 9.0 if "amx_bf16" in flags else 1.5 if "avx512_bf16" in flags else 0.7
    n = cores()
    return Target(
        name="estimated-cpu",
        summary=f"{n} cores of {_processor()}, not calibrated",
        cores=n,
        memory_bytes=memory_bytes(),
        gemm={"float32": n * per_core, "bfloat16": n * per_core * half, "float64": n * per_core / 2},
        forward={"float32": n * per_core, "bfloat16": n * per_core * half / 3},
        train={"float32": n * per_core * 0.75, "bfloat16": n * per_core * half / 4},
        solve=n * per_core / 6,
        bandwidth=6e9 * n,
        disk_read=8e8,
        disk_write=3e8,
        overhead=8e-6,
        base_bytes=_IDLE,
    )


def calibrate(device: str = "cpu") -> Target:
    """Measure for about ten seconds and write the description into the user's cache."""
    import torch

    from effc.runtime.throughput import forward_rate, training_rate

    place = torch.device(device)
    gemm = {
        str(dtype).removeprefix("torch."): _gemm_rate(dtype, place)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    }
    read, write = _disk_rates(Path.cwd())
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else memory_bytes()
    target = Target(
        name=f"this-{device}",
        summary=f"{cores()} cores of {_processor()}",
        device="cuda" if device == "cuda" else "cpu",
        cores=cores(),
        memory_bytes=memory,
        gemm=gemm,
        forward={d: _rounded(forward_rate(getattr(torch, d), place)) for d in _HALF_AND_WHOLE},
        train={d: _rounded(training_rate(getattr(torch, d), place)) for d in _HALF_AND_WHOLE},
        solve=_solve_rate(place),
        bandwidth=_bandwidth(place),
        disk_read=read,
        disk_write=write,
        overhead=_overhead(place),
        base_bytes=_idle_bytes(),
        tokenize=_tokenize_rate(),
        calibrated=True,
    ).model_copy(update=_export_seconds())
    path = calibrated_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(yaml.safe_dump(target.model_dump(), sort_keys=False), encoding="utf-8")
    aside.replace(path)
    return target


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of RAM this process may use: the machine's, or the smaller limit of its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    texts = [p.read_text().strip() for p in limits if p.is_file()]
    return min([total, *(int(t) for t in texts if t.isdigit())])


def disk_free(folder: Path) -> int:
    """Bytes that are free where `folder` is or will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


# ---- the measurements


def _quick_rate(amount: float, work: Callable[[], object], place: torch.device, runs: int = 7) -> float:
    """amount / lower quartile of the seconds of `work`, after two runs to warm up."""
    import torch

    seconds = []
    for i in range(runs + 2):
        start = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return _rounded(amount / sorted(seconds)[len(seconds) // 4])  # others disturb the slower runs


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _gemm_rate(dtype: torch.dtype, place: torch.device) -> float:
    import torch

    n = _GEMM if place.type == "cpu" else 8 * _GEMM
    a, b = torch.ones(n, n, dtype=dtype, device=place), torch.ones(n, n, dtype=dtype, device=place)
    return _quick_rate(2.0 * n**3, lambda: a @ b.T, place)


def _solve_rate(place: torch.device) -> float:
    """Cholesky and inverse of a symmetric matrix: n^3 flops together."""
    import torch

    n = _SOLVED
    spd = torch.eye(n, device=place) * 2 + torch.ones(n, n, device=place) / n
    return _quick_rate(float(n**3), lambda: torch.cholesky_inverse(torch.linalg.cholesky(spd)), place)


def _bandwidth(place: torch.device) -> float:
    import torch

    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=place)
    to = torch.empty_like(source)
    return _quick_rate(2.0 * _COPY_BYTES, lambda: to.copy_(source), place)


def _overhead(place: torch.device) -> float:
    import torch

    small = torch.zeros(16, device=place)

    def thousand() -> None:
        for _ in range(1000):
            torch.add(small, 1.0)

    return _rounded(1 / _quick_rate(1000, thousand, place))


def _disk_rates(folder: Path) -> tuple[float, float]:
    """(read, write) bytes a second; the read may come from the page cache, as it does in a run."""
    block = os.urandom(_FILE_BYTES)
    with tempfile.TemporaryDirectory(dir=folder if os.access(folder, os.W_OK) else None) as work:
        path = Path(work) / "block"
        start = time.perf_counter()
        with path.open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        path.read_bytes()
        read = time.perf_counter()
    return _rounded(_FILE_BYTES / (read - written)), _rounded(_FILE_BYTES / (written - start))


def _tokenize_rate() -> float:
    """Bytes of Python source a second, by the tokenizer that ships with effc."""
    from effc.runtime.data.corpus import listed_files
    from effc.runtime.data.text import Text
    from effc.runtime.load import load

    files = dict(getattr(load("zoo:pylm").tokenizer, "files", {}))
    held = [path for path, split in listed_files("python-stdlib") if split == "heldout"]
    with tempfile.TemporaryDirectory() as folder:
        size = 0
        for number, path in enumerate(held):
            size += len(content := path.read_bytes())
            (Path(folder) / f"{number}.py").write_bytes(content)
        start = time.perf_counter()
        Text(path=folder).open(files)
        return _rounded(size / (time.perf_counter() - start))


def _export_seconds() -> dict[str, float]:
    """What small exports take, their consumers in new processes included; nothing of one that is refused."""
    from effc.runtime.exports.artifact import Artifact
    from effc.runtime.exports.hf import Hf
    from effc.runtime.load import load

    taken = {}
    with tempfile.TemporaryDirectory() as folder:
        for field, export in (("start", Artifact(path=f"{folder}/a")), ("consumer", Hf(path=f"{folder}/b"))):
            start = time.perf_counter()
            with suppress(EffcError):
                export.publish(load("zoo:pylm"))
                taken[field] = _rounded(time.perf_counter() - start)
    return taken


def _idle_bytes() -> int:
    """Resident bytes of a child that is ready to run a stage and has multiplied its first matrices."""
    import subprocess
    import sys

    code = """
import effc.runtime.run, effc.runtime.fit, effc.runtime.calibrate
from effc.runtime.data.corpus import Corpus
from effc.runtime.throughput import training_rate
import torch
training_rate(torch.bfloat16, torch.device("cpu"))
from effc.runtime.peak import give_back, resident
give_back()
print(resident())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    return int(found) if found.strip().isdigit() else _IDLE


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    for line in path.read_text().splitlines():
        if line.split("\t")[0].split(":")[0].strip() == key:
            return line.partition(":")[2].strip()
    return ""
