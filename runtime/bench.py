"""`effc bench`: tokens a second in prefill and decoding, bytes, peak memory and loss of one model."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from effc.compiler.cost import count
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.compiler.step import Cache
from effc.runtime.decoder import last_logits
from effc.runtime.peak import high_water
from effc.specs.units import fmt_bytes, fmt_count, fmt_seconds


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians of several runs. B sequences, T tokens of prompt."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    """over all sequences of the batch"""
    first_token_seconds: float


def speed(model: Model, prompt_tokens: int, new_tokens: int, batch: int, runs: int = 3) -> Speed:
    """Time prefill and cached decoding of random tokens; the model must be a decoder with weights."""
    device = next(iter(model.tensors().values())).device
    embedding: Any = model.module("embedding")
    dice = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, embedding.vocab, (batch, prompt_tokens), generator=dice)
    ids = drawn.to(device)
    prefill, decode = [], []
    with torch.inference_mode():
        for run in range(runs + 1):
            cache = Cache(prompt_tokens + new_tokens)
            start = _now(device)
            token = last_logits(model, ids, None, cache).argmax(-1)
            read = _now(device)
            for _ in range(new_tokens):
                token = last_logits(model, token[:, None], None, cache).argmax(-1)
            done = _now(device)
            if run:  # the first run warms up
                prefill.append(read - start)
                decode.append((done - read) / max(1, new_tokens))
    first, step = statistics.median(prefill), statistics.median(decode)
    return Speed(batch, prompt_tokens, new_tokens, batch * prompt_tokens / first, batch / step, first)


def bench(model: Model, prompt_tokens: int, new_tokens: int, batch: int, data: Any = None) -> dict[str, Any]:
    """Everything `effc bench ARTEFACT` prints; `data` is opened for the model's tokenizer, or None."""
    from effc.runtime.metrics import measure

    model.materialize()
    cost = count(model, ATTENDED)
    record: dict[str, Any] = {
        "params": cost.params,
        "bytes": cost.bytes,
        "flops_per_token": cost.flops_per_token,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
    }
    if hasattr(model.gm, "head"):
        record |= asdict(speed(model, prompt_tokens, new_tokens, batch))
    if data is not None:
        record["loss"] = measure(model, "loss", data)
        record["bpb"] = measure(model, "bpb", data)
    record["peak_bytes"] = high_water()
    return record


def bench_text(record: dict[str, Any]) -> str:
    """The record as lines of `what: value`."""
    lines = [
        ("parameters", fmt_count(record["params"])),
        ("bytes", fmt_bytes(record["bytes"])),
        ("work a token", f"{fmt_count(record['flops_per_token'])} FLOP"),
        ("cache a token", fmt_bytes(record["kv_bytes_per_token"])),
    ]
    if "prefill_tokens_per_second" in record:
        lines += [
            ("prefill", f"{record['prefill_tokens_per_second']:,.0f} tokens/s"),
            ("decode", f"{record['decode_tokens_per_second']:,.1f} tokens/s"),
            ("first token after", fmt_seconds(record["first_token_seconds"])),
        ]
    if "loss" in record:
        lines += [("loss", f"{record['loss']:.4f} nats a token"), ("", f"{record['bpb']:.4f} bits a byte")]
    lines.append(("peak memory", fmt_bytes(record["peak_bytes"])))
    return "\n".join(f"{what:<18}{value}" for what, value in lines)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
