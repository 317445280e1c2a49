"""Jobs of recurrent blocks: a gated scan with what its rows are made of, and attention in a window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from effc.compiler.flat import FlatOp
from effc.passes.lower._jobs import Attend, Cell, Linear, Normalize, Scan, Unlowered
from effc.passes.lower._reading import Reading


@dataclass(slots=True)
class _Side:
    """One operand of a scan: where its numbers come from, and what becomes of them on the way."""

    source: int
    heads: int
    kind: str = "plain"
    norm: Normalize | None = None


def _side(read: Reading, flat: FlatOp, number: int | None) -> _Side:
    """plain, softmax, or entry: 1 - a in place of a projection."""
    number, _ = read.through(number, "kept")
    number, _ = read.through(number, "cast_like")
    number, entry = read.through(number, "complement")
    if entry is not None:
        return _Side(number, 0, "entry")
    number, soft = read.through(number, "softmax")
    number, _ = read.through(number, "heads_first")
    number, norm = read.through(number, "rms_norm")
    number, split = read.through(number, "heads")
    heads = read.parts.get(number, 0) if split is None else int(split.op.attributes["count"])
    if not heads:
        raise Unlowered(f"a recurrence in `{flat.path}` has an order of ops that is not known")
    return _Side(number, heads, "softmax" if soft else "plain", read.norm(norm) if norm else None)


def _gate(read: Reading, flat: FlatOp, number: int | None) -> tuple[int, int, dict[str, Any]]:
    """What log gates are made of, its heads, and the form."""
    number, _ = read.through(number, "forget")
    opened, gate = read.through(number, "log_gate")
    number, _ = read.through(opened, "heads_first")
    number, pool = read.through(number, "pool")
    number, split = read.through(number, "heads")
    if gate is None or split is None:
        raise Unlowered(f"gates in `{flat.path}` have an order of ops that is not known")
    heads = int(split.op.attributes["count"])
    each = read.width(number) // heads
    form = {"divisor": gate.op.attributes["divisor"]}
    if pool is not None:
        form["pool"] = each // pool.op.attributes["to"]
    return number, heads, form


def _scan(read: Reading, flat: FlatOp) -> None:
    q, k, v, g, _ = (*flat.op.takes, None)[:5]
    gates, kv_heads, form = _gate(read, flat, g)
    sides = [_side(read, flat, n) for n in (q, k, v)]
    query, key, value = sides
    count = read.width(gates) // kv_heads // form.get("pool", 1)
    dims = [count if s.kind == "entry" else read.width(s.source) // s.heads for s in sides]
    over = str(flat.op.attributes["over"])
    form |= {"over": over, "scale": flat.op.attributes["scale"]}
    form |= {"q": query.kind, "k": key.kind, "v": value.kind}
    form["shared"] = count != (dims[1] if over == "key" else dims[2])
    reads = [query.source, gates, *(s.source for s in (key, value) if s.kind != "entry")]
    job = Scan(
        reads, [flat.op.gives[0]], [flat.path], heads=query.heads, kv_heads=kv_heads, key_dim=dims[1],
        value_dim=dims[2], form=form, q_norm=query.norm, k_norm=key.norm,
    )  # fmt: skip
    read.parts[flat.op.gives[0]] = query.heads
    read.add(job, query.heads * dims[2])


def _near(read: Reading, flat: FlatOp) -> None:
    """Attention to the last tokens alone."""
    sources, norms, rope, counts = [], [], None, []
    for number in flat.op.takes[:3]:
        number, turn = read.through(number, "rope")
        number, _ = read.through(number, "heads_first")
        number, norm = read.through(number, "rms_norm")
        number, split = read.through(number, "heads")
        if split is None:
            raise Unlowered(f"attention in `{flat.path}` has an order of ops that is not known")
        rope = rope or (turn.op.attributes["parameters"] if turn else None)
        norms.append(read.norm(norm) if norm else None)
        counts.append(int(split.op.attributes["count"]))
        sources.append(number)
    head_dim = read.width(sources[0]) // counts[0]
    job = Attend(
        sources, [flat.op.gives[0]], [flat.path], heads=counts[0], kv_heads=counts[1], head_dim=head_dim,
        scale=flat.op.attributes["scale"], cap=flat.op.attributes["cap"],
        window=flat.op.attributes["window"], rope=rope, q_norm=norms[0], k_norm=norms[1],
    )  # fmt: skip
    read.parts[flat.op.gives[0]] = counts[0]
    read.add(job, counts[0] * head_dim)


def _recur(read: Reading, flat: FlatOp) -> None:
    inputs = [read.value(n) for n in flat.op.takes[:3]]
    peep = read.tensor(flat.op.takes[3])
    job = Cell(inputs, [flat.op.gives[0]], [flat.path], form=flat.op.attributes["cell"], tensor=peep)
    read.add(job, read.width(inputs[0]))


def _head_linear(read: Reading, flat: FlatOp) -> None:
    """Matrices of their own for parts of x: blocks on the diagonal of one."""
    x, weight, bias = flat.op.takes
    stack = read.matrix(weight, bias)
    parts = stack.experts
    matrix = replace(stack, rows=stack.rows * parts, columns=stack.columns * parts, experts=0, parts=parts)
    job = Linear([read.value(x)], list(flat.op.gives), [matrix.unit], matrices=[matrix], epilogue=("bias",))
    read.add(job, matrix.rows)


RECURRENCES: Mapping[str, Callable[[Reading, FlatOp], None]] = {
    "scan": _scan,
    "near": _near,
    "recur": _recur,
    "head_linear": _head_linear,
}
WORDLESS = frozenset({"log_gate", "complement", "softmax", "pool", "kept", "forget", "parts", "both"})
"""Ops that are read where a scan uses their results."""
