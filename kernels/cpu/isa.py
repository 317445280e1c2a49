"""The instruction sets that C kernels are written for, and which of them this processor has."""

from __future__ import annotations

import ctypes
import platform
from enum import StrEnum
from functools import cache
from pathlib import Path


class Isa(StrEnum):
    """From the fastest to the one that runs anywhere."""

    AMX = "amx"
    """AVX-512 with matrix units: 16384 products of 8 bits an instruction, where there are rows enough"""
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

    def flags_for(self, text: str) -> tuple[str, ...]:
        """Those for one text: what uses no matrix units is the same file as without them, compiled once."""
        plain = self is Isa.AMX and "__AMX_INT8__" not in text
        return _FLAGS[Isa.AVX512 if plain else self]

    @property
    def needs(self) -> frozenset[str]:
        """Flags of /proc/cpuinfo without which the code must not be loaded."""
        return _NEEDS[self]


_AVX512 = (
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c",
    "-mprefer-vector-width=512",
)  # fmt: skip
_FLAGS: dict[Isa, tuple[str, ...]] = {
    Isa.AMX: (*_AVX512, "-mamx-tile", "-mamx-int8"),
    Isa.AVX512: _AVX512,
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
_NEEDS[Isa.AMX] = _NEEDS[Isa.AVX512] | {"amx_tile", "amx_int8"}
_ARCH_PRCTL, _REQUEST, _TILES = 158, 0x1023, 18


@cache
def processor() -> frozenset[str]:
    """What the processor says it can do; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(found[0]) if found and platform.machine() in ("x86_64", "AMD64") else frozenset()


@cache
def _tiles_granted() -> bool:
    """Ask the system for the registers of matrix units, for all threads of this process; it may decline."""
    call = getattr(ctypes.CDLL(None), "syscall", None)
    if call is None or not _NEEDS[Isa.AMX] <= processor():
        return False
    return int(call(*map(ctypes.c_long, (_ARCH_PRCTL, _REQUEST, _TILES)))) == 0


@cache
def available() -> tuple[Isa, ...]:
    """The sets that this processor has and its system lets this process use, fastest first."""
    return tuple(isa for isa in Isa if isa.needs <= processor() and (isa is not Isa.AMX or _tiles_granted()))
