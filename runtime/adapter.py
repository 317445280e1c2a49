"""Put a PEFT adapter folder on a model: every pair of factors becomes a LoraLinear around its linear.

Shapes: A [r, i], B [o, r]; a matrix that holds several of our linears has their rows one after another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.lora_linear import LoraLinear, Scaling
from effc.compiler.blocks.quant_linear import QuantLinear
from effc.compiler.checkpoint import TensorRef, read_header, read_json, within
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.weights import LazyTensor, resident
from effc.runtime.exports._names import Spot, spots
from effc.specs.diagnostic import Diagnostic, EffcError

MAX_CONFIG = 1_000_000
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"^base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<factor>[AB])\.weight$")
_PATTERN = re.compile(r"^\^?(?P<name>(?:\w|\\?\.)+)\$?$")
_READ = ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
"""Options that say how the adapter was made or where it lies, not what it computes."""
_NEUTRAL = {
    "bias": ("none",),
    "peft_type": ("LORA",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True, slots=True)
class _Pair:
    """The factors of one linear: A whole, rows start .. stop of B."""

    a: TensorRef
    b: TensorRef
    rows: tuple[int, int]
    alpha: float
    scaling: Scaling


def put_on(folder: Path, model: Model) -> Model:
    """The model with the adapter in the folder beside its weights; factors are read when needed.

    Raises:
        EffcError: E414 to E417 for files, E460 and E461 for the adapter, E462 where it does not fit.
    """
    config = _config(folder)
    if (folder / "adapter_model.bin").exists() and not (folder / WEIGHTS).exists():
        _refuse("E417", "the adapter is a pickle, which is never read", "save it as safetensors with peft")
    refs = read_header(within(folder, WEIGHTS))
    pairs = dict(_pairs(refs, config, model))
    rw = Rewriter(model, "adapter")
    for path, pair in pairs.items():
        base = rw.module(path)
        rw.swap(
            path, LoraLinear.over(base, pair.a.shape[0], pair.alpha, pair.scaling), f"rank {pair.a.shape[0]}"
        )
    out = rw.done()
    for path, pair in pairs.items():
        unit: Any = out.module(path)
        out.weights[f"{path}.a"] = _lazy(pair.a, (0, pair.a.shape[0]), unit.a.dtype)
        out.weights[f"{path}.b"] = _lazy(pair.b, pair.rows, unit.b.dtype)
    return out


def sketched_on(folder: Path, model: Model) -> Model:
    """A stand-in for trials on a small copy of the model: an adapter on the same modules, all zero."""
    config, refs = _config(folder), read_header(within(folder, WEIGHTS))
    named = {found["module"] for name in refs if (found := _TENSOR.match(name))}
    rw = Rewriter(model, "adapter")
    for path, spot in spots(model).items():
        base = rw.module(path)
        if spot.name in named and isinstance(base, Linear | QuantLinear):
            rank = min(int(config["r"]), base.in_features, base.out_features)
            rw.swap(path, LoraLinear.over(base, rank, float(rank), "rank"), f"rank {rank}")
    out = rw.done()
    for name, tensor in out.tensors().items():
        if name not in model.tensors() and name.endswith((".a", ".b")) and tensor.is_meta:
            out.weights[name] = resident(torch.zeros(tensor.shape, dtype=tensor.dtype))
    return out


def _config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        help = "give a folder as peft's `save_pretrained` or `export ... as peft(...)` writes it"
        raise EffcError(Diagnostic("E441", f"there is no folder `{folder}` with an adapter", help=help))
    config = read_json(within(folder, CONFIG), MAX_CONFIG)
    if not isinstance(config, dict):
        _refuse("E460", f"{CONFIG} holds no table of settings")
    problems = []
    for key, value in config.items():
        if key in _READ or key in _HARMLESS:
            continue
        allowed = _NEUTRAL.get(key)
        if allowed is None and value in (None, False, [], {}, ""):
            continue
        if key == "megatron_config" and value is None:
            continue
        if allowed is None or not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
            what = f"`{key}` is {str(value)[:60]}"
            help = (
                "effc reads plain LoRA; fold the adapter in with peft's merge_and_unload and load the result"
            )
            problems.append(
                Diagnostic(
                    "E461", "the adapter uses an option that effc does not read", notes=(what,), help=help
                )
            )
    if config.get("peft_type", "LORA") == "LORA":
        problems += list(_wrong_numbers(config))
    if problems:
        raise EffcError(*problems)
    return config


def _wrong_numbers(config: Mapping[str, Any]) -> Iterator[Diagnostic]:
    """Rank and alpha, alone and by module, must be positive numbers, and patterns plain names."""
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}
    listed = [("r", config.get("r")), ("lora_alpha", config.get("lora_alpha"))]
    if not isinstance(alphas, dict) or not isinstance(ranks, dict):
        yield _malformed("`alpha_pattern` and `rank_pattern` must be tables")
        return
    listed += [*alphas.items(), *ranks.items()]
    for name, value in listed:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
            yield _malformed(f"{str(name)[:60]!r} must be a number above 0, not {str(value)[:40]}")
    for name in (*alphas, *ranks):
        if not _PATTERN.match(name):
            yield _malformed(f"{name[:60]!r} is a regular expression; effc takes names of modules")


def _pairs(
    refs: Mapping[str, TensorRef], config: Mapping[str, Any], model: Model
) -> Iterator[tuple[str, _Pair]]:
    """Canonical path -> factors, after checking every tensor; all problems at once."""
    on_disk: dict[str, list[str]] = {}
    places = spots(model)
    for path, spot in places.items():
        on_disk.setdefault(spot.name, []).append(path)
    factors: dict[str, dict[str, TensorRef]] = {}
    problems: list[Diagnostic] = []
    for name, ref in refs.items():
        if found := _TENSOR.match(name):
            factors.setdefault(found["module"], {})[found["factor"]] = ref
        else:
            problems.append(_malformed(f"{name[:100]!r} is no factor of a LoRA"))
    if not refs:
        problems.append(_malformed("there is no tensor in it"))
    made: list[tuple[str, _Pair]] = []
    for module, pair in factors.items():
        why = _unfit(module, pair, on_disk.get(module, []), places, model)
        if why:
            title = "the adapter does not fit the model"
            help = "put it on the model it was trained on, before stages that change its layers"
            problems.append(Diagnostic("E462", title, notes=(f"{module}: {why}",), help=help))
            continue
        alpha, rank = _numbers(module, config)
        if pair["A"].shape[0] != rank:
            problems.append(_malformed(f"{module} has rank {pair['A'].shape[0]}, its settings say {rank}"))
        scaling: Scaling = "sqrt_rank" if config.get("use_rslora") else "rank"
        start = 0
        for path in sorted(on_disk[module], key=lambda p: _order(places[p], p)):
            stop = start + model.module(path).out_features  # type: ignore[operator]
            made.append((path, _Pair(pair["A"], pair["B"], (start, int(stop)), alpha, scaling)))
            start = int(stop)
    if problems:
        raise EffcError(*problems)
    yield from made


def _order(spot: Spot, path: str) -> int:
    return spot.parts.index(path) if spot.parts else 0


def _unfit(
    module: str, pair: Mapping[str, TensorRef], paths: list[str], places: Mapping[str, Spot], model: Model
) -> str | None:
    """Why two factors cannot sit on a module, in words."""
    if not paths:
        return "the model has no such module"
    if set(pair) != {"A", "B"}:
        return f"factor {'B' if 'A' in pair else 'A'} is missing"
    if any(places[path].per_head for path in paths):
        return "its matrix alternates q, k and v head by head, which effc does not adapt"
    units: list[Any] = [model.module(path) for path in paths]
    for unit in units:
        if isinstance(unit, LoraLinear):
            return "it has an adapter already; fold it first with adapt.fold"
        if not isinstance(unit, Linear | QuantLinear):
            return f"it is {type(unit).__name__}, not a linear"
    a, b = pair["A"], pair["B"]
    out, inputs = sum(unit.out_features for unit in units), units[0].in_features
    if (
        len(a.shape) != 2
        or len(b.shape) != 2
        or a.shape[1] != inputs
        or b.shape[0] != out
        or a.shape[0] != b.shape[1]
    ):
        return f"the factors are {list(a.shape)} and {list(b.shape)}, the matrix is [{out}, {inputs}]"
    if a.shape[0] > min(inputs, *(unit.out_features for unit in units)):
        return f"rank {a.shape[0]} is larger than the matrix [{out}, {inputs}]"
    return None


def _numbers(module: str, config: Mapping[str, Any]) -> tuple[float, int]:
    """alpha and rank of a module: the first pattern that names it, else the common ones."""

    def chosen(patterns: Mapping[str, Any], common: Any) -> Any:
        for pattern, value in patterns.items():
            found = _PATTERN.match(pattern)
            name = found["name"].replace("\\.", ".") if found else pattern
            whole = pattern.startswith("^")
            if module == name or (not whole and module.endswith(f".{name}")):
                return value
        return common

    alpha = chosen(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return float(alpha), int(chosen(config.get("rank_pattern") or {}, config["r"]))


def _lazy(ref: TensorRef, rows: tuple[int, int], dtype: torch.dtype) -> LazyTensor:
    whole = rows == (0, ref.shape[0])
    if whole and ref.dtype == dtype:
        return ref.lazy()
    return LazyTensor((rows[1] - rows[0], *ref.shape[1:]), dtype, lambda: ref.read(rows).to(dtype))


def _malformed(why: str) -> Diagnostic:
    help = f"an adapter folder holds {CONFIG} and {WEIGHTS}, as peft's save_pretrained writes them"
    return Diagnostic("E460", "the adapter cannot be read", notes=(why,), help=help)


def _refuse(code: str, why: str, help: str | None = None) -> NoReturn:
    raise EffcError(Diagnostic(code, "the adapter cannot be read", notes=(why,), help=help))
