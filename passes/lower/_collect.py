"""Flat ops to jobs, one for one; attention and the embedding are read as the clusters they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from effc.compiler.flat import PAST, Flat, FlatOp
from effc.compiler.model import Model
from effc.passes.lower._jobs import Arithmetic, Attend, Embed, Jobs, Linear, Unlowered
from effc.passes.lower._mixtures import MIXTURES
from effc.passes.lower._reading import Reading
from effc.passes.lower._recurrences import RECURRENCES, WORDLESS

_WORDLESS = frozenset(
    {"weight", "dequantize", "planes", "stack", "heads", "heads_first", "rope", "visible", "positions",
     "shift", "token_types", "repeat"}
)  # fmt: skip
"""Ops that are read where their results are used, and give no job of their own."""
_SAME = frozenset({"cast_like", "cast_to", "flatten", "shape_like", "join_heads"})
"""Ops that change no number here: rows are float32 all the way, one behind the other."""
_PLAIN = {"add": "", "gate": "", "scale": "factor", "softcap": "cap"}


def collect(model: Model, flat: Flat) -> Jobs:
    """The jobs of a decoder.

    Raises:
        Unlowered: an op has no job, or attention is not causal.
    """
    return Collector(model, flat).collect()


class Collector(Reading):
    """The makers of jobs by op; those of mixtures stand in _mixtures.py."""

    def __init__(self, model: Model, flat: Flat) -> None:
        super().__init__(model, flat)
        self.embeds: dict[int, Embed] = {}

    def collect(self) -> Jobs:
        makers: dict[str, Callable[[FlatOp], None]] = dict.fromkeys(_PLAIN, self._plain)
        makers |= {"embed": self._embed, "rms_norm": self._normalize, "layer_norm": self._normalize}
        makers |= {"linear": self._linear, "attend": self._attend, "activate": self._activate}
        makers |= {"sigmoid": self._sigmoid, "times": self._times}
        makers |= {name: partial(make, self) for name, make in ({**MIXTURES, **RECURRENCES}).items()}
        for flat in self.flat.ops:
            name = flat.op.name
            if name in _SAME:
                self.alias(flat)
            if name in _WORDLESS | _SAME | WORDLESS:
                continue
            make = makers.get(name)
            if make is None:
                raise Unlowered(f"`{flat.path}` has the op `{name}`, which has no C kernel")
            make(flat)
        return Jobs(self.jobs, self.widths, self.value(self.flat.output))

    # -- jobs by op

    def _embed(self, flat: FlatOp) -> None:
        index, table = flat.op.takes
        out = flat.op.gives[0]
        matrix = self.matrix(table, None)
        self.widths[out] = matrix.columns
        if index == 0:
            self.embeds[out] = Embed([], [out], [matrix.unit], table=matrix)
            self.jobs.append(self.embeds[out])

    def _normalize(self, flat: FlatOp) -> None:
        x = self.value(flat.op.takes[0])
        if self.made(x) == "heads":
            return  # a norm over each head: part of attention
        job = self.norm(flat)
        job.parts = self.parts.get(x, 1)
        self.add(job, self.width(x))

    def _linear(self, flat: FlatOp) -> None:
        x, weight, bias = (*flat.op.takes, None)[:3]
        matrix = self.matrix(weight, bias)
        job = Linear([self.value(x)], list(flat.op.gives), [matrix.unit], matrices=[matrix])
        if matrix.bias is not None:
            job.epilogue = ("bias",)
        self.add(job, matrix.rows)

    def _attend(self, flat: FlatOp) -> None:
        q, k, v, seen, _ = flat.op.takes
        visible = self.makers[seen or 0].op.attributes
        if not visible["causal"] or flat.op.takes[4] != PAST:
            raise Unlowered(f"attention in `{flat.path}` is not causal")
        sources, norms, rope, counts = [], [], None, []
        for number in (q, k, v):
            number, turn = self.through(number, "rope")
            number, _ = self.through(number, "heads_first")
            number, norm = self.through(number, "rms_norm")
            number, split = self.through(number, "heads")
            if split is None:
                raise Unlowered(f"attention in `{flat.path}` has an order of ops that is not known")
            rope = rope or (turn.op.attributes["parameters"] if turn else None)
            norms.append(self.norm(norm) if norm else None)
            counts.append(split.op.attributes["count"])
            sources.append(number)
        head_dim = self.width(sources[0]) // counts[0]
        joined = next(
            f for f in self.flat.ops if f.op.name == "join_heads" and f.op.takes[0] == flat.op.gives[0]
        )
        job = Attend(
            sources, [joined.op.gives[0]], [flat.path],
            heads=counts[0], kv_heads=counts[1], head_dim=head_dim,
            scale=flat.op.attributes["scale"], cap=flat.op.attributes["cap"], window=visible["window"],
            rope=rope, q_norm=norms[0], k_norm=norms[1],
        )  # fmt: skip
        self.add(job, counts[0] * head_dim)

    def _activate(self, flat: FlatOp) -> None:
        x = self.value(flat.op.takes[0])
        self.add(Arithmetic([x], list(flat.op.gives), [], name=flat.op.attributes["form"]), self.width(x))

    def _plain(self, flat: FlatOp) -> None:
        """add, gate, scale, softcap; what belongs to the embedding goes into its job."""
        name, out = flat.op.name, flat.op.gives[0]
        reads, each = [self.value(n) for n in flat.op.takes], 1
        if name == "gate":
            reads, each = self._shared(reads)
        number = float(flat.op.attributes.get(_PLAIN[name], 0.0))
        embed = self.embeds.get(reads[0])
        if embed is not None and embed.writes == [reads[0]] and embed is self.jobs[-1]:
            if name == "scale" and embed.positions is None and embed.types is None:
                embed.scale = number
                return self._extend(embed, out)
            if name == "add" and self._second(embed, reads[1]):
                return self._extend(embed, out)
        widths = [self.width(n) for n in reads]
        if name == "gate" and widths[-1] == 1 < widths[0]:
            each = widths[0]
        if widths[0] != widths[-1] * each:
            raise Unlowered(f"`{flat.path}` has `{name}` of {widths[0]} and {widths[1]} numbers a row")
        return self.add(Arithmetic(reads, [out], [], name=name, number=number, each=each), widths[0])

    def _shared(self, reads: list[int]) -> tuple[list[int], int]:
        """Operands of a product, the one whose numbers are repeated last, and how often."""
        for first, second in (reads, reads[::-1]):
            made = self.makers.get(second)
            if made is not None and made.op.name == "repeat":
                return [first, self.value(made.op.takes[0])], int(made.op.attributes["times"])
        return reads, 1

    def _sigmoid(self, flat: FlatOp) -> None:
        x = self.value(flat.op.takes[0])
        self.add(Arithmetic([x], list(flat.op.gives), [], name="sigmoid"), self.width(x))

    def _times(self, flat: FlatOp) -> None:
        x, weight = self.value(flat.op.takes[0]), self.tensor(flat.op.takes[1])
        self.add(Arithmetic([x], list(flat.op.gives), [], name="times", tensor=weight), self.width(x))

    def _second(self, embed: Embed, number: int) -> bool:
        """Take the table of positions or of token types into the embedding."""
        made = self.makers[number]
        if made.op.name != "embed":
            return False
        table = self.matrix(made.op.takes[1], None)
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
