"""Trace: any nn.Module to a Model, by the first of three ways that gives the module's own answer.

1. symbolic: torch.fx follows the code, torch's own layers stay modules;
2. export: torch.export follows one run; layers that it dissolved become modules again;
3. module: the code stays a black box, its layers can still be swapped.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from effc.compiler.blocks import Unit
from effc.compiler.lift import lift_all
from effc.compiler.model import Model
from effc.compiler.relayer import relayered
from effc.compiler.roles import Role
from effc.specs.diagnostic import Diagnostic, EffcError

Way = Literal["symbolic", "export", "module"]

_ROLES: tuple[tuple[tuple[type, ...], str], ...] = (
    ((nn.Linear,), "linear"),
    ((nn.modules.conv._ConvNd,), "conv"),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "norm"),
    ((nn.Embedding, nn.EmbeddingBag), "embedding"),
)
_UNIT_ROLES = {"Linear": "linear", "Norm": "norm", "Table": "embedding"}


@dataclass(frozen=True, slots=True)
class Traced:
    """How a module came in."""

    way: Way
    tried: tuple[str, ...]
    """Why each earlier way was not taken, in order."""

    def __str__(self) -> str:
        return "; ".join([f"traced by {self.way}", *self.tried])


class TracedModel(Model):
    """A model that came in traced: its graph takes the module's own arguments, not ids and a step."""

    traced: Traced
    inputs: tuple[Any, ...]
    """The example inputs, for whoever needs shapes or a run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.gm(*args, **kwargs)

    def like(self, gm: fx.GraphModule, roles: Any = None) -> TracedModel:
        model = TracedModel(gm, roles, weights=self.weights, facts=self.facts, architecture=self.architecture)
        model.traced, model.inputs = self.traced, self.inputs
        return model


class _Black(nn.Module):
    """Holds a module whose code is not followed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def trace(module: nn.Module, example_inputs: Sequence[Any] | Tensor) -> TracedModel:
    """The module, in inference mode, as a Model whose graph can be rewritten; it is left alone itself.

    `example_inputs` are the positional arguments of one call.

    Raises:
        EffcError: E407 when the module does not run on the example inputs.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    source = copy.deepcopy(module).eval()
    try:
        with torch.no_grad():
            want = source(*inputs)
    except Exception as error:
        note = _words(error)
        raise EffcError(
            Diagnostic("E407", f"{type(module).__name__} does not run on the example inputs", notes=(note,))
        ) from error
    tried: list[str] = []
    ways: list[tuple[Way, Callable[[nn.Module, tuple[Any, ...]], fx.GraphModule]]] = [
        ("symbolic", _symbolic),
        ("export", _export),
        ("module", _black),
    ]
    for way, attempt in ways:
        try:
            gm = attempt(source, inputs)
            with torch.no_grad():
                got = gm(*inputs)
        except Exception as error:
            tried.append(f"{way}: {_words(error)}")
            continue
        if not _equal(got, want):
            tried.append(f"{way}: the traced graph gives other values than the module")
            continue
        return _model(gm, Traced(way, tuple(tried)), inputs)
    raise EffcError(
        Diagnostic("E407", f"{type(module).__name__} gives other values when run again", notes=tuple(tried))
    )


def _symbolic(module: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    tracer = fx.Tracer()
    graph = tracer.trace(module)
    return _tidy(fx.GraphModule(tracer.root, graph))


def _export(module: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    axes = torch.export.Dim.AUTO

    def free(value: Any) -> Any:
        return dict.fromkeys(range(value.ndim), axes) if isinstance(value, Tensor) else None

    with _quiet():
        exported = torch.export.export(module, inputs, dynamic_shapes=tuple(map(free, inputs)), strict=False)
    return _tidy(relayered(exported, module))


@contextmanager
def _quiet() -> Iterator[None]:
    """An export that fails is an answer here, not news: its reason goes into `tried`."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _black(module: nn.Module, inputs: tuple[Any, ...]) -> fx.GraphModule:
    graph = fx.Graph()
    arguments = [graph.placeholder(f"x{i}") for i in range(len(inputs))]
    graph.output(graph.call_module("module", tuple(arguments)))
    return fx.GraphModule(_Black(module), graph)


def _tidy(gm: fx.GraphModule) -> fx.GraphModule:
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    gm.recompile()
    return gm


def _model(gm: fx.GraphModule, traced: Traced, inputs: tuple[Any, ...]) -> TracedModel:
    lift_all(gm)
    gm.requires_grad_(False)
    for node in gm.graph.nodes:
        node.meta = {"origin": "trace"}
    model = TracedModel(gm, dict(_roles(gm)), architecture="traced")
    model.traced, model.inputs = traced, inputs
    return model


def _roles(gm: fx.GraphModule) -> Iterator[tuple[str, Role]]:
    for path, module in gm.named_modules():
        if not (module._parameters or module._buffers) or not path:
            continue
        yield path, Role(_role(module), _layer(path))


def _role(module: nn.Module) -> str:
    if isinstance(module, Unit):
        return _UNIT_ROLES.get(type(module).__name__, "other")
    return next((name for types, name in _ROLES if isinstance(module, types)), "other")


def _layer(path: str) -> int | None:
    """The first number in a path: blocks.3.fc1 lies in layer 3."""
    return next((int(word) for word in path.split(".") if word.isdigit()), None)


def _equal(got: Any, want: Any) -> bool:
    """The same structure with the same numbers, up to the order of sums."""
    left, shape = pytree.tree_flatten(got)
    right, other = pytree.tree_flatten(want)
    if shape != other:
        return False
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True) and a.shape == b.shape
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a == b
        for a, b in zip(left, right, strict=True)
    )


def _words(error: Exception) -> str:
    """The first line of an exception, short enough for a note."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return f"{type(error).__name__}: {line[:160]}"
