"""The key of a result: a hash over small named parts, so that a miss can say which part differs.

Two runs with equal keys end with equal bytes. Inputs enter by their content, not by how they were made: a
stage that is run again and comes out the same leaves everything behind it valid.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from typing import Any

import torch

from effc import passes
from effc.runtime.canonical import canonical as canonical
from effc.runtime.closure import fingerprint
from effc.specs.recipe import Binding, Call, Ref, Value

Parts = Mapping[str, Any]
"""Named parts of a key, each plain JSON."""

RUNNERS = {
    "Rewrite": "effc.runtime.rewriting",
    "Calibrate": "effc.runtime.calibrate",
    "Train": "effc.runtime.fit",
    "Merge": "effc.runtime.merge",
    "Analyze": "effc.runtime.analyzing",
}
"""Shape of a method -> the module that runs it, whose sources count as the method's own do."""


def stage_parts(
    binding: Binding, shape: str, inputs: Mapping[str, str], seed: int, device: torch.device
) -> dict[str, Any]:
    """The parts of a stage's key. `inputs` maps the names that the call uses to fingerprints of content.

    Names of bindings do not count: renaming one changes nothing that is computed.
    """
    call = binding.call
    modules = [passes.module_of(call.kind), RUNNERS[shape], *_parts_within(call)]
    return {
        "method": call.kind,
        "source": fingerprint(modules, docstrings=False),
        "arguments": {name: plain(value, inputs) for name, value in sorted(call.arguments.items())},
        "inputs": [inputs[ref.name] for ref in call.models],
        "seed": seed,
        "numbers": numeric_class(device),
    }


def key_of(parts: Parts) -> str:
    """SHA-256 of the parts in canonical form, in hexadecimal."""
    return sha256(canonical(parts).encode()).hexdigest()


def differing(ours: Parts, theirs: Parts, under: str = "") -> list[tuple[str, Any, Any]]:
    """Where two sets of parts differ: (dotted name, ours, theirs); None stands for absent."""
    found: list[tuple[str, Any, Any]] = []
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing(a, b, f"{under}{name}.")
        elif a != b:
            found.append((f"{under}{name}", a, b))
    return found


def plain(value: Value, inputs: Mapping[str, str]) -> Any:
    """A value of a recipe as JSON; a name becomes the fingerprint of what it names."""
    match value:
        case Ref():
            return {"is": inputs[value.name], "split": value.split}
        case Call():
            arguments = {name: plain(v, inputs) for name, v in sorted(value.arguments.items())}
            return {"call": value.kind, "arguments": arguments}
        case tuple():
            return [plain(item, inputs) for item in value]
        case Mapping():
            return {name: plain(item, inputs) for name, item in value.items()}
    return value


def seed_for(seed: int, stage: str, unit: str = "") -> int:
    """A 63-bit seed for one unit of one stage; counted, so that no unit depends on those before it."""
    digest = sha256(canonical([seed, stage, unit]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numeric_class(device: torch.device) -> dict[str, Any]:
    """What decides the last bits of a result: machine, libraries, threads, flags."""
    found = dict(_libraries()) | {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


@cache
def _libraries() -> dict[str, Any]:
    show = torch.__config__.show()
    blas = next((line.strip(" -") for line in show.splitlines() if "MKL" in line and "DNN" not in line), "")
    return {
        "torch": torch.__version__,
        "blas": blas,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "matrix_units": _matrix_units(),
        "machine": platform.machine(),
    }


def _matrix_units() -> list[str]:
    """Instructions for low precision that change how sums are ordered."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return []
    return sorted(set(flags.split()) & {"amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni"})


def _parts_within(call: Call) -> list[str]:
    """Modules of the parts that fill slots of a call."""
    return sorted(
        f"effc.runtime.parts.{v.kind}" for v in _calls(tuple(call.arguments.values())) if "." in v.kind
    )


def _calls(value: Value) -> list[Call]:
    match value:
        case Call():
            return [value, *_calls(tuple(value.arguments.values()))]
        case tuple():
            return [call for item in value for call in _calls(item)]
        case Mapping():
            return [call for item in value.values() for call in _calls(item)]
    return []
