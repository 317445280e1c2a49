"""Attention on a GPU: heads turned and put in the cache; one kernel for prompts, another for new tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from torch import Tensor

from effc.compiler.blocks.rope import rotated
from effc.kernels.attention import emit_triton as attention_triton
from effc.kernels.attention.spec import AttentionGpuSpec
from effc.kernels.gpu.caches import Caches
from effc.kernels.gpu.launches import Attended, Room
from effc.kernels.gpu.load import load
from effc.kernels.kernel import KernelSpec
from effc.kernels.rope import emit_triton as rope_triton
from effc.kernels.rope.emit_triton import RopeGpuSpec
from effc.kernels.shared_prefix import emit_triton as prefix_triton
from effc.kernels.shared_prefix.spec import SharedPrefixSpec
from effc.kernels.shared_prefix.spec import refuses as prefix_refuses
from effc.passes.lower._gpu_norm import normalizer
from effc.passes.lower._jobs import Attend, Unlowered
from effc.passes.lower.decoder import angles

if TYPE_CHECKING:
    from effc.passes.lower._launching import Launching

WGMMA = 64
"""Rows that the matrix unit of a Hopper takes at least."""


def attend(build: Launching, job: Attend, layer: int | None) -> None:
    """Three launches: heads, then attention over the rows of a prompt or over the cache."""
    number, spec = len(build.attentions), _spec(job)
    if words := prefix_refuses(spec, 1, 1):
        raise Unlowered(f"`{job.paths[0]}`: {words}")
    turns = None
    if job.rope is not None:
        key = str((job.rope, job.head_dim))
        turns = build.angles.setdefault(key, angles(job.rope, job.head_dim))
    build.attentions.append(Attended(spec, turns, job.window))
    heads = _Heads(build, job, number)
    names = ("heads", "kv_heads", "head_dim", "scale", "cap")
    prompt = AttentionGpuSpec.model_validate(
        {"window": job.window} | {name: getattr(spec, name) for name in names}
    )
    over_prompt, over_cache = load(attention_triton.emit(prompt)), load(prefix_triton.emit(spec))
    out, shape = job.writes[0], (-1, job.heads, job.head_dim)

    def run(room: Room, caches: Caches) -> None:
        y = room.values[out].view(shape)
        if room.starts is not None:
            q, k, v = heads.of_prompt(room, caches)
            sums = torch.empty(job.heads, room.rows, device=q.device)
            over_prompt.forward(q, k, v, room.starts, y, sums)
            return
        q = heads.of_token(room, caches)
        keys, values = caches.pairs[number]
        span = caches.spans[number]
        plan = caches.plans[spec, span]._asdict()
        ends = {"begin": caches.begins[span], "end": caches.ends[span]}
        over_cache.launch(q, keys, values, **ends, **plan, parts=caches.parts[spec, span], out=y)

    why = ""
    if job.head_dim < WGMMA:
        why = f"heads of {job.head_dim} fill no wgmma, whose rows are {WGMMA}: mma multiplies for new tokens"
    build.add("attend", job, layer, run, specs=(*heads.specs, prompt, spec), why=why)


class _Heads:
    """q, k and v of one attention: taken out of their projection, normed and turned, k and v in the cache."""

    def __init__(self, build: Launching, job: Attend, number: int) -> None:
        self.job, self.number = job, number
        self.specs: tuple[KernelSpec, ...] = ()
        self.norms = [
            None if norm is None else normalizer(build, norm, job.head_dim)
            for norm in (job.q_norm, job.k_norm)
        ]
        self.specs += tuple(found[1] for found in self.norms if found is not None)
        if job.rope is not None:
            form = {"heads": job.heads, "kv_heads": job.kv_heads, "head_dim": job.head_dim}
            form |= {"rotated": rotated(job.rope, job.head_dim)}
            specs = [RopeGpuSpec(**form, cache=cache) for cache in (False, True)]
            self.packed, self.cached = (load(rope_triton.emit(spec)) for spec in specs)
            self.specs += tuple(specs)

    def of_prompt(self, room: Room, caches: Caches) -> tuple[Tensor, Tensor, Tensor]:
        """q [M, H, h], k and v [M, Hk, h], which go to the cache as well"""
        rows, found = self._together(room), caches.angles[self.number]
        job = self.job
        if found is None:
            q, k, v = self._split(rows)
        else:
            counts = (job.heads, job.kv_heads, job.kv_heads)
            q, k, v = (rows.new_empty(len(rows), count, job.head_dim) for count in counts)
            self.packed.forward(rows, *found, room.position, q, k, v)
        caches.store(self.number, room, k, v)
        return q, k, v

    def of_token(self, room: Room, caches: Caches) -> Tensor:
        """q [B, H, h]; k and v go to the cache alone"""
        rows, found = self._together(room), caches.angles[self.number]
        if found is None:
            q, k, v = self._split(rows)
            caches.store(self.number, room, k, v)
            return q
        q = rows.new_empty(len(rows), self.job.heads, self.job.head_dim)
        places = room.places[caches.spans[self.number]]
        self.cached.forward(rows, *found, room.position, places, q, *caches.pairs[self.number])
        return q

    def _together(self, room: Room) -> Tensor:
        """[M, (H + 2 Hk) h] heads of q, k and v side by side, normed"""
        job, h = self.job, self.job.head_dim
        widths = (job.heads * h, job.kv_heads * h, job.kv_heads * h)
        whole = room.values[job.reads[0]]
        behind = (0, widths[0], widths[0] + widths[1])
        joined = len(set(job.reads)) == 1 and tuple(job.offsets) == behind and whole.shape[1] == sum(widths)
        if joined and self.norms == [None, None]:
            return whole
        given = zip(job.reads, job.offsets, widths, strict=True)
        parts = [room.values[n][:, at : at + width] for n, at, width in given]
        for i, found in enumerate(self.norms):
            if found is not None:
                x = parts[i].reshape(-1, h)
                y = torch.empty_like(x)
                found[0](x, y)
                parts[i] = y.view(room.rows, -1)
        return torch.cat(parts, 1)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        job = self.job
        counts = (job.heads, job.kv_heads, job.kv_heads)
        q, k, v = rows.view(len(rows), -1, job.head_dim).split(counts, 1)
        return q.contiguous(), k.contiguous(), v.contiguous()


def _spec(job: Attend) -> SharedPrefixSpec:
    try:
        return SharedPrefixSpec.model_validate(
            {name: getattr(job, name) for name in ("heads", "kv_heads", "head_dim", "scale", "cap")}
        )
    except ValidationError as error:
        raise Unlowered(f"`{job.paths[0]}`: attention on a GPU: {error.errors()[0]['msg']}") from None
