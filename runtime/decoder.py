"""Decoder: a model's next-token logits, by its blocks in torch, a C program or the launches of a GPU.

Shapes: B sequences, T tokens of prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.model import Model
from effc.compiler.step import Cache
from effc.kernels.cached_attention.spec import CachedAttentionSpec
from effc.kernels.cpu.build import compiler
from effc.kernels.cpu.isa import Isa, available
from effc.kernels.gpu.launches import LaunchPlan
from effc.kernels.program.call import ROWS
from effc.kernels.program.run import Program, Session
from effc.passes.lower.by_torch import by_torch
from effc.passes.lower.decoder import Lowered, Unlowered, angles, compiled, lower
from effc.passes.lower.gpu import Rows, launches
from effc.runtime.content import Content, content
from effc.runtime.launched import LaunchedDecoder
from effc.specs.diagnostic import Diagnostic, EffcError

Kernels = Literal["auto", "c", "triton", "triton-int8", "triton-float8", "torch"]
"""triton-int8 and triton-float8 are Triton kernels that make rows bytes before linear layers (W4A8, W8A8)."""
TRITON: Mapping[str, Rows] = {"triton": "bfloat16", "triton-int8": "int8", "triton-float8": "float8"}
"""What linear layers of Triton kernels multiply, by the name of the choice."""


class Decoder(Protocol):
    """Reads prompts once, then one token of each sequence at a time."""

    def prefill(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """ids [B, T] padded on the left where mask [B, T] is False -> logits [B, V] behind the last."""
        ...

    def next(self, tokens: Tensor) -> Tensor:
        """tokens [B] -> logits [B, V] behind them."""
        ...

    def likeliest(self) -> Tensor:
        """The tokens [B] that the last logits put first, the lowest among equals: the greedy choice."""
        ...


class TorchDecoder:
    """The model's blocks over a static cache."""

    def __init__(self, model: Model, longest: int) -> None:
        self.model, self.cache = model, Cache(longest)
        self.mask: Tensor | None = None
        self.logits = torch.empty(0)

    def prefill(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        self.mask = mask
        self.logits = last_logits(self.model, ids, mask, self.cache)
        return self.logits

    def next(self, tokens: Tensor) -> Tensor:
        if self.mask is not None:
            self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), 1)
        self.logits = last_logits(self.model, tokens[:, None], self.mask, self.cache)
        return self.logits

    def likeliest(self) -> Tensor:
        return self.logits.argmax(-1)


class ProgramDecoder:
    """A lowered program: rows are real tokens, so padding is never computed; it chooses the next ones too."""

    def __init__(self, ready: Ready, batch: int, longest: int) -> None:
        self.vocab = ready.lowered.plan.vocab
        self.session = Session(ready.program, ready.attentions, batch, longest, max(batch, ROWS))
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.slots = torch.arange(batch)
        self.chosen = torch.zeros(batch, dtype=torch.long)

    def prefill(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.lengths = real.sum(1)
        slots = self.slots[:, None].expand_as(ids)[real]
        positions = (real.long().cumsum(1) - 1)[real]
        tokens, last = ids[real], self.lengths.cumsum(0) - 1
        logits = torch.empty(len(self.slots), self.vocab)
        for start in range(0, len(tokens), ROWS):
            end = min(start + ROWS, len(tokens))
            here = (last >= start) & (last < end)
            part, chosen = torch.empty(int(here.sum()), self.vocab), self.chosen[here]
            token, slot, position = (t[start:end].contiguous() for t in (tokens, slots, positions))
            self.session.step(token, slot, position, last[here] - start, part, chosen)
            logits[here], self.chosen[here] = part, chosen
        return logits

    def next(self, tokens: Tensor) -> Tensor:
        logits = torch.empty(len(self.slots), self.vocab)
        self.session.step(tokens.contiguous(), self.slots, self.lengths, self.slots, logits, self.chosen)
        self.lengths = self.lengths + 1
        return logits

    def likeliest(self) -> Tensor:
        return self.chosen.clone()


@dataclass(frozen=True, slots=True)
class Ready:
    """A compiled program and what its sessions need."""

    lowered: Lowered
    program: Program
    attentions: list[tuple[Any, Callable[[int], tuple[Tensor, Tensor]] | None]]


def ready(model: Model, isa: Isa | None = None, threads: int | None = None) -> Ready:
    """The model's program, compiled; made once for a model, a set of instructions and a number of threads.

    It is made again when a weight was changed since, in place or not.

    Raises:
        Unlowered: in words, why the model runs in torch.
        EffcError: E502 when the compiler refuses the text.
    """
    chosen, members = isa or available()[0], threads or torch.get_num_threads()
    held: dict[Any, tuple[Content, Ready]] = model.__dict__.setdefault("_programs", {})
    found = held.get((chosen, members))
    if found is None or found[0] != content(model):
        made = _made(model, chosen, members)
        held[chosen, members] = found = content(model), made
    return found[1]


def _made(model: Model, isa: Isa, threads: int) -> Ready:
    if compiler() is None:
        raise Unlowered("there is no C compiler on this machine")
    if any(t.device.type not in ("cpu", "meta") for t in model.tensors().values()):
        raise Unlowered("the model's weights are not in this machine's memory")
    lowered = lower(model)
    turns: dict[str, Any] = {}
    attentions = []
    for spec, rope in lowered.attentions:
        turn = None
        if rope is not None and isinstance(spec, CachedAttentionSpec):
            turn = turns[str(rope)] = turns.get(str(rope)) or angles(rope, spec.head_dim)
        attentions.append((spec, turn))
    with torch.inference_mode(False):  # torch counts no changes of tensors that are made within it
        model.materialize()
        program = compiled(lowered, isa, threads)
        for name in program.tensors.keys() & model.tensors().keys():  # what moved serves the model too
            model.place(name, nn.Parameter(program.tensors[name], requires_grad=False))
    return Ready(lowered, program, attentions)


def decoder(
    model: Model, batch: int, longest: int, kernels: Kernels = "auto", isa: Isa | None = None
) -> Decoder:
    """What generates with `model`. auto: a program where weights are packed and the model can be lowered,
    in C, or as launches of Triton kernels where the weights are on a GPU.

    Raises:
        EffcError: E503 when `kernels` is c or triton and the model has no such program.
    """
    packed = any(isinstance(unit, Packed) for _, unit in model.units())
    if kernels in TRITON or (kernels == "auto" and packed and device_of(model).type == "cuda"):
        try:
            return LaunchedDecoder(launched(model, TRITON.get(kernels, "bfloat16")), batch, longest)
        except Unlowered as reason:
            if kernels in TRITON:
                raise no_program(reason, kernels) from None
    if kernels == "torch" or (kernels == "auto" and not packed):
        return TorchDecoder(model, longest)
    try:
        return ProgramDecoder(ready(model, isa), batch, longest)
    except Unlowered as reason:
        if kernels == "c":
            raise no_program(reason) from None
        return TorchDecoder(_by_torch(model) if packed and compiler() is None else model, longest)


def launched(model: Model, rows: Rows = "bfloat16") -> LaunchPlan:
    """The launches of a model on the GPU that holds its weights; made again when a weight was changed since.

    `rows` is what linear layers multiply (see passes/lower/gpu.py).

    Raises:
        Unlowered: in words, why the model runs in torch.
    """
    device = device_of(model)
    if device.type != "cuda":
        raise Unlowered(f"its weights are on {device.type}, and Triton kernels run on a GPU")
    held: tuple[Content, Rows, LaunchPlan] | None = model.__dict__.get("_launches")
    if held is None or held[:2] != (content(model), rows):
        model.__dict__["_launches"] = held = content(model), rows, launches(model, device, rows)
    return held[2]


def device_of(model: Model) -> torch.device:
    """Where the weights are."""
    return next((t.device for t in model.tensors().values() if not t.is_meta), torch.device("cpu"))


def no_program(reason: Unlowered, kernels: Kernels = "c") -> EffcError:
    """E503 for a model that was asked to run by kernels that it has none of."""
    help = f"leave out `--kernels {kernels}`: the model runs in torch"
    title = "the model has no C program" if kernels == "c" else "the model has no Triton kernels here"
    return EffcError(Diagnostic("E503", title, notes=(str(reason),), help=help))


def _by_torch(model: Model) -> Model:
    """The model on torch's packed ops, made once and again when a weight was changed since."""
    held: tuple[Content, Model] | None = model.__dict__.get("_by_torch")
    if held is None or held[0] != content(model):
        made = by_torch(model)
        model.__dict__["_by_torch"] = held = content(model), made
    return held[1]


def last_logits(model: Model, ids: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
    """Logits [B, V] behind the last of ids [B, T]; only that place goes through the head."""

    def narrow(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, -1:], *args[1:])

    handle = model.module("head").register_forward_pre_hook(narrow)
    try:
        logits: Tensor = model(ids, step=model.step(ids, mask, cache))
    finally:
        handle.remove()
    return logits[:, -1]
