"""Make Triton's interpreter compute bfloat16 as a GPU does, so that values can be checked on a CPU.

As it comes (triton 3.6 to 3.9) it multiplies bit patterns in `tl.dot`, adds bit patterns, and cuts float32
off instead of rounding it. Here every operation on bfloat16 is done in float32 and rounded to nearest even,
which is what the hardware does for one operation; a product and a sum that a GPU fuses round once there and
twice here. Float8 rounds to nearest even too, and values beyond its range become its largest, where the
interpreter halves what rounds up to a power of two. Only for a process that has `TRITON_INTERPRET=1`, and
that compiles nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from effc.kernels.gpu import memory

_BITS = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
_COMPARES = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder


def widen(bits: Any) -> Any:
    """uint16 patterns of bfloat16 -> float32"""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: Any) -> Any:
    """float32 -> uint16 patterns of bfloat16, to nearest even"""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


_BYTES = {tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0)}


def narrowest(values: Any, kind: Any) -> Any:
    """float32 -> uint8 patterns of a float8, to nearest even, at most its largest"""
    to, most = _BYTES[kind]
    limited = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-most, most)
    return limited.to(to).view(torch.uint8).numpy()


def widest(bits: Any, kind: Any) -> Any:
    """uint8 patterns of a float8 -> float32"""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(_BYTES[kind][0]).float().numpy()


@contextmanager
def trusted() -> Iterator[None]:
    """Within it the interpreter rounds bfloat16 as a GPU does and watches memory (see memory.py).

    Raises:
        RuntimeError: this process does not interpret: `TRITON_INTERPRET` is not 1.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "set TRITON_INTERPRET=1 before triton is imported; such a process compiles nothing"
        )
    patches = {**_arithmetic(), **memory.accesses()}
    before = {name: _Builder.__dict__.get(name) for name in patches}
    for name, patch in patches.items():
        setattr(_Builder, name, patch)
    try:
        with memory.launches():
            yield
    finally:
        for name, old in before.items():
            if old is None:
                delattr(_Builder, name)
            else:
                setattr(_Builder, name, old)


def _brain(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _up(handle: Any) -> Any:
    return _Handle(widen(handle.data), tl.float32) if _brain(handle) else handle


def _down(handle: Any) -> Any:
    return _Handle(narrow(handle.data), tl.bfloat16)


def _arithmetic() -> dict[str, Callable[..., Any]]:
    """The methods of the interpreter that touch bfloat16, each over the one it replaces."""
    cast, binary, unary = _Builder.cast_impl, _Builder.binary_op, _Builder.unary_op
    dot, convert, fma, clamp = (
        _Builder.create_dot,
        _Builder.create_fp_to_fp,
        _Builder.create_fma,
        _Builder.create_clampf,
    )

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if _brain(source) == (to.scalar == tl.bfloat16):
            return cast(self, source, to)
        if _brain(source):
            wide = _up(source)
            return wide if to.scalar == tl.float32 else cast(self, wide, to)
        return _down(source if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32))

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if source.dtype.scalar in _BYTES:
            wide = _Handle(widest(source.data, source.dtype.scalar), tl.float32)
            return wide if to.scalar == tl.float32 else cast_impl(self, wide, to)
        if to.scalar in _BYTES:
            wide = _up(source)
            wide = wide if wide.dtype.scalar == tl.float32 else cast(self, wide, tl.float32)
            return _Handle(narrowest(wide.data, to.scalar), to.scalar)
        if tl.bfloat16 in (source.dtype.scalar, to.scalar):
            return cast_impl(self, source, to)
        return convert(self, source, to, rounding)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not _brain(left) or op in _BITS:
            return binary(self, left, right, op)
        found = op(widen(left.data), widen(right.data))
        if op in _COMPARES:
            return _Handle(found, tl.int1)
        return _Handle(narrow(found), tl.bfloat16)

    def unary_op(self: Any, value: Any, op: Any) -> Any:
        return _down(unary(self, _up(value), op)) if _brain(value) else unary(self, value, op)

    def create_dot(self: Any, a: Any, b: Any, sum: Any, *rest: Any) -> Any:
        return dot(self, _up(a), _up(b), sum, *rest)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not _brain(z):
            return fma(self, x, y, z)
        wide = widen(x.data).astype(np.float64) * widen(y.data) + widen(z.data)
        return _Handle(narrow(wide.astype(np.float32)), tl.bfloat16)

    def create_clampf(self: Any, value: Any, low: Any, high: Any, propagate: Any) -> Any:
        if not _brain(value):
            return clamp(self, value, low, high, propagate)
        return _down(clamp(self, _up(value), _up(low), _up(high), propagate))

    def get_bf16(self: Any, value: float) -> Any:
        """Absent in triton 3.6: a Python number beside a bfloat16 tensor."""
        return _Handle(narrow(np.array([value], np.float32)), tl.bfloat16)

    made = (
        cast_impl, create_fp_to_fp, binary_op, unary_op, create_dot, create_fma, create_clampf, get_bf16,
    )  # fmt: skip
    return {method.__name__: method for method in made}
