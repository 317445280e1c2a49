"""Compile for Hopper (sm_90) on a machine without a GPU, by the launch that a GPU would get.

Triton asks its active driver what it compiles for. A stand-in answers for an H200, and a launch then stops
after compilation: arguments are specialised as in a real launch, so a size that is not a multiple of 16 costs
here what it would cost there. Only for a process without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED = 232448
"""Bytes of shared memory that one program may have."""
REGISTERS = 65536
"""32-bit registers of one multiprocessor."""
_WARP = 32


class Hopper:
    """What compilation asks of a driver."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {
                "max_shared_mem": SHARED,
                "max_num_regs": REGISTERS,
                "multiprocessor_count": 132,
                "warpSize": _WARP,
                "sm_clock_rate": 1980000,
                "mem_clock_rate": 3201000,
                "mem_bus_width": 6144,
            }

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, _WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return (9, 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel that a launch would have run."""

    name: str
    warps: int
    shared: int
    """bytes"""
    ptx: str
    cubin: bytes


def compiled(launch: Callable[[], Any]) -> list[Compiled]:
    """Every kernel that `launch` would run, compiled for sm_90 and not run; its tensors stay as they are.

    Raises:
        RuntimeError: this process interprets.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("this process interprets; compile in one without TRITON_INTERPRET")
    found: list[Compiled] = []
    with _instead(found):
        launch()
    return found


@contextmanager
def _instead(found: list[Compiled]) -> Iterator[None]:
    run, active = JITFunction.run, driver._active
    fusion = os.environ.get("TRITON_DEFAULT_FP_FUSION")

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel: Any = run(self, *args, grid=grid, warmup=True, **named)
        meta = kernel.metadata
        found.append(
            Compiled(self.__name__, meta.num_warps, meta.shared, kernel.asm["ptx"], kernel.asm["cubin"])
        )
        return kernel

    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # the default up to 3.9; later versions turn it off
    driver.set_active(cast(Any, Hopper()))
    JITFunction.run = only_compile
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = active
        if fusion is None:
            del os.environ["TRITON_DEFAULT_FP_FUSION"]
        else:
            os.environ["TRITON_DEFAULT_FP_FUSION"] = fusion


def version() -> str:
    """Of the Triton that compiles."""
    return str(triton.__version__)
