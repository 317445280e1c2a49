"""Whole programs in a process of its own, which sanitizers may watch: `python -m tests.kernels.programs`."""

from __future__ import annotations

import json
from functools import partial

import torch

from effc.compiler.model import Model
from effc.kernels.cpu.check import isolated
from effc.kernels.cpu.isa import Isa, available
from effc.kernels.cpu.sanitize import unloaded
from effc.runtime.decoder import ProgramDecoder, TorchDecoder, ready
from tests.compiler.conftest import FAMILIES, V, fill
from tests.passes.test_lower import BATCH, LENGTH, padded, quantized
from tests.passes.test_lower_planes import of_signs
from tests.passes.test_lower_structures import recurrences, stacked


def compared(model: Model, isa: Isa, tolerance: float) -> str:
    """A program's logits against torch's, in words: prompts, then three tokens; by one member and two."""
    ids, mask = padded()
    with torch.inference_mode():
        for threads in (1, 2):
            ours = ProgramDecoder(ready(model, isa, threads), BATCH, LENGTH + 3)
            due = TorchDecoder(model, LENGTH + 3)
            pairs = [(ours.prefill(ids, mask), due.prefill(ids, mask))]
            for i in range(3):
                token = (ids[:, i] + 7) % V
                pairs.append((ours.next(token), due.next(token)))
            for i, (found, expected) in enumerate(pairs):
                off = float((found - expected).norm() / expected.norm())
                if not off <= tolerance:
                    return f"step {i} by {threads}: off by {off}"
    return "as torch has it"


def main() -> None:
    unloaded()
    torch.set_num_threads(1)
    fastest, plain = available()[0], available()[-1]
    jobs = {
        "packed": (quantized(), fastest, 0.05),
        "packed, portable": (quantized(8), plain, 0.05),
        "windows and caps": (fill(FAMILIES["gemma2"]()), fastest, 1e-5),
        "experts": (fill(FAMILIES["mixtral"]()), fastest, 1e-5),
        "recurrences, portable": (stacked(recurrences(), "attention"), plain, 1e-5),
        "positions and biases": (fill(FAMILIES["gpt2"]()), plain, 1e-5),
        "signs": (of_signs("column", 3), fastest, 1e-5),
    }
    print(json.dumps({name: isolated(partial(compared, *job)) for name, job in jobs.items()}))


if __name__ == "__main__":
    main()
