"""The shapes of a method, by what it must be given: nothing, data, a loop, other models; and those that
change nothing and report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import Field
from torch import Tensor, nn

from effc.compiler.adapters import Adapters, adapters_of, bare, join, strip, unmixable
from effc.compiler.alike import unlike
from effc.compiler.method import Batch, Context, Data, DataRef, Method, Optimizer, Schedule, Slot
from effc.specs.diagnostic import Diagnostic

if TYPE_CHECKING:
    from effc.compiler.findings import Findings
    from effc.compiler.model import Model
    from effc.compiler.rewrite import Rewriter
    from effc.compiler.step import Step

Array = NDArray[Any]


Losses = Mapping[str, Tensor]
"""Named scalars of one batch; `total` is what is minimized."""


class Spare(Protocol):
    """Gives one more array [N] of unknown content to work in."""

    def __call__(self, dtype: DTypeLike = np.float32) -> Array: ...


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a piece lies: from number `start` of a tensor on. What is drawn at random is keyed by it."""

    tensor: str
    start: int


class Rewrite(Method):
    """Needs nothing but the model: drop, fold, round, tie, factor."""

    streams: ClassVar[bool] = False
    """Whether weights are read through `rw.present` alone: then no more than a module is in memory."""

    def rewrite(self, rw: Rewriter) -> Mapping[str, float] | None:
        """Edit the clone behind `rw`; may return the error it made at each path, for the report."""
        raise NotImplementedError

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        self.rewrite(rw)


class Join(Rewrite):
    """Needs further models, of which parts go into the first one: adapters side by side."""

    models: ClassVar[tuple[int, int | None]] = (2, None)
    same_base: ClassVar[bool] = True
    """Whether the models must be one and the same beneath what is joined."""

    def join(self, rw: Rewriter, others: Sequence[Model]) -> Mapping[str, float] | None:
        """Edit the clone of the first model behind `rw`; may return numbers by path, for the report."""
        raise NotImplementedError

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        self.join(rw, others)


@runtime_checkable
class Statistic(Protocol):
    """What a calibrating method gathers about one input; grows with every batch, holds O(K) or O(K^2)."""

    def add(self, x: Tensor) -> None:
        """Take in x [N, K] float, N rows that entered the watched modules."""

    def state(self) -> dict[str, Tensor]:
        """Everything gathered, as tensors."""
        ...


@runtime_checkable
class Look(Statistic, Protocol):
    """A statistic of a block that mixes positions: it sees the block at work, not rows alone."""

    def look(self, block: nn.Module, x: Tensor, step: Step) -> None:
        """Take in one run of the watched block: its input x [B, T, D]."""
        ...


class Analyze(Method):
    """Reads a model and says something of it: leaks, sizes, laws. The model stays as it is."""

    def analyze(self, model: Model) -> Findings:
        """What is found; weights are read through `presence.loaded`, a module at a time."""
        raise NotImplementedError


class Calibrate(Method):
    """Needs to see activations first: GPTQ, Wanda. Runs layer by layer (runtime/calibrate.py).

    For each layer in order: watched modules see the hidden states that the *edited* earlier layers
    produce, `rewrite_layer` edits the layer, and the edited layer produces the states for the next.
    """

    data: DataRef = Field(description="calibration sequences")
    samples: int = Field(default=128, ge=1, description="sequences of the train split that are seen")

    def watch(self, rw: Rewriter, paths: Sequence[str]) -> list[str]:
        """Those of a layer's module paths whose inputs are needed; may be empty."""
        raise NotImplementedError

    def start(self, rw: Rewriter, path: str) -> Statistic:
        """An empty statistic for the input of one watched module.

        Modules that read the same tensor (q, k, v; gate, up) share one statistic.
        """
        raise NotImplementedError

    @property
    def foresees(self) -> bool:
        """Whether the whole model must be seen, unchanged, before the first layer is edited."""
        return False

    def foresee(
        self, rw: Rewriter, paths: Sequence[str], seen: Mapping[str, Statistic]
    ) -> Mapping[str, float]:
        """A number for each module at `paths` of the unchanged model, where `foresees`."""
        raise NotImplementedError

    def settled(self, model: Model, seen: Mapping[str, float]) -> Self:
        """The method as it goes on once all numbers of `foresee` are known."""
        raise NotImplementedError

    def rewrite_layer(
        self, rw: Rewriter, paths: Sequence[str], seen: Mapping[str, Statistic]
    ) -> Mapping[str, float]:
        """Edit the modules at `paths` with what was seen; return an error per edited path."""
        raise NotImplementedError


class Observe(Calibrate):
    """A calibration that watches whole blocks, then edits the model as one piece: depth pruning."""

    def observe(self, layer: int, before: Tensor, after: Tensor) -> Tensor:
        """The statistic of one batch at one block: hidden states [B, T, D] in and out -> sums, added up."""
        raise NotImplementedError

    def rewrite(self, rw: Rewriter, seen: Mapping[int, Tensor]) -> Mapping[str, float]:
        """Edit the clone; `seen` maps a layer to the sum of its statistics. Returns numbers to report."""
        raise NotImplementedError

    def watch(self, rw: Rewriter, paths: Sequence[str]) -> list[str]:
        return []


class Inspect(Calibrate):
    """A calibration that looks at modules of the unchanged model at work, with the step they run in, then
    edits it as one piece: which layers attend alike.
    """

    def watched(self, model: Model) -> list[str]:
        """Paths of the modules to look at."""
        raise NotImplementedError

    def inspect(self, module: nn.Module, x: Tensor, step: Step) -> Tensor:
        """What to keep of one run of a watched module: its input x [B, T, D] -> [B, ...]."""
        raise NotImplementedError

    def rewrite(self, rw: Rewriter, seen: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Edit the clone; `seen` maps a path to what was kept of all sequences [N, ...]. Returns numbers to
        report.
        """
        raise NotImplementedError

    def watch(self, rw: Rewriter, paths: Sequence[str]) -> list[str]:
        return list(paths)


class Survey(Calibrate):
    """A calibration over several data, each seen apart on the unchanged model, edited as one after it."""

    data: tuple[DataRef, ...] = Field(min_length=2, description="calibration sequences of each")  # type: ignore[assignment]

    def watched(self, model: Model) -> list[str]:
        """Paths of the modules whose inputs are needed, on each data."""
        raise NotImplementedError

    def rewrite(self, rw: Rewriter, seen: Sequence[Mapping[str, Statistic]]) -> Mapping[str, float]:
        """Edit the clone; `seen` has for each data, in order, path -> statistic. Returns errors by path."""
        raise NotImplementedError

    def watch(self, rw: Rewriter, paths: Sequence[str]) -> list[str]:
        return list(paths)


class Train(Method):
    """Needs a training loop: heal, distill, fine-tune. The runtime owns the loop; methods own losses."""

    recuts: ClassVar[bool] = True
    """Whether each pass over the text cuts it elsewhere; not where what is known of a sequence is kept."""
    remembers: ClassVar[bool] = False
    """Whether `loss` is handed the model as it came in among the teachers, as `before`."""
    rate: ClassVar[float | None] = None
    """Learning rate where a recipe names no optimizer; None: the optimizer's own."""

    data: DataRef = Field(description="training sequences")
    steps: int = Field(ge=1, description="optimizer steps")
    batch: int = Field(default=8, ge=1, description="sequences in one optimizer step")
    accumulate: int = Field(default=1, ge=1, description="parts a batch is computed in, to need less memory")
    clip: float = Field(
        default=1.0, gt=0, description="largest norm of the gradient; above it the gradient shrinks"
    )
    optimizer: Annotated[Optimizer | None, Slot("train.optimizer", "adamw")] = Field(
        default=None, description="how gradients become steps"
    )
    schedule: Annotated[Schedule | None, Slot("train.schedule", "cosine")] = Field(
        default=None, description="the learning rate over the steps"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="dtype of the passes; weights and optimizer state are float32 in any case"
    )

    def prepare(self, rw: Rewriter, others: Sequence[Model]) -> None:
        """Make the structure that trains: that of the result, unless `finish` changes it once more."""
        self.outline(rw, others)

    def begin(self, rw: Rewriter, seed: int) -> None:
        """Give what `prepare` put in its first values, drawn by `seed`; nothing by default."""

    def finish(self, rw: Rewriter) -> Mapping[str, float]:
        """Edit what was trained, so that it has the structure of `outline`; returns numbers to report."""
        return {}

    def teach(
        self, teachers: Mapping[str, Model], batches: Iterable[Batch], context: Context
    ) -> Mapping[str, Any]:
        """What `loss` is handed as teachers: the models themselves, or what they say of `batches`.

        `batches` are all sequences that the training will see, each once.
        """
        return teachers

    def trains(self, model: Model) -> list[str]:
        """Names of the parameters that move."""
        raise NotImplementedError

    def loss(self, student: Model, teachers: Mapping[str, Any], batch: Batch) -> Losses:
        """Named scalars, `total` among them; teachers by field name, as `teach` gave them."""
        raise NotImplementedError

    def measure(self, model: Model, data: Data) -> Mapping[str, Any]:
        """What the report shall say of the trained model besides its loss; nothing by default."""
        return {}


class Merge(Method):
    """Needs more models of the same structure. Streamed by runtime/merge.py, so it never holds a model.

    A piece is a run of N numbers of one tensor, the same run of every model, as float32 arrays [N];
    the arithmetic is elementwise, and no number that is not finite may come out finite. The arrays given,
    and those that `spare()` gives, are reused for the next piece: overwrite them freely, keep none (fresh
    arrays would cost more than the arithmetic). What must be known of a whole tensor, or of the whole model,
    before pieces can merge (norms, thresholds) is gathered in `rounds` earlier passes.
    """

    models: ClassVar[tuple[int, int | None]] = (2, None)
    rounds: ClassVar[int] = 0
    """Passes over the numbers before they merge."""

    template: Literal["same", "first"] = Field(
        default="same", description="demand equal chat templates, or take the first model's"
    )

    @property
    def over(self) -> str:
        """What one set of statistics spans: "tensor" or "model"."""
        return "tensor"

    def at(self, layer: int | None, layers: int) -> Self:
        """The method as it applies in one layer of `layers`; None outside the layers."""
        return self

    def observe(
        self, number: int, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare
    ) -> Array:
        """What one piece says in round `number`, in an array of its own.

        `parts` holds one array [N] per model, `base` that of the field `base` where the method has one,
        `known` what earlier rounds settled (empty in round 0).
        """
        raise NotImplementedError

    def settle(self, number: int, seen: Iterable[Array], known: Array) -> Array:
        """What round `number` makes known, from what its pieces said, in their order."""
        raise NotImplementedError

    def merge(
        self, parts: Sequence[Array], base: Array | None, known: Array, spare: Spare, spot: Spot
    ) -> Array:
        """One piece of every model, float32 [N] each -> the merged piece [N], float32."""
        raise NotImplementedError

    def shares(self, models: int) -> Sequence[float] | None:
        """The factor of each model's change where the result is their weighted sum, else None.

        Such a merge keeps adapters: they become one of the sum of their ranks.
        """
        return None

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        found = self.adapters([rw.model, *others])
        strip(rw)
        join(rw, found)

    def adapters(self, models: Sequence[Model]) -> Adapters:
        """Of the models that are mixed, a base behind them left out; none where adapters cannot stay."""
        mixed = models[: len(models) - ("base" in type(self).model_fields)]
        shares = self.shares(len(mixed))
        return adapters_of(mixed, shares) if shares is not None and len(shares) == len(mixed) else {}

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        models = [model, *others]
        kept = self.shares(len(models)) is not None
        adapters = self.adapters(models)
        return [
            *unlike(self.kind, [bare(m) for m in models], self.template),
            *unmixable(self.kind, models, adapters, kept),
        ]
