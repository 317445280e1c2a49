"""Put one normalization in the place of another: batch norm by layer norm, layer norm by RMS norm."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, fx, nn

from effc.compiler.blocks import MLP, Attention, Embedding, Linear, MoE, Norm, PatchEmbed, StackedLinear
from effc.compiler.blocks.embedding import Table
from effc.compiler.contract import EXACT, HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._dense import some
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper

BatchNorm = nn.modules.batchnorm._BatchNorm
_WRITE = {
    Embedding: ("", "position", "token_type"),
    PatchEmbed: ("patch", "position", "cls"),
    Attention: ("o",),
    MLP: ("down",),
    MoE: ("experts.down",),
}
"""Blocks that write into the residual stream -> their parts that do; what a block lacks is passed over."""


class LayerNormSwap(Rewrite):
    """batchnorm -> layernorm: (a - mean) / sqrt(var + eps) over one sample; gain and shift stay.

    layernorm -> rmsnorm: mean and variance become the mean square. With mode = exact, every W and bias that
    writes into the residual stream becomes (I - 1 1^T / d) W first, tables alike, so that the stream has
    mean zero and the function stays. Gain and shift stay in the norm; `reparam.fold_norm` moves them on.

    Use when: batches are small or statistics do not fit (layernorm); a kernel or a method wants RMS norms
              (rmsnorm).
    Costs:    batchnorm -> layernorm: a sum a sample, and it cannot be folded; training must follow. rmsnorm
              saves one sum; a head that shares its table with the embedding gets one of its own.
    """

    paper = Paper("Layer Normalization", arxiv="1607.06450", year=2016, section="3")
    contract = Contract(
        EXACT.when(HEALED, mode="exact"),
        keeps=tuple(Fact(name, "model") for name in ("packed", "tied", "low_rank", "adapter", "dense")),
    )
    waives: ClassVar[Mapping[str, str]] = dict.fromkeys(
        (
            *(
                "leaves_its_input_alone",
                "logs_what_it_did",
                "keeps_its_contract",
                "predicts_its_cost_exactly",
            ),
            *("estimates_its_work_without_weights", "roles_stay_true", "saved_model_loads_equal"),
            "same_seed_gives_the_same_numbers",
        ),
        "the tiny decoder has RMS norms; tests/passes/test_arch.py holds it to decoders with layer norms",
    )
    examples = (
        "arch.layer_norm(from = layernorm, to = rmsnorm, mode = exact)",
        "arch.layer_norm(from = layernorm, to = rmsnorm)",
    )
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    from_: Literal["batchnorm", "layernorm"] = Field(
        default="batchnorm", alias="from", description="norms to replace"
    )
    to: Literal["layernorm", "rmsnorm"] = Field(default="layernorm", description="what comes in their place")
    mode: Literal["heal", "exact"] = Field(
        default="heal",
        description="exact keeps the function: layernorm -> rmsnorm of networks with norms first",
    )

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if (self.from_, self.to) not in (("batchnorm", "layernorm"), ("layernorm", "rmsnorm")):
            raise ValueError(
                f"{self.from_} becomes no {self.to}; batchnorm -> layernorm, layernorm -> rmsnorm"
            )
        if self.mode == "exact" and self.from_ == "batchnorm":
            raise ValueError("statistics of a batch and of a sample differ, so mode = exact cannot be")
        return self

    def norms(self, model: Model) -> list[str]:
        """Paths of the norms to replace, in model order."""
        modules = dict(model.gm.named_modules())
        if self.from_ == "batchnorm":
            return [path for path, module in modules.items() if isinstance(module, BatchNorm)]
        return [
            path for path, module in modules.items() if isinstance(module, Norm) and module.form == "layer"
        ]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = self.norms(model)
        if not paths:
            there = sorted(
                {type(m).__name__ + getattr(m, "form", "") for _, m in model.units() if isinstance(m, Norm)}
            )
            note = (
                f"its norms: {', '.join(_named(n) for n in there)}"
                if there
                else "it has no norm of the blocks"
            )
            return [
                Diagnostic("E320", f"the model has no {self.from_} to replace", notes=(note,), about="from")
            ]
        if self.mode == "heal":
            return []
        stream = _Stream(model, paths)
        return [*stream.problems(self.kind), *_undivided(self.kind, model, stream.writers)]

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        if self.mode == "exact":
            self._untie(rw, _Stream(rw.model, self.norms(rw.model)).writers)
        self._replace(rw)

    def rewrite(self, rw: Rewriter) -> None:
        if self.mode == "exact":
            writers = _Stream(rw.model, self.norms(rw.model)).writers
            self._untie(rw, writers)
            for path in writers:
                unit = rw.module(path)
                for name in ("weight", "bias"):
                    tensor: Tensor | None = getattr(unit, name, None)
                    if tensor is not None:
                        rw.write(
                            path, name, _centered(unit, name, tensor.detach()), "mean zero over channels"
                        )
        self._replace(rw)

    def _untie(self, rw: Rewriter, writers: Sequence[str]) -> None:
        """The head reads the table as it was: it gets its own."""
        pairs = rw.model.ties().items()
        shared = {name.rpartition(".")[0] for pair in pairs for name in pair}
        if "head" in shared and "embedding" in writers:
            rw.untie("head")

    def _replace(self, rw: Rewriter) -> None:
        with rw.together():
            for path in self.norms(rw.model):
                old = rw.module(path)
                rw.swap(
                    path, _rms(old) if isinstance(old, Norm) else _group(old), f"{self.from_} -> {self.to}"
                )


class _Stream:
    """The residual stream: who writes into it, and who but the given norms reads it."""

    def __init__(self, model: Model, norms: Sequence[str]) -> None:
        self.model = model
        self.norms = set(norms)
        nodes = [n for n in model.gm.graph.nodes if n.op == "call_module" and n.target in self.norms]
        self.inside = sorted(self.norms - {str(n.target) for n in nodes})
        self.values: set[fx.Node] = set()
        self.blocks: list[fx.Node] = []
        for node in nodes:
            self._back(node.args[0])
        self.writers = list(dict.fromkeys(self._writers()))

    def _back(self, value: object) -> None:
        if not isinstance(value, fx.Node) or value in self.values:
            return
        self.values.add(value)
        if value.target is operator.add:
            for part in value.args:
                self._back(part)
        else:
            self.blocks.append(value)

    def _writers(self) -> Iterator[str]:
        """Paths of the units that write, and so must be centered."""
        for node in self.blocks:
            block = self.model.module(str(node.target)) if node.op == "call_module" else None
            parts = next((names for kind, names in _WRITE.items() if isinstance(block, kind)), ())
            for name in parts:
                path = f"{node.target}.{name}" if name else str(node.target)
                if not name or hasattr(block, name.partition(".")[0]):
                    yield path

    def problems(self, kind: str) -> Iterator[Diagnostic]:
        if self.inside:
            yield _cannot(kind, f"`{self.inside[0]}` lies inside a block, where no stream can be centered")
        for node in self.blocks:
            what = self.model.module(str(node.target)) if node.op == "call_module" else None
            if isinstance(what, Norm):
                yield _cannot(kind, f"the stream itself is normed, by `{node.target}`")
            elif not isinstance(what, tuple(_WRITE)) or getattr(what, "norm_eps", False):
                yield _cannot(kind, f"`{node.target}` writes into the stream, and not by a matrix")
        for value in self.values:
            for user in value.users:
                reads = user.op == "call_module" and user.target in self.norms
                if not reads and user not in self.values:
                    yield _cannot(kind, f"`{user.name}` reads the stream as it is")


def _cannot(kind: str, why: str) -> Diagnostic:
    return Diagnostic(
        "E320",
        f"`{kind}` cannot keep the function with RMS norms",
        notes=(why,),
        help="write mode = heal and train afterwards",
        about="mode",
    )


def _undivided(kind: str, model: Model, writers: Sequence[str]) -> Iterator[Diagnostic]:
    """Writers that are packed or factored, or lie beneath an adapter."""
    dense = (Linear, StackedLinear, Embedding, PatchEmbed, Table)
    other = [p for p in writers if not isinstance(model.module(p), dense)]
    if other:
        yield Diagnostic(
            "E323",
            f"`{kind}` centers what writes into the stream, and needs it dense",
            notes=(f"{some(other)}: {type(model.module(other[0])).__name__}",),
            help="change norms before the stage that packs or factors, and fold adapters first",
        )


def _named(name: str) -> str:
    return {"Normrms": "RMS norms", "Normlayer": "layer norms"}.get(name, name)


def _centered(unit: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The tensor less its mean over the channels of the stream."""
    wide = tensor.double()
    table = not isinstance(unit, Linear | StackedLinear)
    axis = -2 if name == "weight" and not table else -1  # W [o, i] writes o, a row of a table is written
    centered: Tensor = (wide - wide.mean(axis, keepdim=True)).to(tensor.dtype)
    return centered


def _rms(old: Norm) -> Norm:
    new = Norm(
        width=old.width,
        eps=old.eps,
        form="rms",
        bias=old.bias is not None,
        offset=old.offset,
        dtype=old.dtype,
    )
    new.weight, new.bias = old.weight, old.bias
    return new


def _group(old: BatchNorm) -> nn.GroupNorm:
    """Over all channels and places of a sample, with the gain and shift of a batch norm."""
    new = nn.GroupNorm(1, old.num_features, eps=old.eps, affine=bool(old.affine))
    new.weight, new.bias = old.weight, old.bias
    return new
