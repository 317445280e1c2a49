"""What a compiled kernel takes of a Hopper multiprocessor, read from its code by the tools Triton ships."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import triton.backends.nvidia as nvidia

from effc.kernels.gpu.hopper import REGISTERS, SHARED, Compiled

_COUNTED = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "LDGSTS", "UBLKCP", "LDL", "STL", "STS", "PRMT")


@dataclass(frozen=True, slots=True)
class Resources:
    """One kernel at one tile. `loop` is the longest loop of its machine code."""

    name: str
    warps: int
    registers: int
    """of each thread"""
    stack: int
    """bytes of each thread: what does not fit in registers"""
    shared: int
    """bytes of each program"""
    barriers: int
    counts: dict[str, int]
    """machine instructions by kind, those that do not occur left out"""
    loop: int
    """instructions of one turn of the loop"""
    loop_products: int
    """matrix instructions among them"""

    def each(self, weights: int) -> float:
        """Instructions of one thread for each of the `weights` that a program takes in one turn."""
        return self.loop * self.warps * 32 / weights

    def together(self) -> int:
        """Programs that fit on one multiprocessor at once."""
        threads = self.warps * 32
        granule = -(-self.registers // 8) * 8 * threads
        return min(REGISTERS // granule, 2048 // threads, 233472 // (self.shared + 1024))

    def wrong(self) -> list[str]:
        """What no kernel may do, in words: spill, or ask for more than there is."""
        found = []
        if self.shared > SHARED:
            found.append(f"{self.shared} bytes of shared memory, at most {SHARED}")
        if self.stack or self.counts.get("LDL") or self.counts.get("STL"):
            found.append(f"spills: a stack of {self.stack} bytes")
        if self.registers * self.warps * 32 > REGISTERS:
            found.append(f"{self.registers} registers of {self.warps} warps, at most {REGISTERS} in all")
        return found

    def data(self) -> dict[str, object]:
        return asdict(self)


def resources(kernel: Compiled) -> Resources:
    """Read the machine code of one kernel.

    Raises:
        RuntimeError: a tool that Triton ships cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.cubin)
        listing = _run("cuobjdump", "-res-usage", "-sass", str(cubin))
    code = [(int(at, 16), words) for at, words in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", listing)]
    names = [_operation(words) for _, words in code]
    body = loop(code)
    counts = {kind: n for kind in _COUNTED if (n := names.count(kind))}
    return Resources(
        kernel.name,
        kernel.warps,
        _number(r"REG:(\d+)", listing),
        _number(r"STACK:(\d+)", listing) + _number(r"LOCAL:(\d+)", listing),
        kernel.shared,
        len({words.partition(" ")[2] for _, words in code if _operation(words) == "BAR"}),
        counts,
        len(body),
        sum("MMA" in _operation(words) for words in body),
    )


def loop(code: list[tuple[int, str]]) -> list[str]:
    """The longest stretch from the goal of a backward branch to the branch, which is where the time goes."""
    best: list[str] = []
    for at, words in code:
        goal = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", words)
        if goal and (first := int(goal[1], 16)) < at:
            body = [other for place, other in code if first <= place <= at]
            best = max(best, body, key=len)
    return best


def _operation(words: str) -> str:
    """`@!P0 HGMMA.64x16x16.F32.BF16 R24, ...` -> HGMMA"""
    parts = words.split()
    name = parts[1] if parts[0].startswith("@") and len(parts) > 1 else parts[0]
    return name.partition(".")[0]


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what cuobjdump says: {text[:200]}")
    return int(found[1])


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_tools() / tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool}: {(done.stderr or done.stdout)[:300]}")
    return done.stdout


@cache
def _tools() -> Path:
    return Path(str(nvidia.__file__)).parent / "bin"
