"""The instruction sets that C kernels are written for, and which of them this processor has."""

from __future__ import annotations

import platform
from enum import StrEnum
from functools import cache
from pathlib import Path


class Isa(StrEnum):
    """From the fastest to the one that runs anywhere."""

    AVX512 = "avx512"
    """AVX-512 with VNNI: 64 products of 8 bits an instruction"""
    AVX2 = "avx2"
    """AVX2 with FMA and F16C: the same sums from 16-bit pairs"""
    PORTABLE = "portable"
    """plain C; the compiler's own choice of instructions"""

    @property
    def flags(self) -> tuple[str, ...]:
        """Compiler flags. Named sets and not the build machine's own, so a cached file says what it needs."""
        return _FLAGS[self]

    @property
    def needs(self) -> frozenset[str]:
        """Flags of /proc/cpuinfo without which the code must not be loaded."""
        return _NEEDS[self]


_FLAGS: dict[Isa, tuple[str, ...]] = {
    Isa.AVX512: (
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ),
    Isa.AVX2: ("-mavx2", "-mfma", "-mf16c"),
    Isa.PORTABLE: (),
}  # fmt: skip
_NEEDS: dict[Isa, frozenset[str]] = {
    Isa.AVX512: frozenset(
        {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma", "f16c"}
    ),
    Isa.AVX2: frozenset({"avx2", "fma", "f16c"}),
    Isa.PORTABLE: frozenset(),
}


@cache
def processor() -> frozenset[str]:
    """What the processor says it can do; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(found[0]) if found and platform.machine() in ("x86_64", "AMD64") else frozenset()


def available() -> tuple[Isa, ...]:
    """The sets that this processor has, fastest first."""
    return tuple(isa for isa in Isa if isa.needs <= processor())
