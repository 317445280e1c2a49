"""How fast this machine reads memory, as a bound for decoding: every weight is read once a token."""

from __future__ import annotations

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from effc.kernels.cpu.build import build, compiler, load
from effc.kernels.cpu.isa import available
from effc.kernels.cpu.pages import in_large_pages

LARGE = 1 << 30
"""Bytes of an array that no cache of today holds."""
_TEXT = r"""
/* The sum of n vectors of 64 bytes, in eight chains: reading is all that takes time. */
typedef long v8 __attribute__((vector_size(64)));
long effc_read(const v8 *x, long n) {
  v8 s[8] = {};
  for (long i = 0; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) { __builtin_prefetch(x + i + j + 64); s[j] += x[i + j]; }
  for (int j = 1; j < 8; j++) s[0] += s[j];
  long all = 0;
  for (int j = 0; j < 8; j++) all += s[0][j];
  return all;
}
"""


def read_rate(size: int = LARGE, threads: int = 1, runs: int = 5) -> float:
    """Bytes a second at which `threads` threads read an array of `size` bytes again and again; the median.

    An array of the size of a model's weights tells what the caches give them; a large one what memory gives.
    Without a C compiler torch adds the array up, which is slower by a little.
    """
    memory = in_large_pages({"": torch.ones(size // 64 * 8, dtype=torch.int64)})[""]
    share = memory.numel() // threads // 64 * 64
    parts = [memory[i * share : (i + 1) * share] for i in range(threads)]
    if compiler() is not None:
        entry = load(build(_TEXT, available()[0])).effc_read
        entry.argtypes, entry.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_long

        def read(part: torch.Tensor) -> int:
            return int(entry(part.data_ptr(), part.numel() // 8))
    else:

        def read(part: torch.Tensor) -> int:
            return int(part.sum())

    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(runs + 1):
            start = time.perf_counter()
            list(pool.map(read, parts))
            seconds.append(time.perf_counter() - start)
    return share * threads * 8 / sorted(seconds[1:])[runs // 2]
