"""A decoder model as a program: expand, collect, fuse, choose kernels. The one door of this family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from effc.compiler.blocks.rope import tables
from effc.compiler.flat import flatten
from effc.compiler.model import Model
from effc.compiler.step import Step
from effc.kernels.cpu.isa import Isa
from effc.kernels.program.run import Program
from effc.passes.lower._builder import Builder, Lowered
from effc.passes.lower._collect import collect
from effc.passes.lower._fuse import fuse
from effc.passes.lower._jobs import Unlowered
from effc.passes.lower._kernels import kernel

__all__ = ["Lowered", "Unlowered", "angles", "compiled", "lower"]


def lower(model: Model) -> Lowered:
    """The plan of a model's decoding step; needs no weights.

    Raises:
        Unlowered: in words, what has no C kernel; the model runs in torch then.
    """
    try:
        flat = flatten(model)
    except TypeError as error:
        raise Unlowered(str(error)) from error
    return Builder(model, fuse(collect(model, flat))).build(kernel)


def compiled(lowered: Lowered, isa: Isa, threads: int) -> Program:
    """The machine code and the tensors; the model it came from must hold its weights."""
    made = {name: make() for name, make in lowered.tensors.items()}
    return Program(lowered.plan, made, isa, threads)


def angles(rope: Mapping[str, Any], head_dim: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Cosines and sines [S, r / 2] of one attention by position.

    Raises:
        Unlowered: they change with the length of a sequence.
    """
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise Unlowered(f"rotary angles of the form {rope['rope_type']} change with a sequence's length")

    def make(longest: int) -> tuple[Tensor, Tensor]:
        step = Step(torch.arange(longest)[None])
        cosines, sines = (t[0, 0] for t in tables(rope, head_dim, step, torch.float32))
        half = cosines.shape[-1] // 2
        return cosines[:, :half].contiguous(), sines[:, :half].contiguous()

    return make
