"""Method and Part: the two extension points. One file, one class, one paper; the path is the name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from effc.compiler.contract import Contract
from effc.specs import plugins
from effc.specs.base import Spec
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.recipe import Ref

if TYPE_CHECKING:
    from effc.compiler.model import Model
    from effc.compiler.rewrite import Edit, Rewriter
    from effc.compiler.step import Step

_METHODS = "effc.passes."
_PARTS = "effc.runtime.parts."
_HEADINGS = ("Use when:", "Costs:")


@dataclass(frozen=True, slots=True)
class Takes:
    """Metadata of a field that names another binding: `data = code`, `teacher = base`."""

    value: str
    """"data" or "model"."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Metadata of a field that a part fills: `optimizer = adamw(lr = 3e-4)`.

    `folder` is where the parts lie under `runtime/parts`; `default` names the part used when none is written.
    """

    folder: str
    default: str | None = None


DataRef = Annotated[Ref, Takes("data")]
ModelRef = Annotated[Ref, Takes("model")]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that run together. B sequences of T tokens."""

    ids: Tensor
    """[B, T] int64"""
    labels: Tensor
    """[B, T] int64; the token that position t should predict, -100 where no loss is taken"""
    step: Step
    """positions, packing and masks for the blocks that mix positions"""
    tally: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Counts that the parts of one optimizer step add up, for losses over the whole step."""
    at: int = 0
    """The optimizer step that it belongs to, counted from 0."""
    of: int = 1
    """How many optimizer steps the training has."""


@runtime_checkable
class Data(Protocol):
    """Packed token sequences in disjoint splits (`train`, `heldout`)."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def vocabulary(self) -> str:
        """Fingerprint of the tokenizer; stages refuse data of another vocabulary than their model's."""
        ...

    @property
    def bytes_per_token(self) -> float: ...
    def size(self, split: str) -> int:
        """Sequences in the split."""
        ...

    def tokens(self, split: str) -> int:
        """Tokens in the split that carry loss."""
        ...

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        """The sequences with these numbers. Numbers from `size` on are those of further passes over the text;
        in `train`, each pass cuts it at other places."""
        ...


class Progress(Protocol):
    """Told how far a stage is; draws a bar, prints a line or stays silent."""

    def __call__(self, done: int, of: int, unit: str) -> None: ...


class Journal(Protocol):
    """Finished units of a running stage on disk; a unit is there whole or not at all."""

    def done(self, unit: str) -> bool: ...
    def save(self, unit: str, tensors: Mapping[str, Tensor], data: Mapping[str, Any]) -> None: ...
    def read(self, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]]: ...


def _silent(done: int, of: int, unit: str) -> None:
    """The progress of a stage that nobody watches."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the runtime lends a stage: seed, data and teachers by field name, journal, progress, places."""

    seed: int = 0
    data: Mapping[str, Data] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    """Further models by field name, e.g. `teacher`, `base`."""
    journal: Journal | None = None
    progress: Progress = _silent
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: torch.dtype | None = None
    """dtype of matrix products where a stage may choose; None leaves the model's own."""
    workdir: Path | None = None
    """Where a stage may spill; None keeps everything in memory."""
    names: Mapping[str, str] | None = None
    """Name in the file -> tensor, where an export alone takes the result, so that its file can be written."""
    stop: Callable[[], bool] = lambda: False
    """Asked at unit boundaries; true ends the stage cleanly after what is saved."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a stage leaves: a new model, the log of its edits, and what was measured on the way."""

    model: Model
    log: Sequence[Edit] = ()
    measures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage itself costs to run, in closed form. Works add up."""

    flops: float = 0
    """Multiplications and additions in matrix products."""
    solve: float = 0
    """Floating-point operations in factorizations and column by column updates, which run slower."""
    disk: int = 0
    """Bytes read and written."""
    memory: int = 0
    """Bytes held at once, beyond the process itself."""
    exact: float = 0
    """Multiplications and additions in matrix products in float32, whatever the model is stored in."""
    traffic: float = 0
    """Bytes that elementwise arithmetic moves through memory."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.solve + other.solve,
            self.disk + other.disk,
            max(self.memory, other.memory),
            self.exact + other.exact,
            self.traffic + other.traffic,
        )


def _is_plugin(cls: type, root: str) -> bool:
    """A class in a plug-in's file: below the root, and no part of its path starts with an underscore."""
    if not cls.__module__.startswith(root):
        return False
    return not any(part.startswith("_") for part in cls.__module__.removeprefix(root).split("."))


def _demand(cls: type[Spec], headings: Sequence[str], stated: Sequence[str]) -> None:
    """Refuse a malformed plug-in while its file is imported, with a sentence that says what to write."""
    where = f"{cls.__module__}.{cls.__name__}"
    doc = cls.__dict__.get("__doc__") or ""
    if not doc:
        raise TypeError(f"{where} has no docstring; its first line says what it does")
    for heading in headings:
        if heading not in doc:
            raise TypeError(f"the docstring of {where} lacks `{heading}`; add a line that begins with it")
    for name in stated:
        if getattr(cls, name, None) is None:
            raise TypeError(f"{where} does not state `{name}`; write `{name} = ...` in the class body")
    if not cls.examples:  # type: ignore[attr-defined]
        raise TypeError(f"{where} has no examples; give at least one call, as a recipe would write it")
    for name, info in cls.model_fields.items():
        if not info.description:
            raise TypeError(f"the field `{name}` of {where} has no description; add description = ...")


class Method(Spec):
    """A stage of a recipe: a spec that knows how to change a model.

    A subclass states its paper, contract and examples, its fields, and one verb (see shapes).
    It is frozen: a method keeps no state; what a run learns lives in the outcome.
    """

    paper: ClassVar[Paper]
    contract: ClassVar[Contract]
    examples: ClassVar[tuple[str, ...]]
    """Calls without binding and model, e.g. `quantize.rtn(bits = 4)`. Each is documentation and a test."""
    waives: ClassVar[Mapping[str, str]] = {}
    """A common check that does not apply -> the reason, printed in the documentation."""
    models: ClassVar[tuple[int, int | None]] = (1, 1)
    """Fewest and most models that come in as positional arguments; None = no upper limit."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        own = cls.__module__.removeprefix(_METHODS) if _is_plugin(cls, _METHODS) else None
        if kind := own or plugins.kind_of(cls.__module__):
            cls.kind = kind
            _demand(cls, _HEADINGS, ("paper", "contract", "examples"))

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        """Make the structural part of the change on meta tensors: no data, no weights.

        The planner runs it to know the structure after the stage, so the cost of the outlined
        model must equal the cost of the real result exactly, or bound it where `at_most` says so.
        """

    def refuses(self, model: Model, others: Sequence[Model]) -> Sequence[Diagnostic]:
        """Everything about these models (possibly on meta) that the method cannot handle."""
        return ()

    @property
    def at_most(self) -> bool:
        """Whether the size follows from weights or data: the outline then has the most that may come out."""
        return False

    def work(self, model: Model, seq: int = 0) -> Work:
        """What the stage costs to run; `seq` is the length of its data's sequences, 0 without data."""
        return Work()


class Part(Spec):
    """Fills a slot of a stage, e.g. an optimizer. `runtime/parts/train/optimizer/adamw.py` is `adamw`."""

    paper: ClassVar[Paper]
    examples: ClassVar[tuple[str, ...]]

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if _is_plugin(cls, _PARTS):
            cls.kind = cls.__module__.removeprefix(_PARTS)
            _demand(cls, (), ("paper", "examples"))


class Optimizer(Part):
    """Makes a torch optimizer for named parameters."""

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def state_bytes(self, shape: torch.Size) -> int:
        """Bytes of optimizer state for one parameter of this shape; equals a real state's size."""
        raise NotImplementedError


class Schedule(Part):
    """The learning rate over the steps of a training."""

    def rate(self, step: int, steps: int) -> float:
        """The factor on the optimizer's own rate at `step` of `steps`, counted from 0."""
        raise NotImplementedError
