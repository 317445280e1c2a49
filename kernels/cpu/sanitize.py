"""The environment of a process whose kernels are built to watch their memory and their arithmetic.

The sanitizers' libraries must be loaded before all others, so that the memory of torch's tensors is watched
to the byte; hence a process of its own.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

from effc.kernels.cpu.build import MORE_FLAGS, compiler

_FLAGS = "-O0 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
_OPTIONS = "detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=0:handle_segv=1"


@cache
def sanitizing() -> dict[str, str] | str:
    """Variables to add to the environment; or, in words, why kernels cannot be built so here."""
    found = compiler()
    if found is None:
        return "there is no C compiler"
    path, version = found
    clang = "clang" in version
    named = ["libclang_rt.asan-x86_64.so", "libclang_rt.asan.so"] if clang else ["libasan.so"]
    first = next(filter(None, (_library(path, name) for name in named)), None)
    if first is None:
        return f"{version} has no address sanitizer: {' or '.join(named)}"
    # Behind it the library of C++, whose exceptions it must find when Python loads torch.
    loaded = [first, *filter(None, [_library(path, "libstdc++.so.6")])]
    return {
        MORE_FLAGS: _FLAGS + (" -shared-libasan" if clang else ""),
        "LD_PRELOAD": " ".join(loaded),
        "ASAN_OPTIONS": _OPTIONS,
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }


def _library(compiler: str, name: str) -> str | None:
    """Where the compiler has a shared library; None when it has none that could be loaded."""
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = Path(done.stdout.strip())
    if not path.is_absolute() or not path.is_file():
        return None
    with path.open("rb") as file:
        return str(path) if file.read(4) == b"\x7fELF" else None


def unloaded() -> None:
    """Let programs that this process starts (compilers) run without the sanitizer."""
    os.environ.pop("LD_PRELOAD", None)
