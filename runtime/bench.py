"""`effc bench`: tokens a second in prefill and decoding, what they read, memory and loss of one model."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from effc.compiler.cost import count
from effc.compiler.model import Model
from effc.compiler.plan import ATTENDED
from effc.kernels.cpu.isa import available
from effc.kernels.experts.linear import ExpertLinearSpec
from effc.runtime.bandwidth import read_rate
from effc.runtime.choice import Choice, choose
from effc.runtime.decoder import Ready, decoder, ready
from effc.runtime.kernel_ways import way_lines, ways_of
from effc.runtime.peak import high_water
from effc.runtime.program_loss import program_loss
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


def speed(
    model: Model, prompt_tokens: int, new_tokens: int, batch: int, runs: int = 3, choice: Choice | None = None
) -> Speed:
    """Time prefill and cached decoding of random tokens; the model must be a decoder with weights."""
    choice = choice or Choice("torch", None)
    ids = prompts(model, prompt_tokens, batch)
    prefill, decode = [], []
    for run in range(runs + 1):
        first, step = timed(model, ids, new_tokens, choice)
        if run:  # the first run warms up
            prefill.append(first)
            decode.append(step)
    first, step = statistics.median(prefill), statistics.median(decode)
    return Speed(batch, prompt_tokens, new_tokens, batch * prompt_tokens / first, batch / step, first)


def prompts(model: Model, tokens: int, batch: int) -> torch.Tensor:
    """Random ids [batch, tokens], the same ones every time, where the model's weights lie."""
    embedding: Any = model.module("embedding")
    dice = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, embedding.vocab, (batch, tokens), generator=dice)
    return drawn.to(next(iter(model.tensors().values())).device)


@torch.inference_mode()
def timed(model: Model, ids: torch.Tensor, new_tokens: int, choice: Choice) -> tuple[float, float]:
    """Seconds until the first token behind ids [B, T], and of each of `new_tokens` more."""
    start = _now(ids.device)
    engine = decoder(model, ids.shape[0], ids.shape[1] + new_tokens, choice.kernels, choice.isa)
    engine.prefill(ids, None)
    token = engine.likeliest()
    read = _now(ids.device)
    for _ in range(new_tokens):
        engine.next(token)
        token = engine.likeliest()
    return read - start, (_now(ids.device) - read) / max(1, new_tokens)


def bytes_per_token(ready: Ready) -> int:
    """Bytes of weights that the step of one token must read: of experts as many as it takes.

    Of the table of tokens that is only what the head reads too.
    """
    shares: dict[str, float] = {}
    for call in ready.lowered.plan.calls:
        some = [s.active / s.experts for s in call.specs if isinstance(s, ExpertLinearSpec)]
        if call.op != "embed":
            shares |= {name: max(shares.get(name, 0.0), *some, 0.0 if some else 1.0) for name in call.tensors}
    tensors = ready.program.tensors
    return round(sum(tensors[n].numel() * tensors[n].element_size() * share for n, share in shares.items()))


def bench(
    model: Model,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    data: Any = None,
    choice: Choice | None = None,
) -> dict[str, Any]:
    """Everything `effc bench ARTEFACT` prints; `data` is opened for the model's tokenizer, or None."""
    from effc.runtime.metrics import measure

    model.materialize()
    cost = count(model, ATTENDED)
    record: dict[str, Any] = {
        "params": cost.params,
        "bytes": cost.bytes,
        "flops_per_token": cost.flops_per_token,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "state_bytes": cost.state_bytes,
    }
    choice = choice or choose(model)
    found: Speed | None = None
    if hasattr(model.gm, "head"):
        found = speed(model, prompt_tokens, new_tokens, batch, choice=choice)
        record |= asdict(found) | {"kernels": choice.kernels, "isa": choice.isa, "why": choice.why}
        record["threads"] = torch.get_num_threads()
    if data is not None:
        record["loss"] = measure(model, "loss", data)
        record["bpb"] = measure(model, "bpb", data)
        if choice.kernels == "c":
            record["program_loss"] = program_loss(ready(model, choice.isa), data)
    record["peak_bytes"] = high_water()
    if found is not None and choice.kernels == "c":  # behind the peak, as the test of reading is large
        record |= _memory(model, choice, found)
        record["ways"] = ways_of(model) if choice.isa is available()[0] else []
    return record


def _memory(model: Model, choice: Choice, found: Speed) -> dict[str, Any]:
    """What a step reads, and how that compares with reading alone."""
    size, threads = bytes_per_token(ready(model, choice.isa)), torch.get_num_threads()
    rate = read_rate(threads=threads)
    share = size * found.decode_tokens_per_second / found.batch / rate
    return {"weight_bytes_per_token": size, "read_rate": rate, "read_share": share}


def bench_text(record: dict[str, Any]) -> str:
    """The record as lines of `what: value`."""
    lines = [
        ("parameters", fmt_count(record["params"])),
        ("bytes", fmt_bytes(record["bytes"])),
        ("work a token", f"{fmt_count(record['flops_per_token'])} FLOP"),
        ("cache a token", fmt_bytes(record["kv_bytes_per_token"])),
        ("cache beside tokens", fmt_bytes(record["state_bytes"])),
    ]
    if "prefill_tokens_per_second" in record:
        lines += [
            ("prefill", f"{record['prefill_tokens_per_second']:,.0f} tokens/s"),
            ("decode", f"{record['decode_tokens_per_second']:,.1f} tokens/s"),
            ("first token after", fmt_seconds(record["first_token_seconds"])),
            ("kernels", _kernels(record)),
        ]
    if "read_rate" in record:
        each, rate = fmt_bytes(record["weight_bytes_per_token"]), fmt_bytes(int(record["read_rate"]))
        share = f"{record['read_share']:.0%} of the {rate}/s at which memory is read here"
        share += " (they stay in a cache)" if record["read_share"] > 1 else ""
        lines.append(("weights a token", f"{each} read, {share}"))
    if "loss" in record:
        lines += [("loss", f"{record['loss']:.4f} nats a token"), ("", f"{record['bpb']:.4f} bits a byte")]
    if "program_loss" in record:
        change = record["program_loss"] / record["loss"] - 1
        lines.append(("", f"{record['program_loss']:.4f} nats a token by the C program ({change:+.2%})"))
    lines.append(("peak memory", fmt_bytes(record["peak_bytes"])))
    for i, (kernel, rows, way, why) in enumerate(way_lines(record.get("ways", []))):
        lines.append(("" if i else "ways", f"{kernel}{': ' if kernel else '  '}{rows} by {way} ({why})"))
    return "\n".join(f"{what:<18}{value}" for what, value in lines)


def _kernels(record: dict[str, Any]) -> str:
    threads = f"{record['threads']} threads" if record["threads"] > 1 else "one thread"
    if record["kernels"] == "c":
        return f"a C program for {record['isa']}, {threads}"
    return f"torch, {threads}" + (f": {record['why']}" if record["why"] else "")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
