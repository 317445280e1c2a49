"""Mixtures on a GPU: routing, experts whole, low-rank changes that rows choose; the host waits for none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from effc.compiler.blocks.tempered import gated, kept
from effc.kernels.gpu.caches import Caches
from effc.kernels.gpu.launches import Choice, Room
from effc.kernels.gpu.load import load
from effc.kernels.grouped_linear import emit_triton as grouped_triton
from effc.kernels.grouped_linear.layout_gpu import stack, together
from effc.kernels.grouped_linear.spec_gpu import GroupedLinearSpec, refuses
from effc.kernels.multi_lora import emit_triton as lora_triton
from effc.kernels.multi_lora.layout import pack
from effc.kernels.multi_lora.spec import MultiLoraGpuSpec
from effc.kernels.multi_lora.spec import refuses as lora_refuses
from effc.passes.lower import _weights as weights
from effc.passes.lower._gpu_fuse import Mixture
from effc.passes.lower._jobs import Matrix, Route, Unlowered
from effc.passes.lower._launching import Launching

RANKS = (16, 32, 64, 128)


def route(build: Launching, job: Route, layer: int | None) -> None:
    """The experts of every row, from the scores of all."""
    scores, out = job.reads[0], job.writes[-1]
    if job.form == "above":

        def temper(room: Room, _: Caches) -> None:
            p = torch.softmax(gated(room.values[scores].float(), job.act) / job.tau, -1)
            shares, chosen = kept(p, job.least)
            room.choices[out] = Choice(shares, chosen.int())

        why = "by torch: the kernel takes as many experts for each row"
        build.add("route", job, layer, temper, why=why)
        return
    spec = _spec(job.paths[0], experts=job.experts, active=job.active, renormalize=job.renormalize)
    module = load(grouped_triton.emit(spec))

    def choose(room: Room, _: Caches) -> None:
        rows = room.values[scores]
        shares = torch.empty(len(rows), job.active, device=rows.device)
        chosen = torch.empty(len(rows), job.active, dtype=torch.int32, device=rows.device)
        module.choose(rows, shares, chosen)
        room.choices[out] = Choice(shares, chosen)

    build.add("route", job, layer, choose, specs=(spec,))


def mix(build: Launching, job: Mixture, layer: int | None) -> None:
    """Rows by expert, gate and up, down, and their sum.

    Raises:
        Unlowered: no kernel takes such experts.
    """
    spec = mixture_spec(job)
    width, hidden = job.last.rows, job.last.columns
    if words := refuses(spec, 1, width, hidden):
        raise Unlowered(f"`{job.paths[0]}`: {words}")
    sides = {"up": job.first, "down": [job.last]}
    held: dict[str, Tensor] = {}
    for side, matrices in sides.items():
        found = build.made(partial(_stacked, build, spec, matrices))
        held |= {f"{side}_{name}": tensor for name, tensor in found.items()}
    module = load(grouped_triton.emit(spec))

    def run(rows: Tensor, choice: Choice, out: Tensor, room: Room) -> None:
        more = {"xsum": room.sums[x]} if spec.sums and x in room.sums else {}
        module.launch(rows, *choice, **held, **more, out=out)

    x = job.reads[0]
    why = "" if spec.packed else "the experts' weights are not packed"
    build.add("grouped_linear", job, layer, _over(job, run), specs=(spec,), why=why)


def adapt(build: Launching, job: Mixture, layer: int | None) -> None:
    """B A x of the changes that each row chooses: a row stands once for each, an adapter to every such row.

    Raises:
        Unlowered: their ranks or widths are none of the kernel's.
    """
    a, b = job.first[0], job.last
    n, k, rank = b.rows, a.columns, a.rows
    most = next((each for each in RANKS if each >= rank), 0)
    given: Any = {"rank": most, "columns": 128 if k % 128 == 0 else 64}
    words = lora_refuses(MultiLoraGpuSpec(**given), 1, n, k, a.experts * rank, rank) if most else None
    if words or not most:
        words = words or f"changes of rank {rank}, the kernel takes {RANKS[-1]}"
        raise Unlowered(f"`{job.paths[0]}`: {words}")
    spec = MultiLoraGpuSpec(**given)
    held = build.made(lambda: _changes(build, a, b))
    module = load(lora_triton.emit(spec))

    def run(rows: Tensor, choice: Choice, out: Tensor, _: Room) -> None:
        copies = rows.repeat_interleave(job.active, 0)
        nothing = torch.zeros(len(copies), n, dtype=rows.dtype, device=rows.device)
        y = module.launch(copies, **held, index=choice.chosen.flatten().long(), base=nothing)
        shares = choice.weights.to(y.dtype)
        torch.bmm(shares.unsqueeze(1), y.view(len(rows), job.active, n), out=out.unsqueeze(1))

    build.add("multi_lora", job, layer, _over(job, run), specs=(spec,))


def mixture_spec(job: Mixture) -> GroupedLinearSpec:
    """The kernel of a mixture with gates.

    Raises:
        Unlowered: its matrices are stored in ways that no kernel has together.
    """
    first, last = job.first[0], job.last
    form: dict[str, Any] = {"experts": first.experts, "active": job.active, "activation": job.activation}
    if first.quantized != last.quantized:
        raise Unlowered(f"`{job.paths[0]}`: experts whose matrices are packed in different ways")
    if first.quantized is not None:
        bits, group, symmetric, scale = first.quantized
        form |= {"bits": bits, "group": group, "symmetric": symmetric, "scale": scale}
        whole = all(m.columns % 128 == 0 for m in (first, last))
        fits = not group or group % 128 == 0 or 128 % group == 0
        form["columns"] = 128 if whole and fits else 64
    return _spec(job.paths[0], **form)


def _spec(path: str, **form: Any) -> GroupedLinearSpec:
    try:
        return GroupedLinearSpec(**form)
    except ValidationError as error:
        words = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise Unlowered(f"`{path}`: experts on a GPU: {words}") from None


def _over(
    job: Mixture, run: Callable[[Tensor, Choice, Tensor, Room], None]
) -> Callable[[Room, Caches], None]:
    """The launch over the rows at hand, with equal weights where the model has none, and the residual."""
    x, chosen, out = job.reads[0], job.reads[1], job.writes[0]

    def go(room: Room, _: Caches) -> None:
        choice, y = room.choices[chosen], room.values[out]
        if not job.weighted:
            choice = Choice(torch.ones_like(choice.chosen, dtype=torch.float32), choice.chosen)
        run(room.values[x], choice, y, room)
        if job.residual:
            y.add_(room.values[job.reads[-1]])

    return go


def _stacked(build: Launching, spec: GroupedLinearSpec, matrices: list[Matrix]) -> dict[str, Tensor | None]:
    """One matrix of every expert as the kernel reads it, gate and up together."""
    each: list[list[Tensor]] = []
    for m in matrices:
        if spec.packed is None:
            whole = build.tensor(m.tensor, torch.bfloat16)
            each.append([whole.view(m.experts, m.rows, m.columns)])
        else:
            codes, scales, zeros = weights.codes(build.model, spec.packed, m)
            parts = [codes, scales] if spec.symmetric else [codes, scales, zeros]
            each.append([t.reshape(m.experts, m.rows, -1) for t in parts])
    both = [together(*pair) if len(pair) == 2 else pair[0] for pair in zip(*each, strict=True)]
    more: list[Tensor | None] = [*both[1:], None, None]
    return stack(spec, both[0], more[0], more[1])._asdict()


def _changes(build: Launching, a: Matrix, b: Matrix) -> dict[str, Tensor | None]:
    """a [Z, r, K] and b [Z, N, r] side by side as the kernel reads them."""
    first, second = (build.tensor(m.tensor, torch.bfloat16) for m in (a, b))
    made = pack([(first[i], second[i], 1.0) for i in range(a.experts)])
    return {**made._asdict(), "b": made.b.to(torch.bfloat16)}
