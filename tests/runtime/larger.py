"""Compile a recipe while believing in little memory; print the peak over start-up and the model's size.

`python larger.py RECIPE STORE MEMORY [hard]`: everything that asks for the size of main memory is told MEMORY
bytes; with `hard` the system gives no more than that, Python and torch included.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from effc.runtime import judging
from effc.runtime.exports import _export
from effc.runtime.front import parse
from effc.runtime.peak import high_water
from effc.runtime.run import compile

if __name__ == "__main__":
    memory = int(sys.argv[3])
    if sys.argv[4:] == ["hard"]:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    judging.memory_bytes = lambda: memory
    _export.memory_bytes = lambda: memory
    torch.set_num_threads(1)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # what torch sets up once is no need of the run
    recipe = parse(Path(sys.argv[1]))
    before = high_water()
    done = compile(recipe, sys.argv[2])
    print(before, high_water(), *(export.verified.replace(" ", "_") for export in done.exports))
