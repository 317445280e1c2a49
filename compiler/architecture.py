"""Architecture: one family of checkpoints as data, read from specs/architectures/NAME.yaml.

config    our word -> the configuration key it is read from (see `_read`)
only      configuration keys whose other values change the function in a way effc cannot express
order     pre, post or parallel (compiler/assemble.py)
blocks    embedding, layer.*, norm, head, tail: block type and arguments; `=word` is a value of `config`
tensors   canonical module -> module on disk, with {i} for the layer and {e} for the expert
fused     tensors on disk that hold several canonical ones
extends   families whose models are written as this one once they have its other blocks (compiler/kin.py)
beside    tensors of poolers and task heads: not computed with, carried through to an export
ignore    buffers on disk that are computed anew
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from effc.compiler.config_keys import unread
from effc.specs.diagnostic import Diagnostic, EffcError

Config = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
    "tanh": "tanh",
}
"""Names of activations in configurations -> ours."""

_REMOTE = ("auto_map", "trust_remote_code", "custom_pipelines")


@dataclass(frozen=True, slots=True)
class Fused:
    """A tensor on disk made of canonical parts: one after another by rows, or per head where interleaved."""

    name: str
    parts: tuple[str, ...]
    transpose: bool = False
    per_head: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family: how its configuration and its tensor names map to blocks and back."""

    name: str
    classes: tuple[str, ...]
    """Names that `architectures` in config.json may have; the first is written on export."""
    encoder: bool
    config: Mapping[str, Any]
    only: Mapping[str, Sequence[Any]]
    order: Any
    blocks: Mapping[str, Any]
    tensors: Mapping[str, str]
    transposed: frozenset[str]
    stacked: Mapping[str, str]
    fused: tuple[Fused, ...]
    prefix: str
    ignore: tuple[str, ...]
    beside: tuple[str, ...] = ()
    shaped: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Canonical module -> the shape its weight has on disk (numbers, `=word`, -1 for the rest)."""
    bare: frozenset[str] = frozenset()
    """Canonical modules whose tensor on disk has the module's name alone, without `.weight`."""
    extends: tuple[str, ...] = ()
    writes: Mapping[str, str] = field(default_factory=dict)
    """Our word -> configuration key, for what a stage may change (layers, hidden, ...)."""


def names() -> list[str]:
    """Every family that has a file."""
    found = files("effc.specs.architectures").iterdir()
    return sorted(p.name.removesuffix(".yaml") for p in found if p.name.endswith(".yaml"))


@cache
def architecture(name: str) -> Architecture:
    """A family by its `model_type`.

    Raises:
        EffcError: E430 when effc has no file for it.
    """
    if name not in names():
        help = f"effc reads {', '.join(names())}; `effc.trace` takes any module"
        raise EffcError(Diagnostic("E430", f"no architecture is called `{name[:60]}`", help=help))
    text = files("effc.specs.architectures").joinpath(f"{name}.yaml").read_text()
    data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    tensors: dict[str, str] = {}
    transposed: set[str] = set()
    stacked: dict[str, str] = {}
    shaped: dict[str, Sequence[Any]] = {}
    bare: set[str] = set()
    for canonical, source in data["tensors"].items():
        if isinstance(source, str):
            tensors[canonical] = source
        elif "stack" in source:
            stacked[canonical] = source["stack"]
        else:
            tensors[canonical] = source["from"]
            if source.get("transpose"):
                transposed.add(canonical)
            if source.get("bare"):
                bare.add(canonical)
            if "shape" in source:
                shaped[canonical] = source["shape"]
    fused = tuple(
        Fused(f["name"], tuple(f["parts"]), f.get("transpose", False), f.get("per_head", False))
        for f in data.get("fused", ())
    )
    return Architecture(
        name=name,
        classes=tuple(data["classes"]),
        encoder=data.get("encoder", False),
        config=data["config"],
        only=data.get("only", {}),
        order=data.get("order", "pre"),
        blocks=data["blocks"],
        tensors=tensors,
        transposed=frozenset(transposed),
        stacked=stacked,
        fused=fused,
        prefix=data.get("prefix", ""),
        ignore=tuple(data.get("ignore", ())),
        beside=tuple(data.get("beside", ())),
        shaped=shaped,
        bare=frozenset(bare),
        extends=tuple(data.get("extends", ())),
        writes={word: _key(how) for word, how in data["config"].items() if _key(how)},
    )


def _key(how: Any) -> str:
    return how if isinstance(how, str) else str(how.get("key", "")) if "is" not in how else ""


def check_trust(config: Config) -> None:
    """Refuse configurations that ask for code of their own. Raises EffcError E431."""
    for key in _REMOTE:
        if config.get(key):
            note = f"`{key}` is {str(config[key])[:80]}"
            help = "effc never runs remote code; use a checkpoint in the layout of a known architecture"
            raise EffcError(
                Diagnostic("E431", "the model asks for code of its own", notes=(note,), help=help)
            )


def read_config(family: Architecture, config: Config) -> dict[str, Any]:
    """The values of `family.config` from a config.json.

    Raises:
        EffcError: E431 remote code, E432 every key that is missing, of the wrong type or beyond `only`.
    """
    check_trust(config)
    problems: list[Diagnostic] = []
    for key, allowed in family.only.items():
        value = config.get(key, allowed[0])
        if value is not None and value not in allowed:
            note = f"{key} is {str(value)[:60]}; {family.name} is read with {', '.join(map(str, allowed))}"
            title = f"`{key}` of config.json changes the function in a way effc cannot express"
            problems.append(Diagnostic("E432", title, notes=(note,)))
    if strange := [key for key in unread(family.config, family.only, config) if key != "quantization_config"]:
        notes = [f"{key} is {str(config[key])[:60]}" for key in strange[:8]]
        title = f"config.json sets {len(strange)} keys that change the function and that no {family.name} has"
        problems.append(Diagnostic("E432", title, notes=notes))
    if config.get("quantization_config"):
        method = str(config["quantization_config"])[:80]
        title = "the checkpoint is quantized, and effc starts from dense weights"
        problems.append(Diagnostic("E432", title, notes=(f"quantization_config is {method}",)))
    values: dict[str, Any] = {}
    for word, how in family.config.items():
        try:
            values[word] = _read(word, how, config, values)
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as problem:
            key = _key(how) or word
            note = str(problem.args[0])[:160] if problem.args else type(problem).__name__
            problems.append(
                Diagnostic("E432", f"`{key}` of config.json cannot be used for {family.name}", notes=(note,))
            )
    if problems:
        raise EffcError(*problems)
    return values


def _read(word: str, how: Any, config: Config, values: Config) -> Any:
    """One value.

    key                      the configuration's value, which must be there
    {key: K, else: X}        X where K is absent or null; X may be `=other`, `=a / b`, `=a * b`
    {key: K, else: X, absent: Z}  X where K is null, Z where it is absent
    {key: K, is: activation} our name of an activation
    {key: K, is: inverse_root}  1 / sqrt(value); {key: K, is: root} sqrt(value)
    {is: rope, ...}          rope parameters, old keys and new
    {is: windows, ...}       a list, keys that a query of each layer may see (null: all)
    """
    if isinstance(how, str):
        how = {"key": how}
    kind = how.get("is")
    if kind == "rope":
        return _rope(how, config, values)
    if kind == "windows":
        return _windows(how, config, values)
    value = config.get(how["key"], how.get("absent")) if "key" in how else None
    if value is None:
        if "else" not in how:
            raise KeyError(f"`{how['key']}` is missing")
        value = resolve(how["else"], values)
    if kind == "activation":
        if value not in ACTIVATIONS:
            raise ValueError(f"{str(value)[:40]!r} is none of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]
    if kind == "inverse_root":
        return 1 / math.sqrt(value)
    if kind == "root":
        return math.sqrt(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{word} must be finite")
    if type(value) is int and not 0 <= value < 2**31:
        raise ValueError(f"{value} is no size that a model has")
    if not isinstance(value, bool | int | float | str | type(None)):
        raise TypeError(f"a number or a word is due, not {str(value)[:40]}")
    return value


def resolve(value: Any, values: Config, layer: int | None = None) -> Any:
    """A literal, or `=word`, `=word[layer]`, `=a / b`, `=a * b` over the values read so far."""
    if not isinstance(value, str) or not value.startswith("="):
        return value
    match value[1:].split():
        case [word] if word.endswith("[layer]"):
            return values[word.removesuffix("[layer]")][layer]
        case [word]:
            return values[word]
        case [a, "/", b]:
            return values[a] // values[b]
        case [a, "*", b]:
            return values[a] * (int(b) if b.isdecimal() else values[b])
    raise ValueError(f"{value} is no expression")


def _rope(how: Mapping[str, Any], config: Config, values: Config) -> dict[str, Any]:
    """rope_parameters (transformers 5), or rope_theta, rope_scaling and partial_rotary_factor (before)."""
    new = config.get("rope_parameters")
    if isinstance(new, Mapping) and "full_attention" in new:
        new = new["full_attention"]
    found = dict(new or config.get("rope_scaling") or {})
    form = found.pop("type", None)
    found.setdefault("rope_type", form or "default")
    if found["rope_type"] == "su":
        found["rope_type"] = "longrope"
    theta = config.get(how.get("theta_key", "rope_theta"))
    found.setdefault("rope_theta", theta if theta is not None else how.get("theta", 10000.0))
    share = config.get(how.get("partial_key", "partial_rotary_factor"))
    if share is None:
        share = how.get("partial", 1.0)
    if share != 1.0:
        found.setdefault("partial_rotary_factor", share)
    limit = config.get("max_position_embeddings")
    if found["rope_type"] != "default" and limit is not None:
        found.setdefault("max_position_embeddings", limit)
        if found["rope_type"] in ("longrope", "yarn", "llama3"):
            old = config.get("original_max_position_embeddings")
            found.setdefault("original_max_position_embeddings", old or limit)
    return found


def _windows(how: Mapping[str, Any], config: Config, values: Config) -> list[int | None]:
    """Which layers slide: `layer_types` where it is written, else the family's rule."""
    layers = values["layers"]
    window = config.get("sliding_window", how.get("window"))
    if "gate" in how and not config.get(how["gate"], False):
        window = None
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ValueError(f"layer_types has {len(kinds)} entries for {layers} layers")
        if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types has {str(sorted(unknown)[0])[:40]!r}")
        return [window if kind == "sliding_attention" else None for kind in kinds]
    rule = how.get("rule", "all")
    if rule == "alternate":
        return [window if i % 2 == 0 else None for i in range(layers)]
    if rule == "after":
        first = config.get("max_window_layers", layers)
        return [window if i >= first else None for i in range(layers)]
    return [window] * layers
