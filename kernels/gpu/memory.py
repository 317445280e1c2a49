"""Watch what an interpreted kernel reads and writes: bounds of every tensor, races between programs.

Each tensor of a launch is given addresses of its own, a terabyte apart, so that a pointer that leaves a
tensor cannot land in another. Lanes of a masked load that names no `other` are undefined on a GPU: here they
hold NaN, or an integer that no index can be. Within one launch no byte may be stored by two programs, or by
two lanes of one store, or be read by one program and stored by another; atomics may meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_FIRST, _STEP = 1 << 62, 1 << 40
"""Addresses of the watched tensors: tensor i begins in the middle of [_FIRST + i _STEP, + _STEP)."""
_NOBODY, _MANY = -1, -2


class Violation(AssertionError):
    """A kernel touched memory that is not its own."""


@dataclass(slots=True)
class _Storage:
    """Who stored and who read each byte of one storage in this launch."""

    start: int
    stored: Any
    read: Any


@dataclass(slots=True)
class _Tensor:
    name: str
    address: int
    size: int
    storage: _Storage


@dataclass(slots=True)
class _Launch:
    tensors: list[_Tensor] = field(default_factory=list)
    storages: dict[int, _Storage] = field(default_factory=dict)

    def watch(self, name: str, tensor: Any) -> int:
        """Take a tensor in; the address that the kernel gets for it."""
        whole = tensor.untyped_storage()
        start, size = whole.data_ptr(), whole.nbytes()
        if start not in self.storages:
            self.storages[start] = _Storage(
                start, np.full(size, _NOBODY, np.int32), np.full(size, _NOBODY, np.int32)
            )
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        span = (last + 1) * tensor.element_size() if tensor.numel() else 0
        self.tensors.append(_Tensor(name, tensor.data_ptr(), span, self.storages[start]))
        # The low bits stay, because alignment may be looked at.
        return int(_FIRST + (len(self.tensors) - 1) * _STEP + _STEP // 2 + tensor.data_ptr() % 4096)

    def real(self, pointers: Any, live: Any, width: int, what: str) -> tuple[Any, _Storage | None]:
        """Watched addresses -> those of this process, and the storage they lie in; live lanes are checked."""
        used = pointers[live]
        if not used.size or int(used.min()) < _FIRST:
            return pointers, None
        index = (int(used.min()) - _FIRST) // _STEP
        if index >= len(self.tensors) or index != (int(used.max()) - _FIRST) // _STEP:
            raise Violation(f"{what}: pointers into more than one tensor")
        tensor = self.tensors[index]
        zero = _FIRST + index * _STEP + _STEP // 2 + tensor.address % 4096
        offsets = used.astype(np.int64) - zero
        outside = (offsets < 0) | (offsets + width > tensor.size)
        if outside.any():
            raise Violation(
                f"{what} out of bounds: {int(outside.sum())} of {used.size} lanes, one at byte "
                f"{int(offsets[outside][0])} of {tensor.size} of `{tensor.name}`"
            )
        return (pointers.astype(np.int64) + (tensor.address - zero)).astype(np.uint64), tensor.storage


_launch = _Launch()
_program = 0


@contextmanager
def launches() -> Iterator[None]:
    """Within it every launch is watched."""
    convert, executor = interpreter._implicit_cvt, interpreter.GridExecutor
    begin, place = executor._init_args_hst, _Builder.set_grid_idx

    def _init_args_hst(self: Any, given: Any, named: Any) -> Any:
        global _launch
        _launch = _Launch()
        return begin(self, given, named)

    def _implicit_cvt(argument: Any) -> Any:
        if not hasattr(argument, "data_ptr"):
            return convert(argument)
        made = convert(argument)
        name = f"argument {len(_launch.tensors)} {list(argument.shape)}"
        made.handle.data = np.array([_launch.watch(name, argument)], np.uint64)
        return made

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        global _program
        place(self, x, y, z)
        columns, rows, _ = self.grid_dim
        _program = x + columns * (y + rows * z)

    replaced = [
        (interpreter, "_implicit_cvt", convert, _implicit_cvt),
        (executor, "_init_args_hst", begin, _init_args_hst),
        (_Builder, "set_grid_idx", place, set_grid_idx),
    ]
    for owner, name, _, new in replaced:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old, _ in replaced:
            setattr(owner, name, old)


def accesses() -> dict[str, Callable[..., Any]]:
    """The interpreter's loads, stores and atomics, watched; by the names they replace."""
    load, store = _Builder.create_masked_load, _Builder.create_masked_store
    swap, update = _Builder.create_atomic_cas, _Builder.create_atomic_rmw

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        live, width = _live(pointers, mask), _width(pointers)
        real, storage = _launch.real(pointers.data, live, width, "load")
        if storage is not None:
            _note_read(storage, real[live])
        if other is None:
            other = _undefined(pointers)
        return load(self, interpreter.TensorHandle(real, pointers.dtype), mask, other, *rest, **named)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        live, width = _live(pointers, mask), _width(pointers)
        real, storage = _launch.real(pointers.data, live, width, "store")
        if storage is not None:
            _note_store(storage, real[live])
        return store(self, interpreter.TensorHandle(real, pointers.dtype), value, mask, *rest, **named)

    def create_atomic_cas(self: Any, pointers: Any, *rest: Any) -> Any:
        real, _ = _launch.real(pointers.data, np.ones(pointers.data.shape, bool), _width(pointers), "atomic")
        return swap(self, interpreter.TensorHandle(real, pointers.dtype), *rest)

    def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        real, _ = _launch.real(pointers.data, _live(pointers, mask), _width(pointers), "atomic")
        return update(self, op, interpreter.TensorHandle(real, pointers.dtype), value, mask, *rest)

    made = (create_masked_load, create_masked_store, create_atomic_cas, create_atomic_rmw)
    return {method.__name__: method for method in made}


def _live(pointers: Any, mask: Any) -> Any:
    return np.broadcast_to(mask.data, pointers.data.shape).astype(bool)


def _width(pointers: Any) -> int:
    return max(1, int(pointers.get_element_ty().primitive_bitwidth) // 8)


def _undefined(pointers: Any) -> Any:
    """What lanes that are not loaded hold when the kernel does not say."""
    kind = pointers.get_element_ty()
    numbers = interpreter._get_np_dtype(kind)
    if kind.is_bf16():
        value: Any = 0x7FC0
    elif kind.is_floating():
        value = np.nan if numbers.kind == "f" else 0x7F
    else:
        value = np.iinfo(numbers).max if numbers.kind in "iu" else True
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, numbers), kind)


def _note_read(storage: _Storage, addresses: Any) -> None:
    at = addresses.astype(np.int64) - storage.start
    by = storage.stored[at]
    if ((by != _NOBODY) & (by != _program)).any():
        raise Violation(f"race: program {_program} reads what program {int(by.max())} stores")
    before = storage.read[at]
    storage.read[at] = np.where((before == _NOBODY) | (before == _program), _program, _MANY)


def _note_store(storage: _Storage, addresses: Any) -> None:
    at = addresses.astype(np.int64) - storage.start
    if np.unique(at).size != at.size:
        raise Violation(f"race: two lanes of one store of program {_program} have one address")
    for seen, does in ((storage.stored[at], "stores"), (storage.read[at], "reads")):
        met = (seen != _NOBODY) & (seen != _program)
        if met.any():
            raise Violation(f"race: program {_program} stores what another program {does}")
    storage.stored[at] = _program
