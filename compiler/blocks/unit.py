"""Unit: a module with a typed constructor, so that a model is rebuilt from JSON and never from a pickle."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from effc.compiler.cost import Cost
from effc.specs import plugins

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

REGISTRY: dict[str, type[Unit]] = {}
"""Unit types by name: the only classes a graph in JSON may name."""

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64",
        "float32",
        "bfloat16",
        "float16",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "bool",
    )
}
LARGEST = 2**31
"""Limit of any integer argument: above it a size is an attack or a mistake."""


def empty(*shape: int, dtype: str = "float32") -> nn.Parameter:
    """A parameter without storage; weights come later, so a 70B model is built in milliseconds."""
    return nn.Parameter(empty_buffer(*shape, dtype=dtype), requires_grad=False)


def empty_buffer(*shape: int, dtype: str) -> Tensor:
    """A buffer without storage. Raises ValueError when the dtype is none that a weight may have."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


class Unit(nn.Module):
    """Base of all blocks and of the leaves they hold.

    A subclass has a keyword constructor with plain annotated arguments (int, float, bool, str, Literal,
    None, mappings of those), keeps each under its own name, and is built on the meta device. Parameters start
    without `requires_grad`: training turns on what it trains.
    """

    takes_step: ClassVar[bool] = False
    """True when forward takes (x, step), because the block mixes positions or reads them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = REGISTRY.get(cls.__name__)
        if known is not None and (giver := _giver(known)) is not None and giver != _giver(cls):
            raise TypeError(
                f"{cls.__module__}.{cls.__name__} has the name of a block of {giver}; "
                "a saved model names blocks by their class, so give it another"
            )
        REGISTRY[cls.__name__] = cls

    def spec(self) -> dict[str, Any]:
        """{"type": class name, argument: value, ...}; `from_spec` builds an equal unit, without weights."""
        return {"type": type(self).__name__} | {name: getattr(self, name) for name in arguments(type(self))}

    @staticmethod
    def from_spec(spec: Mapping[str, Any]) -> Unit:
        """Build the unit a spec describes, on the meta device.

        Raises:
            ValueError: the type is not registered or an argument is missing, unknown or of another type.
        """
        name = str(spec.get("type"))
        cls = REGISTRY.get(name) or _of_a_package(name)
        if cls is None or cls is Unit:
            raise ValueError(f"there is no unit of type {spec.get('type')!r}")
        wanted = arguments(cls)
        given = {k: v for k, v in spec.items() if k != "type"}
        if unknown := sorted(given.keys() - wanted.keys()):
            raise ValueError(f"{cls.__name__} has no argument {unknown[0]!r}")
        for name, value in given.items():
            if not fits(value, wanted[name]):
                raise ValueError(f"{cls.__name__}: {name} cannot be {str(value)[:80]!r}")
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from None

    def blank(self) -> Self:
        """A new unit with the same arguments and no weights."""
        return type(self)(**{k: v for k, v in self.spec().items() if k != "type"})

    def stored(self) -> Iterator[tuple[Tensor, int]]:
        """Own tensors (children not), each with the number of logical weights it stands for."""
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None:
                yield tensor, tensor.numel()

    def drawn(self, slot: str, dice: torch.Generator) -> Tensor | None:
        """Random values of one of its tensors that not every number suits, such as indices; None: any do."""
        return None

    def flops(self, mean: int) -> int:
        """Forward FLOPs per token of this unit alone (children not), at `mean` attended keys."""
        return 0

    def kv_bytes(self) -> int:
        """Bytes a token adds to the cache in this unit alone, however long the sequence."""
        return 0

    def state_bytes(self) -> int:
        """Bytes of this unit's cache that do not grow with the sequence: states, the ring of a window."""
        return 0

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of this unit's cache of one sequence with room for so many tokens."""
        return tokens * self.kv_bytes() + self.state_bytes()

    def cost(self, mean: int = 0) -> Cost:
        """This unit and its children: a tensor that children share counts once."""
        seen: dict[int, tuple[Tensor, int]] = {}
        flops = kv = state = 0
        for unit in self.modules():
            if isinstance(unit, Unit):
                seen |= {id(t): (t, n) for t, n in unit.stored()}
                flops += unit.flops(mean)
                kv += unit.kv_bytes()
                state += unit.state_bytes()
        stored = sum(t.numel() * t.element_size() for t, _ in seen.values())
        return Cost(sum(n for _, n in seen.values()), stored, flops, kv, state)

    def expand(self, ops: Ops, x: Value) -> Value:
        """The same function in ops (compiler/ops.py); a test holds it equal to `forward`."""
        raise TypeError(f"{type(self).__name__} has no expansion into ops")

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As torch's; a block that keeps its dtype as a word keeps it true after `.to(dtype)`."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if "dtype" in self.__dict__:
            floating = (p.dtype for p in self.parameters() if p.is_floating_point())
            self.__dict__["dtype"] = str(next(floating, self.__dict__["dtype"])).removeprefix("torch.")
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.spec().items() if k != "type")


def _giver(cls: type[Unit]) -> str | None:
    """Who gives a block: effc, or a package of methods; None for code of neither, as in a notebook."""
    package = plugins.package_of(cls.__module__)
    return "effc" if cls.__module__.startswith("effc.") else str(package) if package else None


def _of_a_package(name: str) -> type[Unit] | None:
    """A block that an installed package of methods defines, once its methods are imported."""
    for method in plugins.methods():
        with suppress(Exception):  # `effc methods` tells what does not import
            import_module(method.module)
    return REGISTRY.get(name)


@cache
def _arguments(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls.__init__)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:  # **form: Unpack[AttentionForm]
            found |= get_type_hints(get_args(hints[name])[0])
        elif name != "self":
            found[name] = hints.get(name, Any)
    return found


def arguments(cls: type[Unit]) -> dict[str, Any]:
    """Constructor arguments of a unit type and their annotations, in order."""
    found: dict[str, Any] = _arguments(cls)  # type: ignore[arg-type]
    return found


def fits(value: Any, hint: Any, depth: int = 0) -> bool:
    """Does a JSON value fit an annotation? Numbers must be finite and integers bounded."""
    if depth > 4:
        return False
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option, depth) for option in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str) and len(value) <= 64
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and len(value) <= 64 and all(map(_plain, value.values()))
    return False


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 4096 and all(fits(v, float) for v in value)
    return value is None or fits(value, float) or fits(value, str) or isinstance(value, bool)
