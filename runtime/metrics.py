"""Metrics: what `expect` and the report measure on a finished model.

`bytes` is the payload of the tensors as the artefact stores them: packed codes, scales, zeros; a tied tensor
once. `params` counts logical weights, so packing changes bytes and not params. `flops` is the forward work
of one token at the planner's mean attention length, `spent` what of it was really done; `kv_bytes(T)` the
cache of one sequence of T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from effc.compiler.cost import cache_bytes, count
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.runtime.decoder import decoder
from effc.runtime.evaluate import accuracy, bits_per_byte, loss, spent
from effc.specs.diagnostic import Diagnostic, EffcError

COUNTED = ("bytes", "params", "flops", "kv_bytes")
"""Known from the structure alone; a plan predicts them exactly."""
MEASURED = ("loss", "bpb", "acc", "spent", "latency")

_PROMPT, _STEPS = 32, 24


def measure(
    model: Model, metric: str, data: Any = None, arguments: Sequence[Any] = (), split: str | None = None
) -> float:
    """One metric of one model; `data` is opened data for loss, bpb and acc, `split` defaults to `heldout`.

    Units: bytes, weights, FLOPs a token, bytes, nats a token, bits a byte, share of right answers, seconds a
    decoded token.

    Raises:
        EffcError: E640 when the tokenizers of model and data differ.
        KeyError: for an unknown metric.
    """
    cost = count(model, ATTENDED)
    match metric:
        case "bytes":
            return cost.bytes
        case "params":
            return cost.params
        case "flops":
            return cost.flops_per_token
        case "kv_bytes":
            return cache_bytes(model, int(arguments[0] if arguments else 1))
        case "latency":
            return latency(model)
        case "loss":
            return loss(model, _readable(model, data), split or "heldout")
        case "bpb":
            return bits_per_byte(model, data, split or "heldout")
        case "acc":
            return accuracy(model, _readable(model, data))
        case "spent":
            return spent(model, _readable(model, data), split or "heldout").flops_per_token
    raise KeyError(metric)


def latency(model: Model, prompt: int = _PROMPT, steps: int = _STEPS) -> float:
    """Seconds of one decoded token behind a short prompt, batch 1, as `effc run` decodes; 0 for an encoder.

    The lower quartile of the steps, which other work on the machine disturbs less than the median. A model
    with packed weights is lowered to its C program, which lays them out anew: give a clone to keep its own.
    """
    if not hasattr(model.gm, "head"):
        return 0.0
    device = next(iter(model.tensors().values())).device
    ids = torch.ones(1, prompt, dtype=torch.int64, device=device)
    seconds = []
    with torch.inference_mode():
        decoding = decoder(model, 1, prompt + steps)
        token = decoding.prefill(ids, None).argmax(-1)
        for _ in range(steps):
            start = time.perf_counter()
            token = decoding.next(token).argmax(-1)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[(steps - 1) // 4]


def _readable(model: Model, data: Any) -> Any:
    """The data, once it is known to speak the model's vocabulary."""
    from effc.runtime.data._vocabulary import Vocabulary

    mine = Vocabulary.of(model.tokenizer.files).fingerprint if model.tokenizer else None
    if mine is not None and mine != data.vocabulary:
        raise EffcError(
            Diagnostic(
                "E640",
                "the model and the data have different tokenizers",
                notes=("losses a token can only be compared between equal tokenizers",),
                help="compare bits a byte, `bpb`, of data opened for each model",
            )
        )
    return data
