"""Gated recurrences on a GPU: rows made ready, then chunks for a prompt, a step for every token behind it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from effc.kernels.gpu.caches import Caches
from effc.kernels.gpu.launches import Room
from effc.kernels.gpu.load import load
from effc.kernels.linear_attention import emit_triton as linear_triton
from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec, refuses
from effc.passes.lower._gpu_norm import normalizer
from effc.passes.lower._jobs import Scan, Unlowered
from effc.passes.lower._launching import Launching


def scan(build: Launching, job: Scan, layer: int | None) -> None:
    """One launch: a prompt's states begin empty and are kept; a token's change in place.

    Raises:
        Unlowered: no kernel has such gates or widths.
    """
    spec = _spec(job)
    if words := refuses(spec, 1, str(job.form["over"])):
        raise Unlowered(f"`{job.paths[0]}`: {words}")
    number = len(build.recurrences)
    build.recurrences.append(spec)
    rows = _Rows(build, job, spec)
    module, out = load(linear_triton.emit(spec)), job.writes[0]

    def run(room: Room, caches: Caches) -> None:
        given, state = rows.of(room), caches.states[number]
        y = room.values[out].view(-1, spec.heads, spec.value_dim)
        if room.starts is None:
            module.step(*given, state, y, state)
        else:
            module.forward(*given, room.starts, None, y, state)
        if job.residual:
            room.values[out].add_(room.values[job.reads[-1]])

    why = "gates and softmaxes of rows are made by torch before"
    build.add("linear_attention", job, layer, run, specs=(*rows.specs, spec), why=why)


class _Rows:
    """What a recurrence takes of a call's rows: q, k, v and log gates, as RecurrentSpec (C) defines them."""

    def __init__(self, build: Launching, job: Scan, spec: LinearAttentionGpuSpec) -> None:
        self.job, self.spec = job, spec
        given = zip(("q", "k"), (job.q_norm, job.k_norm), strict=True)
        self.norms = {name: normalizer(build, norm, job.key_dim) for name, norm in given if norm is not None}
        self.specs = tuple(found[1] for found in self.norms.values())

    def of(self, room: Room) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [M, H, K], k [M, Hk, K], v [M, Hk, V] bfloat16, gates [M, Hk, K or 1] float32"""
        job, spec, form = self.job, self.spec, self.job.form
        pool = int(form.get("pool", 1))
        places = iter(zip(job.reads, job.offsets, strict=False))
        q = self._taken(room, *next(places), spec.heads, spec.key_dim)
        x = self._taken(room, *next(places), spec.kv_heads, spec.gates * pool)
        opened = x.float().unflatten(-1, (spec.gates, pool)).mean(-1)
        gates = (F.logsigmoid(opened) / form["divisor"]).contiguous()
        if form["k"] == "entry":
            k = -torch.expm1(gates).to(q.dtype)
        else:
            k = self._made("k", self._taken(room, *next(places), spec.kv_heads, spec.key_dim))
        v = self._taken(room, *next(places), spec.kv_heads, spec.value_dim).contiguous()
        return self._made("q", q), k.contiguous(), v, gates

    def _taken(self, room: Room, number: int, at: int, heads: int, width: int) -> Tensor:
        part: Tensor = room.values[number][:, at : at + heads * width].unflatten(1, (heads, width))
        return part

    def _made(self, name: str, x: Tensor) -> Tensor:
        """A side normed and brought to shares of one, where the model does."""
        if name in self.norms:
            rows = x.reshape(-1, self.spec.key_dim)
            y = torch.empty_like(rows)
            self.norms[name][0](rows, y)
            x = y.view_as(x)
        if self.job.form[name] == "softmax":
            x = torch.softmax(x.float(), -1).to(x.dtype)
        return x.contiguous()


def _spec(job: Scan) -> LinearAttentionGpuSpec:
    given: dict[str, Any] = {
        name: getattr(job, name) for name in ("heads", "kv_heads", "key_dim", "value_dim")
    }
    given |= {"scale": job.form["scale"], "gate": "head" if job.form["shared"] else "key"}
    if job.form["v"] == "entry":
        raise Unlowered(f"`{job.paths[0]}`: what gates let in stands for values, which the kernels have not")
    try:
        return LinearAttentionGpuSpec(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][-1]}: " if first["loc"] else ""
        raise Unlowered(f"`{job.paths[0]}`: a recurrence on a GPU: {where}{first['msg']}") from None
