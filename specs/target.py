"""The machine a recipe runs on: memory, disk and measured rates, as data.

Files lie in `specs/targets/*.yaml`; `effc bench --calibrate` writes one for this machine. Bytes, seconds and
floating-point operations are plain numbers in base units, because a person rarely writes such a file by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from effc.specs.diagnostic import Diagnostic, EffcError

TARGETS = Path(__file__).parent / "targets"


class Target(BaseModel):
    """What the planner divides by: a stage takes flops / rate + bytes / bandwidth + operations * overhead."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str = ""
    device: Literal["cpu", "cuda"] = "cpu"
    cores: int = Field(1, ge=1)
    memory_bytes: int = Field(gt=0, description="memory in which stages run: host RAM, or that of one GPU")
    disk_bytes: int | None = Field(None, ge=0, description="space for the store; None: ask the file system")
    gemm: Mapping[str, float] = Field(description="dtype -> flops a second, large matrices")
    solve: float = Field(gt=0, description="flops a second in factorizations, which run slower")
    bandwidth: float = Field(gt=0, description="bytes a second, streaming through memory")
    disk_read: float = Field(gt=0, description="bytes a second")
    disk_write: float = Field(gt=0, description="bytes a second, until they are safe")
    overhead: float = Field(ge=0, description="seconds to start one operation")
    base_bytes: int = Field(0, ge=0, description="resident memory of an idle process that has imported torch")
    calibrated: bool = False

    def rate(self, dtype: str) -> float:
        """Floating-point operations a second in `dtype`; float32's where it was not measured."""
        return self.gemm.get(dtype, self.gemm["float32"])

    def seconds(self, flops: float, moved: float = 0.0, operations: int = 0, dtype: str = "float32") -> float:
        """Estimated time to compute `flops`, move `moved` bytes and start `operations` kernels."""
        return flops / self.rate(dtype) + moved / self.bandwidth + operations * self.overhead


def read_target(path: Path) -> Target:
    """Read a target file.

    Raises: E350 when it cannot be read or does not describe a machine.
    """
    try:
        fields: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(fields, dict) and "float32" in (fields.get("gemm") or {}):
            return Target.model_validate(fields)
        found = "no rate for float32 under `gemm`"
    except ValidationError as problem:
        found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in problem.errors()[:3])
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        found = str(problem).splitlines()[0]
    shipped = ", ".join(sorted(p.stem for p in TARGETS.glob("*.yaml")))
    raise EffcError(
        Diagnostic(
            "E350",
            f"`{path}` does not describe a machine",
            notes=(found,),
            help=f"let `effc bench --calibrate` write one, or take a shipped one: {shipped}",
        )
    )


def named_target(name: str | Path) -> Target:
    """A target by file, or by the name of a shipped one (`--target cpu-2core`)."""
    shipped = TARGETS / f"{name}.yaml"
    return read_target(shipped if shipped.is_file() else Path(name))
