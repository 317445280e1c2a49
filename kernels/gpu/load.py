"""Emitted Triton text to a module: a file in the user's cache, named by its content, imported from there.

Triton reads a kernel with `inspect.getsource`, which needs a file. As with libraries made of C, a file is
used only in a folder that belongs to the user and that nobody else can write, and only when it holds the very
text; text that came with an artifact never gets here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from effc.kernels.place import folder
from effc.specs.diagnostic import Diagnostic, EffcError


@cache
def load(text: str) -> ModuleType:
    """The module that `text` is; imported once in a process.

    Raises:
        EffcError: E504 when Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        help = "pip install triton; there are builds for Linux only"
        raise EffcError(Diagnostic("E504", "Triton is not installed", help=help))
    path = place(text)
    name = f"effc_kernel_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def place(text: str) -> Path:
    """The file that holds `text`, written when it is not there."""
    data = text.encode()
    path = folder() / f"{hashlib.sha256(data).hexdigest()[:24]}.py"
    if path.is_file() and path.read_bytes() == data:
        return path
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".text-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    os.replace(aside, path)
    return path
