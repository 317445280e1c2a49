"""The C calls of a recurrence: make rows ready, then let states pass over them."""

from __future__ import annotations

from pydantic import ValidationError

from effc.kernels.linear_attention import emit_c
from effc.kernels.linear_attention.spec_c import RecurrentSpec, refuses
from effc.kernels.program.call import Split
from effc.passes.lower import _weights as weights
from effc.passes.lower._builder import FLOAT, Builder
from effc.passes.lower._jobs import Scan, Unlowered


def scan(build: Builder, job: Scan) -> None:
    spec = _spec(job)
    out = build.out(job, instead=job.reads[-1] if job.residual else None)
    queries, keys, values, decay = (f"{out}{letter}" for letter in "qkvd")
    pairs = spec.kv_heads * FLOAT
    build.widths |= {queries: spec.heads * spec.key_dim * FLOAT, keys: pairs * spec.key_dim}
    build.widths |= {decay: pairs * spec.gates} | ({values: pairs * spec.gates} if spec.v == "entry" else {})
    names = [build.names[n] for n in job.reads]
    sources = [
        (f"(const float *){{{name}}} + {at}", build.jobs.widths[number])
        for name, at, number in zip(names, job.offsets, job.reads, strict=False)
    ]
    q, x, *rest = sources
    k = ("NULL", 0) if spec.k == "entry" else rest.pop(0)
    v = (f"{{{values}}}", spec.kv_heads * spec.gates) if spec.v == "entry" else rest.pop(0)
    norms = [n for n in (job.q_norm, job.k_norm) if n is not None and n.weight is not None]
    tensors = [build.keep(f"{n.weight}:f32", weights.float32(build.model, str(n.weight))) for n in norms]
    gains = [f"{{{i}}}" for i in range(len(tensors))] or ["NULL", "NULL"]
    made = [queries, keys, *([values] if spec.v == "entry" else []), decay]
    last = f"{{{values}}}" if spec.v == "entry" else "NULL"
    prepare = (
        f"prepare_{spec.key}({q[0]}, {k[0]}, {x[0]}, {q[1]}, {k[1]}, {x[1]}, {', '.join(gains)},\n"
        f"      {{{queries}}}, {{{keys}}}, {last}, {{{decay}}}, i0, i1);"
    )
    recur = (
        f"recur_{spec.key}({{{queries}}}, {{{keys}}}, {v[0]}, {v[1]}, {{{decay}}}, a->slot, a->position,\n"
        f"      {{cache}}.keys, {{{out}}}, M, i0, i1);"
    )
    functions, build_reads = [emit_c.function(spec)], list(dict.fromkeys(names))
    build.attentions.append((spec, None))
    build.add(
        "prepare", Split.ITEMS, build_reads, made, prepare, job, tensors, functions, f"M * {spec.kv_heads}",
        specs=[spec],
    )  # fmt: skip
    build.add(
        "recur", Split.ITEMS, [*made, *build_reads], [out], recur, job, (), functions,
        str(spec.kv_heads * spec.blocks), specs=[spec], opens=True,
    )  # fmt: skip


def _spec(job: Scan) -> RecurrentSpec:
    norm = job.q_norm or job.k_norm
    given = job.form | {"residual": job.residual}
    if norm is not None:
        given |= {"norm": norm.eps, "norm_offset": norm.offset}
    sizes = {"heads": job.heads, "kv_heads": job.kv_heads, "key_dim": job.key_dim, "value_dim": job.value_dim}
    try:
        spec = RecurrentSpec.model_validate(sizes | given)
    except ValidationError as error:
        raise Unlowered(f"`{job.paths[0]}`: {error.errors()[0]['msg']}") from None
    if words := refuses(spec):
        raise Unlowered(f"`{job.paths[0]}`: {words}")
    return spec
