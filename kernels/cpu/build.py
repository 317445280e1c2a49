"""C text to a loaded library: the system's compiler, a cache of files named by what they were made from.

A file in the cache is machine code that runs in this process. It is looked for only in a folder that belongs
to the user and that nobody else can write; text that came with an artifact never gets here.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from effc.kernels.cpu.isa import Isa, available
from effc.kernels.place import folder
from effc.specs.diagnostic import Diagnostic, EffcError

_COMMON = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-w")
_SECONDS = 120
MORE_FLAGS = "EFFC_CFLAGS"
"""Variable of the environment: flags for every kernel besides, such as those of a sanitizer."""


@cache
def compiler() -> tuple[str, str] | None:
    """Path and version of the system's C compiler; None when there is none, and torch's own kernels serve."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return path, done.stdout.partition("\n")[0]
    return None


def build(text: str, isa: Isa) -> Path:
    """The shared library made of `text`; compiled once, then found in the user's cache.

    Raises:
        EffcError: E501 when there is no compiler, E502 when it refuses the text.
    """
    found = compiler()
    if found is None:
        help = "install gcc or clang, or go on with torch's own kernels"
        raise EffcError(Diagnostic("E501", "there is no C compiler", help=help))
    if isa is Isa.AMX:
        available()  # asks for its registers; without them its first instruction would end the process
    path, version = found
    flags = (*_COMMON, *isa.flags_for(text), *os.environ.get(MORE_FLAGS, "").split())
    name = hashlib.sha256("\0".join((text, version, *flags)).encode()).hexdigest()[:24]
    place = folder()
    library = place / f"{name}.so"
    if library.is_file():
        return library
    with tempfile.TemporaryDirectory(dir=place, prefix=".build-") as aside:
        source, made = Path(aside) / f"{name}.c", Path(aside) / f"{name}.so"
        source.write_text(text, encoding="utf-8")
        command = [path, *flags, "-o", str(made), str(source), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _refused(str(error)) from error
        if done.returncode:
            raise _refused(done.stderr)
        os.replace(source, place / f"{name}.c")
        os.replace(made, library)
    return library


@cache
def load(library: Path) -> ctypes.CDLL:
    """The library, loaded once."""
    return ctypes.CDLL(str(library))


def _refused(words: str) -> EffcError:
    first = [line for line in words.splitlines() if "error" in line][:3] or [words[:300]]
    return EffcError(Diagnostic("E502", "the C compiler refuses a kernel", notes=tuple(first)))
