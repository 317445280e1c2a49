"""The C calls of mixtures: route, spread rows by expert, multiply, combine."""

from __future__ import annotations

from typing import Any

from effc.kernels.dense_linear.spec import BLOCK as VECTOR
from effc.kernels.dense_linear.spec import DenseLinearSpec
from effc.kernels.experts import combine as combine_c
from effc.kernels.experts import linear as linear_c
from effc.kernels.experts import route as route_c
from effc.kernels.experts import spread as spread_c
from effc.kernels.experts.combine import CombineSpec
from effc.kernels.experts.linear import ExpertLinearSpec
from effc.kernels.experts.route import RouteSpec
from effc.kernels.experts.spread import SpreadSpec
from effc.kernels.program.call import Split
from effc.kernels.quant_linear import emit_c as quant_c
from effc.kernels.quant_linear.spec import BLOCK
from effc.kernels.quant_linear.spec import refuses as quant_refuses
from effc.passes.lower import _weights as weights
from effc.passes.lower._builder import FLOAT, Builder
from effc.passes.lower._jobs import Combine, Experts, Job, Route, Unlowered
from effc.passes.lower._matrices import as_bytes, packed, quant_spec, stored


def route(build: Builder, job: Route) -> None:
    given: dict[str, Any] = {"form": job.form, "act": job.act}
    spec = RouteSpec(
        experts=job.experts,
        active=job.active,
        renormalize=job.renormalize,
        tau=job.tau,
        least=job.least,
        **given,
    )
    scores, out = build.names[job.reads[0]], [build.names[n] for n in job.writes]
    build.widths |= {build.names[n]: build.jobs.widths[n] * FLOAT for n in job.writes}
    first = f"{{{out[0]}}}" if len(out) > 1 else "NULL"
    text = f"route_{spec.key}({{{scores}}}, {first}, {{{out[-1]}}}, r0, r1);"
    build.scores[out[-1]] = scores
    build.add("route", Split.ROWS, [scores], out, text, job, (), [route_c.function(spec)], specs=[spec])


def experts(build: Builder, job: Experts) -> None:
    """Rows by expert, unless they stand so already, then every expert's matrix on its own."""
    first = job.matrices[0]
    n, k, choice = job.width, first.columns, build.names[job.reads[1]]
    out = build.out(job)
    counts: dict[str, Any] = {"experts": first.experts, "active": job.active}
    if first.quantized is None:
        inner = DenseLinearSpec(weight=stored(first.dtype), paired=job.paired, epilogue=job.epilogue)
        spec = ExpertLinearSpec(**counts, dense=inner)
        rows = _by_expert(build, job, [(build.names[job.reads[0]], k * FLOAT)])
        names = [build.keep(m.tensor, weights.stored(build.model, m.tensor)) for m in job.matrices]
        w, items = "{0}, " + ("{1}" if job.paired else "NULL"), -(-n // VECTOR)
        functions, why = [linear_c.inner(spec), linear_c.function(spec)], "the weights are not packed"
    else:
        each = quant_spec(first, job.epilogue, job.paired)
        if words := quant_refuses(each, n, k):
            raise Unlowered(f"`{job.paths[0]}`: {words}")
        spec, width = ExpertLinearSpec(**counts, packed=each), each.group or k
        parts = as_bytes(build, job, width, job.active if job.placed else 1)
        sizes = (k, k // width * FLOAT, k // width * FLOAT)
        rows = _by_expert(build, job, list(zip(parts, sizes, strict=True)))
        names = [packed(build, each, job.matrices)]
        w, items = (
            f"{{0}}, {each.bytes(n * (2 if job.paired else 1), k)}",
            -(-n // (BLOCK // (1 + job.paired))),
        )
        functions, why = [quant_c.QUANTIZE, linear_c.inner(spec), linear_c.function(spec)], ""
    # What all members read by rows is held until they meet again: with few rows no barrier stands between.
    source = build.names[job.reads[0]] if job.placed else build.scores.pop(choice, "")
    held = [source] if source else []
    x = ", ".join(f"{{{name}}}" for name in rows)
    text = f"expert_linear_{spec.key}({{{choice}}}, {x}, {w}, {{{out}}}, M, {n}, {k}, i0, i1);"
    build.add(
        "expert_linear", Split.ITEMS, [choice, *rows, *held], [out], text, job, names, functions, str(items),
        why, [spec],
    )  # fmt: skip


def combine(build: Builder, job: Combine) -> None:
    names = [build.names[n] for n in job.reads]
    z, place = names[0], build.places[names[1]]
    out = build.out(job, instead=job.reads[-1] if job.residual else None)
    spec = CombineSpec(active=job.active, weighted=job.weighted, residual=job.residual)
    given = [names[2]] if job.weighted else []
    by = f"{{{names[2]}}}" if job.weighted else "NULL"
    given += [names[-1]] if job.residual else []
    residual = f"{{{names[-1]}}}" if job.residual else "NULL"
    width = build.jobs.widths[job.writes[0]]
    text = f"combine_{spec.key}({{{z}}}, {{{place}}}, {by}, {residual}, {{{out}}}, {width}, s0, s1);"
    build.add(
        "combine", Split.SHARED_ROWS, [z, place, *given], [out], text, job, (), [combine_c.function(spec)],
        specs=[spec], across=True,
    )  # fmt: skip


def _by_expert(build: Builder, job: Experts, arrays: list[tuple[str, int]]) -> list[str]:
    """Buffers that hold the rows of arrays (name, bytes a row) by expert, made once for all readers."""
    if job.placed:
        return [name for name, _ in arrays]
    choice = build.names[job.reads[1]]
    out = [f"{name}_{choice}" for name, _ in arrays]
    if out[0] in build.widths:
        return out
    place = build.places[choice] = f"{out[0]}p"
    build.widths |= {name: job.active * size for name, (_, size) in zip(out, arrays, strict=True)}
    build.widths[place] = job.active * FLOAT
    spec = SpreadSpec(experts=job.matrices[0].experts, active=job.active)
    copies = [f"{{{a}}}, {{{b}}}, {size}" for (a, size), b in zip(arrays, out, strict=True)]
    copies += ["NULL, NULL, 0"] * (3 - len(copies))
    text = f"spread_{spec.key}({{{choice}}}, {{{place}}}, M, {', '.join(copies)}, r0, r1);"
    reads = [choice, *(name for name, _ in arrays)]
    whose = Job(job.reads, job.writes, job.paths)
    build.add(
        "spread", Split.ROWS, reads, [place, *out], text, whose, (), [spread_c.function(spec)], specs=[spec],
        across=True,
    )  # fmt: skip
    return out
