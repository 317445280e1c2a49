"""The heap: in a loop freed blocks are used again, untouched by the system; elsewhere they are gone."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

TOUCHED = """
import json, resource
import torch
from effc.runtime.heap import keeping
from effc.runtime.peak import resident

torch.empty(1 << 20).fill_(1.0)
before, held = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, resident()
with keeping():
    for _ in range(256):
        torch.empty(1 << 20).fill_(1.0)
    many = [torch.empty(1 << 20).fill_(1.0) for _ in range(32)]
    touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del many
print(json.dumps([touched * resource.getpagesize(), resident() - held]))
"""
"""Bytes first touched by 256 blocks of 4 MB, one by one, and 32 at once; bytes kept behind the loop."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_loop_touches_its_blocks_once_and_gives_them_back() -> None:
    done = subprocess.run([sys.executable, "-c", TOUCHED], capture_output=True, text=True, check=True)
    touched, kept = json.loads(done.stdout)
    assert touched < 320e6  # 1.2 GB where every block is new
    assert kept < 40e6
