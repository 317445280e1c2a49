"""A decoder model as launches of a GPU: expand, collect, fuse, choose kernels, share buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from effc.compiler.flat import flatten
from effc.compiler.model import Model
from effc.kernels.gpu.launches import LaunchPlan
from effc.passes.lower._collect import collect
from effc.passes.lower._fuse import fuse
from effc.passes.lower._gpu_fuse import fuse_for_gpu
from effc.passes.lower._jobs import Job, Jobs, Route, Unlowered
from effc.passes.lower._launches import launch
from effc.passes.lower._launching import Launching, Rows

__all__ = ["Rows", "Unlowered", "launches"]


def launches(model: Model, device: torch.device, rows: Rows = "bfloat16") -> LaunchPlan:
    """The launches of a model whose weights are in memory; packed ones go to the device as kernels read them.

    On the device `meta` they have no tensors and can be read alone; no weights are needed then. `rows` is
    what linear layers multiply: bytes where it says so and a kernel has them (see _gpu_bytes.py).

    Raises:
        Unlowered: in words, what has no launch; the model runs in torch then.
        EffcError: E504 when Triton is not installed.
    """
    try:
        jobs = fuse_for_gpu(fuse(collect(model, flatten(model))))
    except TypeError as error:
        raise Unlowered(str(error)) from error
    layers = jobs.layers()
    last = max((i for i, layer in enumerate(layers) if layer is not None), default=-1)
    if not -1 < last < len(jobs.jobs) - 1:
        raise Unlowered("nothing stands behind the layers, or there are none")
    build = Launching(model, jobs, device, rows)
    tail = 0
    for number, (job, layer) in enumerate(zip(jobs.jobs, layers, strict=True)):
        if number == last + 1:
            tail = len(build.launches)
        launch(build, job, layer)
    stream = jobs.jobs[last + 1].reads[0]
    if any(
        n != stream and n not in _made(jobs.jobs[last + 1 :]) for j in jobs.jobs[last + 1 :] for n in j.reads
    ):
        raise Unlowered("what stands behind the layers reads more than their result")
    places, widths = _placed(jobs)
    return LaunchPlan(
        tuple(build.launches), tail, stream, jobs.output, places, widths,
        tuple(build.attentions), tuple(build.recurrences), device,
    )  # fmt: skip


def _made(jobs: Sequence[Job]) -> set[int]:
    return {number for job in jobs for number in job.writes}


def _placed(jobs: Jobs) -> tuple[dict[int, int], Mapping[int, int]]:
    """Value -> buffer, and the width of each buffer: one that nobody reads any more serves the next value.

    Choices of experts are no rows of bfloat16, and stand by themselves.
    """
    last = {n: i for i, job in enumerate(jobs.jobs) for n in (*job.writes, *job.reads)}
    last[jobs.output] = len(jobs.jobs)
    free: dict[int, list[int]] = {}
    places: dict[int, int] = {}
    widths: dict[int, int] = {}
    for i, job in enumerate(jobs.jobs):
        for number in () if isinstance(job, Route) else job.writes:
            width = jobs.widths[number]
            waiting = free.setdefault(width, [])
            places[number] = waiting.pop() if waiting else len(widths)
            widths[places[number]] = width
        for number in dict.fromkeys((*job.reads, *job.writes)):
            if last[number] == i and number in places:
                free.setdefault(jobs.widths[number], []).append(places[number])
    return places, widths
