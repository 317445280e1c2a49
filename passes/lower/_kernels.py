"""Which kernel does which job, and the C statement that calls it."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError

from effc.compiler.blocks.rope import rotated
from effc.kernels import elementwise, recurrent_cell
from effc.kernels.binary_planes import emit_c as planes_c
from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.cached_attention import emit_c as attention_c
from effc.kernels.cached_attention.spec import CachedAttentionSpec
from effc.kernels.cached_attention.spec import refuses as attention_refuses
from effc.kernels.dense_linear import emit_c as dense_c
from effc.kernels.dense_linear.spec import DenseLinearSpec
from effc.kernels.elementwise import ElementwiseSpec
from effc.kernels.embed import emit_c as embed_c
from effc.kernels.embed.spec import EmbedSpec
from effc.kernels.norm import emit_c as norm_c
from effc.kernels.norm.spec import NormSpec
from effc.kernels.program.call import ROWS, Split
from effc.kernels.quant_linear import emit_c as quant_c
from effc.kernels.quant_linear.spec import BLOCK
from effc.kernels.quant_linear.spec import refuses as quant_refuses
from effc.kernels.recurrent_cell import RecurrentCellSpec
from effc.kernels.sparse_linear import emit_c as sparse_c
from effc.passes.lower import _experts as experts
from effc.passes.lower import _weights as weights
from effc.passes.lower._builder import Builder
from effc.passes.lower._jobs import (
    Arithmetic,
    Attend,
    Cell,
    Combine,
    Embed,
    Experts,
    Job,
    Linear,
    Normalize,
    Route,
    Scan,
    Unlowered,
)
from effc.passes.lower._matrices import (
    as_bytes,
    further,
    packed,
    planes_spec,
    quant_spec,
    sparse_spec,
    stored,
)
from effc.passes.lower._scans import scan


def kernel(build: Builder, job: Job) -> None:
    """Append the calls of one job.

    Raises:
        Unlowered: no C kernel does it.
    """
    if isinstance(job, Embed):
        _embed(build, job)
    elif isinstance(job, Normalize):
        _normalize(build, job)
    elif isinstance(job, Route):
        experts.route(build, job)
    elif isinstance(job, Experts):
        experts.experts(build, job)
    elif isinstance(job, Combine):
        experts.combine(build, job)
    elif isinstance(job, Scan):
        scan(build, job)
    elif isinstance(job, Cell):
        _cell(build, job)
    elif isinstance(job, Linear):
        _linear(build, job)
    elif isinstance(job, Attend):
        _attend(build, job)
    elif isinstance(job, Arithmetic):
        _arithmetic(build, job)


def _arithmetic(build: Builder, job: Arithmetic) -> None:
    """What no matrix takes into its epilogue, number by number; the result may lie on the first operand."""
    given: dict[str, Any] = {
        "form": {"gate": "mul", "times": "mul"}.get(job.name, job.name),
        "each": job.each,
    }
    if job.name in ("scale", "softcap"):
        given["factor"] = job.number
    tensors = []
    if job.tensor is not None:
        given["each"] = 0
        tensors.append(build.keep(f"{job.tensor}:f32", weights.float32(build.model, job.tensor)))
    try:
        spec = ElementwiseSpec(**given)
    except ValidationError as error:
        raise Unlowered(f"`{job.name}` of {job.number}: {error.errors()[0]['msg']}") from None
    reads = [build.names[n] for n in job.reads]
    out, width = build.out(job, instead=job.reads[0]), build.jobs.widths[job.writes[0]]
    second = "{0}" if tensors else f"{{{reads[1]}}}" if len(reads) > 1 else "NULL"
    text = f"elementwise_{spec.key}({{{reads[0]}}}, {second}, {{{out}}}, i0, i1);"
    functions, items = [elementwise.function(spec)], f"M * {width}"
    build.add("elementwise", Split.ITEMS, reads, [out], text, job, tensors, functions, items, specs=[spec])


def _cell(build: Builder, job: Cell) -> None:
    width = build.jobs.widths[job.writes[0]]
    spec = RecurrentCellSpec(cell=job.form, width=width)
    reads, out = [build.names[n] for n in job.reads], build.out(job)
    names = [build.keep(f"{job.tensor}:f32", weights.float32(build.model, job.tensor))]
    gates = ", ".join(f"{{{name}}}" for name in reads)
    text = (
        f"recurrent_cell_{spec.key}({gates}, {{0}}, a->slot, a->position, {{cache}}.keys, {{{out}}},\n"
        "      M, i0, i1);"
    )
    functions, items = [recurrent_cell.function(spec)], str(-(-width // 16))
    build.attentions.append((spec, None))
    build.add(
        "recurrent_cell", Split.ITEMS, reads, [out], text, job, names, functions, items, specs=[spec],
        opens=True,
    )  # fmt: skip


def _embed(build: Builder, job: Embed) -> None:
    model, table, out = build.model, job.table, build.out(job)
    given: dict[str, Any] = {"scale": job.scale}
    if table.quantized is None:
        given["table"] = stored(table.dtype)
        names = [build.keep(table.tensor, weights.stored(model, table.tensor))]
    else:
        given |= {"table": None, "packed": quant_spec(table, (), False)}
        names = [packed(build, given["packed"], [table])]
    pointers = ["{0}", "NULL", "NULL"]
    more = {"positions": job.positions[0] if job.positions else None, "types": job.types}
    for slot, (key, tensor) in enumerate(more.items(), 1):
        if tensor is not None:
            given[key] = stored(str(model.tensors()[tensor].dtype).removeprefix("torch."))
            pointers[slot] = f"{{{len(names)}}}"
            names.append(build.keep(tensor, weights.stored(model, tensor)))
    if job.positions is not None:
        given["position_offset"] = job.positions[1]
    spec = EmbedSpec(**given)
    text = (
        f"embed_{spec.key}(a->token, a->position, {', '.join(pointers)}, {{{out}}}, {table.columns}, s0, s1);"
    )
    build.add("embed", Split.SHARED_ROWS, [], [out], text, job, names, [embed_c.function(spec)], specs=[spec])


def _normalize(build: Builder, job: Normalize) -> None:
    x, out, width = build.names[job.reads[0]], build.out(job), build.jobs.widths[job.reads[0]] // job.parts
    form: Any = job.form
    spec = NormSpec(form=form, eps=job.eps, offset=job.offset, bias=job.bias is not None)
    held = [name for name in (job.weight, job.bias) if name is not None]
    names = [build.keep(f"{n}:f32", weights.float32(build.model, n)) for n in held]
    if job.weight is None:
        names = [build.keep(f"ones:{width}", lambda: torch.ones(width)), *names]
    bias, by = "{1}" if job.bias else "NULL", f" * {job.parts}" if job.parts > 1 else ""
    text = f"norm_{spec.key}({{{x}}}, {{0}}, {bias}, {{{out}}}, {width}, r0{by}, r1{by});"
    build.add("norm", Split.ROWS, [x], [out], text, job, names, [norm_c.function(spec)], specs=[spec])


def _quantized(build: Builder, job: Linear) -> None:
    k, n = job.matrices[0].columns, job.width
    spec = quant_spec(job.matrices[0], job.epilogue, job.paired)
    if words := quant_refuses(spec, n, k):
        raise Unlowered(f"`{job.paths[0]}`: {words}")
    q, scales, sums = as_bytes(build, job, spec.group or k)
    out = build.out(job, instead=job.reads[-1] if "residual" in job.epilogue else None)
    sparse, why = sparse_spec(build, spec, job)
    one = quant_c.function(spec)
    if sparse is None:
        name, names, functions = f"quant_linear_{spec.key}", [packed(build, spec, job.matrices)], [one]
    else:
        name, functions = f"sparse_linear_{sparse.key}", [one, sparse_c.function(sparse)]
        parts = weights.sparse(build.model, sparse, job.matrices)
        whole = "+".join(m.tensor for m in job.matrices)
        names = [build.keep(f"{whole}:{sparse.key}.{part}", make) for part, make in parts.items()]
    matrix = ", ".join(f"{{{i}}}" for i in range(len(names)))
    extra, reads = further(build, job, names)
    text = f"{name}({{{q}}}, {{{scales}}}, {{{sums}}}, {matrix}, {{{out}}}{extra}, M, {n}, {k}, i0, i1);"
    items = str(-(-n // (BLOCK // 2 if spec.paired else BLOCK)))
    build.add(
        "quant_linear" if sparse is None else "sparse_linear", Split.ITEMS, [q, scales, sums, *reads], [out],
        text, job, names, [quant_c.QUANTIZE, *functions], items, why, [sparse or spec],
    )  # fmt: skip


def _linear(build: Builder, job: Linear) -> None:
    """By how the weights are stored."""
    first = job.matrices[0]
    if first.quantized is not None:
        return _quantized(build, job)
    found = planes_spec(first, job.epilogue) if first.planes is not None else "the weights are not packed"
    return _dense(build, job, found) if isinstance(found, str) else _planes(build, job, found)


def _planes(build: Builder, job: Linear, spec: BinaryPlanesSpec) -> None:
    k, n, x = job.matrices[0].columns, job.width, build.names[job.reads[0]]
    out = build.out(job, instead=job.reads[-1] if "residual" in job.epilogue else None)
    made = weights.planes(build.model, spec, job.matrices[0])
    names = [build.keep(f"{job.matrices[0].tensor}:{part}", make) for part, make in made.items()]
    extra, reads = further(build, job, names)
    runs = n // spec.share if spec.share and spec.side == "columns" else 1
    text = f"binary_planes_{spec.key}({{{x}}}, {{0}}, {{1}}, {{{out}}}{extra}, M, {n}, {k}, {runs}, i0, i1);"
    functions, items = [planes_c.function(spec)], str(-(-n // BLOCK))
    build.add(
        "binary_planes", Split.ITEMS, [x, *reads], [out], text, job, names, functions, items, specs=[spec]
    )


def _dense(build: Builder, job: Linear, why: str) -> None:
    k, n, x = job.matrices[0].columns, job.width, build.names[job.reads[0]]
    out = build.out(job, instead=job.reads[-1] if "residual" in job.epilogue else None)
    spec = DenseLinearSpec(weight=stored(job.matrices[0].dtype), paired=job.paired, epilogue=job.epilogue)
    names = [build.keep(*weights.dense(build.model, m)) for m in job.matrices]
    second = "{1}" if job.paired else "NULL"
    extra, reads = further(build, job, names)
    text = f"dense_linear_{spec.key}({{{x}}}, {{0}}, {second}, {{{out}}}{extra}, M, {n}, {k}, i0, i1);"
    functions, items = [dense_c.function(spec)], str(-(-n // 16))
    why += ", and blocks are read as one matrix" if job.matrices[0].parts else ""
    build.add(
        "dense_linear", Split.ITEMS, [x, *reads], [out], text, job, names, functions, items, why, [spec]
    )


def _attend(build: Builder, job: Attend) -> None:
    sources = [build.names[n] for n in job.reads]
    out = build.out(job)
    queries = f"{out}q"
    build.widths[queries] = build.widths[out]
    norms = [n for n in (job.q_norm, job.k_norm) if n is not None]
    spec = CachedAttentionSpec(
        heads=job.heads, kv_heads=job.kv_heads, head_dim=job.head_dim, scale=job.scale, cap=job.cap,
        window=job.window, rotated=rotated(job.rope, job.head_dim) if job.rope else 0,
        norm=norms[0].eps if norms else 0.0, norm_offset=norms[0].offset if norms else 0.0,
        ring=0 if job.window is None else ROWS,
    )  # fmt: skip
    if words := attention_refuses(spec):
        raise Unlowered(f"`{job.paths[0]}`: {words}")
    names = [build.keep(f"{n.weight}:f32", weights.float32(build.model, str(n.weight))) for n in norms]
    gains = "{0}, {1}" if norms else "NULL, NULL"
    parts = [f"(const float *){{{name}}} + {at}" for name, at in zip(sources, job.offsets, strict=True)]
    strides = [str(build.jobs.widths[n]) for n in job.reads]
    write = (
        f"write_cache_{spec.key}({', '.join(parts + strides)}, a->slot, a->position, a->position,\n"
        f"      {{cache}}.cosines, {{cache}}.sines, {gains}, {{cache}}.keys, {{cache}}.values,\n"
        f"      {{{queries}}}, M, {{cache}}.S, i0, i1);"
    )
    attend = (
        f"attend_{spec.key}({{{queries}}}, {{cache}}.keys, {{cache}}.values, a->slot, a->position,\n"
        f"      {{{out}}}, M, {{cache}}.S, i0, i1);"
    )
    items, functions = f"M * {job.kv_heads}", [attention_c.function(spec)]
    build.attentions.append((spec, job.rope))
    read = list(dict.fromkeys(sources))
    build.add(
        "write_cache",
        Split.ITEMS,
        read,
        [queries],
        write,
        job,
        names,
        functions,
        items,
        specs=[spec],
        opens=True,
    )
    build.add("attend", Split.ITEMS, [queries], [out], attend, job, (), functions, items, specs=[spec])
