"""Flat ops to jobs, one for one; attention and the embedding are read as the clusters they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.flat import PAST, Flat, FlatOp
from effc.compiler.model import Model
from effc.passes.lower._jobs import Arithmetic, Attend, Embed, Job, Jobs, Linear, Matrix, Normalize, Unlowered

_WORDLESS = frozenset(
    {"weight", "dequantize", "cast_like", "cast_to", "heads", "heads_first", "rope", "visible", "join_heads",
     "positions", "shift", "token_types"}
)  # fmt: skip
"""Ops that are read where their results are used, and give no job of their own."""
_PLAIN = {"add": "", "gate": "", "scale": "factor", "softcap": "cap"}


def collect(model: Model, flat: Flat) -> Jobs:
    """The jobs of a decoder.

    Raises:
        Unlowered: an op has no job, or attention is not causal.
    """
    return _Collector(model, flat).collect()


class _Collector:
    def __init__(self, model: Model, flat: Flat) -> None:
        self.model, self.flat = model, flat
        self.makers = flat.makers()
        self.shapes = {name: tensor.shape for name, tensor in model.tensors().items()}
        self.ties = model.ties()
        self.jobs: list[Job] = []
        self.widths: dict[int, int] = {}
        self.embeds: dict[int, Embed] = {}
        self.same: dict[int, int] = {}

    def collect(self) -> Jobs:
        makers: dict[str, Callable[[FlatOp], None]] = dict.fromkeys(_PLAIN, self._plain)
        makers |= {"embed": self._embed, "rms_norm": self._normalize, "layer_norm": self._normalize}
        makers |= {"linear": self._linear, "attend": self._attend, "activate": self._activate}
        for flat in self.flat.ops:
            name = flat.op.name
            if name in ("cast_like", "cast_to"):
                self._alias(flat)
            if name in _WORDLESS:
                continue
            make = makers.get(name)
            if make is None:
                raise Unlowered(f"`{flat.path}` has the op `{name}`, which has no C kernel")
            make(flat)
        return Jobs(self.jobs, self.widths, self._value(self.flat.output))

    # -- jobs by op

    def _embed(self, flat: FlatOp) -> None:
        index, table = flat.op.takes
        out = flat.op.gives[0]
        matrix = self._matrix(table, None)
        self.widths[out] = matrix.columns
        if index == 0:
            self.embeds[out] = Embed([], [out], [matrix.unit], table=matrix)
            self.jobs.append(self.embeds[out])

    def _normalize(self, flat: FlatOp) -> None:
        x = self._value(flat.op.takes[0])
        if self._made(x) == "heads":
            return  # a norm over each head: part of attention
        self._add(self._norm(flat), self.widths[x])

    def _linear(self, flat: FlatOp) -> None:
        x, weight, bias = (*flat.op.takes, None)[:3]
        matrix = self._matrix(weight, bias)
        job = Linear([self._value(x)], list(flat.op.gives), [matrix.unit], matrices=[matrix])
        if matrix.bias is not None:
            job.epilogue = ("bias",)
        self._add(job, matrix.rows)

    def _attend(self, flat: FlatOp) -> None:
        q, k, v, seen, _ = flat.op.takes
        visible = self.makers[seen or 0].op.attributes
        if not visible["causal"] or flat.op.takes[4] != PAST:
            raise Unlowered(f"attention in `{flat.path}` is not causal")
        sources, norms, rope, counts = [], [], None, []
        for number in (q, k, v):
            number, turn = self._through(number, "rope")
            number, _ = self._through(number, "heads_first")
            number, norm = self._through(number, "rms_norm")
            number, split = self._through(number, "heads")
            if split is None:
                raise Unlowered(f"attention in `{flat.path}` has an order of ops that is not known")
            rope = rope or (turn.op.attributes["parameters"] if turn else None)
            norms.append(self._norm(norm) if norm else None)
            counts.append(split.op.attributes["count"])
            sources.append(number)
        head_dim = self.widths[sources[0]] // counts[0]
        joined = next(
            f for f in self.flat.ops if f.op.name == "join_heads" and f.op.takes[0] == flat.op.gives[0]
        )
        job = Attend(
            sources, [joined.op.gives[0]], [flat.path],
            heads=counts[0], kv_heads=counts[1], head_dim=head_dim,
            scale=flat.op.attributes["scale"], cap=flat.op.attributes["cap"], window=visible["window"],
            rope=rope, q_norm=norms[0], k_norm=norms[1],
        )  # fmt: skip
        self._add(job, counts[0] * head_dim)

    def _activate(self, flat: FlatOp) -> None:
        x = self._value(flat.op.takes[0])
        self._add(Arithmetic([x], list(flat.op.gives), [], name=flat.op.attributes["form"]), self.widths[x])

    def _plain(self, flat: FlatOp) -> None:
        """add, gate, scale, softcap; what belongs to the embedding goes into its job."""
        name, out = flat.op.name, flat.op.gives[0]
        reads = [self._value(n) for n in flat.op.takes]
        number = float(flat.op.attributes.get(_PLAIN[name], 0.0))
        embed = self.embeds.get(reads[0])
        if embed is not None and embed.writes == [reads[0]] and embed is self.jobs[-1]:
            if name == "scale" and embed.positions is None and embed.types is None:
                embed.scale = number
                return self._extend(embed, out)
            if name == "add" and self._second(embed, reads[1]):
                return self._extend(embed, out)
        return self._add(Arithmetic(reads, [out], [], name=name, number=number), self.widths[reads[0]])

    def _second(self, embed: Embed, number: int) -> bool:
        """Take the table of positions or of token types into the embedding."""
        made = self.makers[number]
        if made.op.name != "embed":
            return False
        table = self._matrix(made.op.takes[1], None)
        index = self.makers[made.op.takes[0] or 0].op
        if index.name == "shift":
            embed.positions = (table.tensor, int(index.attributes["by"]))
        elif index.name == "token_types":
            embed.types = table.tensor
        else:
            return False
        embed.paths.append(table.unit)
        return True

    def _extend(self, embed: Embed, out: int) -> None:
        self.widths[out] = self.widths[embed.writes[0]]
        embed.writes = [out]
        self.embeds[out] = embed

    # -- reading values

    def _add(self, job: Job, width: int) -> None:
        self.widths[job.writes[0]] = width
        self.jobs.append(job)

    def _alias(self, flat: FlatOp) -> None:
        """A cast of an activation changes nothing here: rows are float32 all the way."""
        source, out = self._value(flat.op.takes[0]), flat.op.gives[0]
        if source in self.widths:
            self.same[out] = source

    def _value(self, number: int | None) -> int:
        assert number is not None
        return self.same.get(number, number)

    def _made(self, number: int) -> str:
        return self.makers[number].op.name if number in self.makers else ""

    def _through(self, number: int | None, name: str) -> tuple[int, FlatOp | None]:
        """The first operand of the op that made a value, if it is of this name."""
        number = self._value(number)
        made = self.makers.get(number)
        if made is None or made.op.name != name:
            return number, None
        return self._value(made.op.takes[0]), made

    def _norm(self, flat: FlatOp) -> Normalize:
        x, weight, bias = (*flat.op.takes, None)[:3]
        name = self._tensor(weight)
        return Normalize(
            [self._value(x)], list(flat.op.gives), [name.rpartition(".")[0]], weight=name,
            bias=self._tensor(bias) if bias is not None else None, form=flat.op.name.removesuffix("_norm"),
            eps=flat.op.attributes["eps"], offset=flat.op.attributes["offset"],
        )  # fmt: skip

    def _tensor(self, number: int | None) -> str:
        made = self.makers[number or 0].op
        while made.name in ("cast_like", "cast_to"):
            made = self.makers[made.takes[0] or 0].op
        if made.name != "weight":
            raise Unlowered(f"a weight is computed by `{made.name}`, which has no kernel")
        name = str(made.attributes["name"])
        return self.ties.get(name, name)

    def _matrix(self, number: int | None, bias: int | None) -> Matrix:
        made = self.makers[number or 0].op
        while made.name in ("cast_like", "cast_to"):
            made = self.makers[made.takes[0] or 0].op
        given: dict[str, Any] = {"bias": self._tensor(bias) if bias is not None else None}
        if made.name != "dequantize":
            name = self._tensor(number)
            rows, columns = self.shapes[name]
            dtype = str(self.model.tensors()[name].dtype).removeprefix("torch.")
            return Matrix(name, rows, columns, dtype=dtype, **given)
        name = self._tensor(made.takes[0])
        unit: Any = self.model.module(name.rpartition(".")[0])
        assert isinstance(unit, Packed)
        columns = unit.in_features
        group = 0 if unit.group in (0, columns) else unit.group
        form = (unit.bits, group, unit.symmetric, unit.scale_dtype)
        return Matrix(name, unit.rows, columns, quantized=form, **given)
