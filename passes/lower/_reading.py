"""Reading: the flat ops of a model and the jobs that are made of them, value by value."""

from __future__ import annotations

from typing import Any

from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.flat import Flat, FlatOp
from effc.compiler.model import Model
from effc.compiler.op_graph import Op
from effc.passes.lower._jobs import Job, Matrix, Normalize, Unlowered


class Reading:
    """What makers of jobs ask about values, and where they put what they make."""

    def __init__(self, model: Model, flat: Flat) -> None:
        self.model, self.flat = model, flat
        self.makers = flat.makers()
        self.shapes = {name: tensor.shape for name, tensor in model.tensors().items()}
        self.ties = model.ties()
        self.jobs: list[Job] = []
        self.widths: dict[int, int] = {}
        self.same: dict[int, int] = {}
        self.told: dict[str, int] = {}
        """What a block said of every row, by its name among the sides of a step."""
        self.copied: dict[int, int] = {}
        """What stands for copies of a row, one for each of its experts, and the row."""
        self.parts: dict[int, int] = {}
        """Values whose rows are heads side by side, and how many."""
        self.choices: dict[int, int] = {}
        """What experts gave, and the choice that it stands by."""

    def add(self, job: Job, width: int) -> None:
        """A job whose first result has `width` numbers a row."""
        self.widths[job.writes[0]] = width
        self.jobs.append(job)

    def alias(self, flat: FlatOp) -> None:
        """The result of an op is what it took: a cast of an activation, another shape of the same rows."""
        source, out = self.value(flat.op.takes[0]), flat.op.gives[0]
        if source in self.widths:
            self.same[out] = source

    def width(self, number: int) -> int:
        """Numbers in a row of a value.

        Raises:
            Unlowered: it is not computed on its own.
        """
        if number not in self.widths:
            raise Unlowered(f"what `{self.made(number)}` gives is read by an op that has no C kernel for it")
        return self.widths[number]

    def value(self, number: int | None) -> int:
        """The number under which a value is known."""
        assert number is not None
        return self.same.get(number, number)

    def made(self, number: int) -> str:
        """The name of the op that made a value; "" for an input."""
        return self.makers[number].op.name if number in self.makers else ""

    def through(self, number: int | None, name: str) -> tuple[int, FlatOp | None]:
        """The first operand of the op that made a value, if it is of this name."""
        number = self.value(number)
        made = self.makers.get(number)
        if made is None or made.op.name != name:
            return number, None
        return self.value(made.op.takes[0]), made

    def norm(self, flat: FlatOp) -> Normalize:
        """The job of a norm."""
        x, weight, bias = (*flat.op.takes, None)[:3]
        name = self.tensor(weight)
        return Normalize(
            [self.value(x)], list(flat.op.gives), [name.rpartition(".")[0]], weight=name,
            bias=self.tensor(bias) if bias is not None else None, form=flat.op.name.removesuffix("_norm"),
            eps=flat.op.attributes["eps"], offset=flat.op.attributes["offset"],
        )  # fmt: skip

    def tensor(self, number: int | None) -> str:
        """Canonical name of a tensor of the model."""
        made = self._source(number)
        if made.name != "weight":
            raise Unlowered(f"a weight is computed by `{made.name}`, which has no kernel")
        name = str(made.attributes["name"])
        return self.ties.get(name, name)

    def matrix(self, number: int | None, bias: int | None = None) -> Matrix:
        """The weights of a linear map, or of a stack of them."""
        made, experts = self._source(number), 0
        if made.name == "stack":
            experts, made = int(made.attributes["experts"]), self._source(made.takes[0])
        given: dict[str, Any] = {"bias": self.tensor(bias) if bias is not None else None}
        if made.name == "planes":
            name = self.tensor(made.takes[0])
            signs: Any = self.model.module(name.rpartition(".")[0])
            sizes = (signs.planes, signs.down, signs.across, signs.terms)
            return Matrix(name, signs.out_features, signs.in_features, planes=sizes, **given)
        if made.name != "dequantize":
            name = self.tensor(number)
            *stack, rows, columns = self.shapes[name]
            dtype = str(self.model.tensors()[name].dtype).removeprefix("torch.")
            return Matrix(name, rows, columns, dtype=dtype, experts=stack[0] if stack else 0, **given)
        name = self.tensor(made.takes[0])
        unit: Any = self.model.module(name.rpartition(".")[0])
        assert isinstance(unit, Packed)
        columns, rows = unit.in_features, unit.rows // (experts or 1)
        group = 0 if unit.group in (0, columns) else unit.group
        form = (unit.bits, group, unit.symmetric, unit.scale_dtype)
        return Matrix(name, rows, columns, quantized=form, experts=experts, **given)

    def _source(self, number: int | None) -> Op:
        """The op that made a weight, behind casts."""
        made = self.makers[number or 0].op
        while made.name in ("cast_like", "cast_to"):
            made = self.makers[made.takes[0] or 0].op
        return made
