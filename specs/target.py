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
NARROW = 256
"""Width of the transformer layer whose rates are given beside those of large matrices."""


class Target(BaseModel):
    """What the planner divides by. Rates of narrow models lie far below those of large matrices."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    summary: str = ""
    device: Literal["cpu", "cuda"] = "cpu"
    cores: int = Field(default=1, ge=1)
    memory_bytes: int = Field(gt=0, description="memory in which stages run: host RAM, or that of one GPU")
    disk_bytes: int | None = Field(
        default=None, ge=0, description="space for the store; None: ask the file system"
    )
    gemm: Mapping[str, float] = Field(description="dtype -> flops a second, large matrices")
    forward: Mapping[str, float] = Field(
        description="dtype -> flops a second, forward pass of a narrow layer"
    )
    train: Mapping[str, float] = Field(description="dtype -> the same, forward and backward together")
    solve: float = Field(gt=0, description="flops a second in factorizations, which run slower")
    bandwidth: float = Field(gt=0, description="bytes a second, streaming through memory")
    disk_read: float = Field(gt=0, description="bytes a second")
    disk_write: float = Field(gt=0, description="bytes a second, until they are safe")
    overhead: float = Field(ge=0, description="seconds to start one operation")
    base_bytes: int = Field(
        default=0, ge=0, description="resident memory of an idle process that has imported torch"
    )
    tokenize: float = Field(
        default=2e6, gt=0, description="bytes of text a second, cut into tokens and packed"
    )
    consumer: float = Field(
        default=6.0,
        ge=0,
        description="seconds to export a small model, read by transformers in a new process",
    )
    start: float = Field(
        default=3.0, ge=0, description="the same for an artefact, which effc itself reads in a new process"
    )
    calibrated: bool = False

    def rate(self, dtype: str, width: int, training: bool = False) -> float:
        """Flops a second of a model `width` wide; float32's where `dtype` was not measured.

        Time per flop falls from the narrow layer's to that of large matrices as NARROW / width.
        """
        narrow = self.train if training else self.forward
        slow, fast = (1 / rates.get(dtype, rates["float32"]) for rates in (narrow, self.gemm))
        return 1 / (fast + max(0.0, slow - fast) * NARROW / max(width, NARROW))

    @property
    def training_dtype(self) -> str:
        """bfloat16 where it is clearly faster, as the training loop decides."""
        return "bfloat16" if self.gemm.get("bfloat16", 0) > 1.5 * self.gemm["float32"] else "float32"


def read_target(path: Path) -> Target:
    """Read a target file.

    Raises: E350 when it cannot be read or does not describe a machine.
    """
    try:
        fields: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            fields = {}
        target = Target.model_validate(fields)
        bare = [key for key in ("gemm", "forward", "train") if "float32" not in getattr(target, key)]
        if not bare:
            return target
        found = f"no rate for float32 under `{bare[0]}`"
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
