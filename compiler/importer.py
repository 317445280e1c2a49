"""Import: a Hugging Face folder to a model whose weights are read when needed.

Reads config.json and the headers of the safetensors files, nothing else; every difference between what the
configuration calls for and what the files hold is reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from effc.compiler.architecture import Architecture, architecture, check_trust, read_config, resolve
from effc.compiler.assemble import Order, assemble
from effc.compiler.blocks import Unit
from effc.compiler.checkpoint import TensorRef, read_folder, read_json, refuse, within
from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.places import Place, place_of, places, stored_shape
from effc.compiler.sharing import tie
from effc.compiler.weights import LazyTensor
from effc.specs.diagnostic import Diagnostic, EffcError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "preprocessor_config.json",
)
"""What travels with a model, as it is."""
MAX_CONFIG = 10_000_000
MAX_TOKENIZER = 200_000_000
MAX_LAYERS = 10_000
_SHOWN = 6
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def import_folder(
    folder: Path, dtype: torch.dtype | None = None, root: Path | None = None, weights: bool = True
) -> Model:
    """The model in a folder of Hugging Face layout. `root`: the folder that links may lead into.

    With `weights = False` the folder may hold config.json alone: then the model has the tensors that it calls
    for, in its dtype, and no source to read them from.

    Raises:
        EffcError: E414 to E418, E434 for files, E430 to E432 for the configuration, E433 for tensors that are
            missing, unexpected or of another shape.
    """
    config = read_json(within(folder, "config.json", root), MAX_CONFIG)
    if not isinstance(config, dict):
        refuse("E414", folder / "config.json", "it holds no table of settings")
    check_trust(config)
    family = architecture(str(config.get("model_type", "")))
    if not weights and without_weights(folder):
        model = build(family, config, dtype or _said(config))
        model.tokenizer = tokenizer_files(folder, root)
        return model
    refs = read_folder(folder, root)
    stored = next((r.dtype for r in refs.values() if r.dtype.is_floating_point), torch.float32)
    model = build(family, config, dtype or stored)
    model.tokenizer = tokenizer_files(folder, root)
    model.weights, model.beside = _weights(model, family, refs)
    return model


def without_weights(folder: Path) -> bool:
    """Does the folder hold a configuration and nothing that could be weights?"""
    return (folder / "config.json").is_file() and not any(
        path.suffix in _WEIGHTS or path.name.endswith(".index.json") for path in folder.iterdir()
    )


def _said(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a configuration names, in the new key or the old."""
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)


def tokenizer_files(folder: Path, root: Path | None = None) -> TokenizerFiles | None:
    """Tokenizer, templates and generation settings, where the folder has them; it may have none.

    Raises:
        EffcError: E416 for a link out of the folder, E434 for a file of absurd size.
    """
    found: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        path = within(folder, name, root)
        if not path.is_file():
            continue
        if (size := path.stat().st_size) > MAX_TOKENIZER:
            refuse("E434", path, f"it has {size} bytes; at most {MAX_TOKENIZER} make sense")
        found[name] = path.read_bytes()
    return TokenizerFiles(found) if found else None


def build(family: Architecture, config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Model:
    """The structure that a configuration calls for, on the meta device, without weights.

    Raises:
        EffcError: E431, E432 as `read_config`; E432 when the sizes do not make a model.
    """
    values = read_config(family, config)
    word = str(dtype).removeprefix("torch.")
    layers = values["layers"]
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        note = f"got {layers}; 1 to {MAX_LAYERS} make sense"
        raise EffcError(
            Diagnostic("E432", "config.json asks for no sensible number of layers", notes=(note,))
        )

    def unit(spec: Mapping[str, Any], layer: int | None = None) -> Unit:
        given = {k: v if k == "type" else resolve(v, values, layer) for k, v in spec.items()}
        if given["type"] != "Softcap":
            given["dtype"] = word
        return Unit.from_spec(given)

    blocks = family.blocks
    try:
        rows: list[Mapping[str, nn.Module]] = [
            {name: unit(spec, i) for name, spec in blocks["layer"].items()} for i in range(layers)
        ]
        tail = [
            (name, unit(spec))
            for name, spec in blocks.get("tail", {}).items()
            if all(resolve(v, values) is not None for v in spec.values())
        ]
        gm = assemble(
            unit(blocks["embedding"]),
            rows,
            unit(blocks["norm"]) if "norm" in blocks else None,
            unit(blocks["head"]) if "head" in blocks else None,
            tail,
            _order(family, values),
        )
    except (ValueError, RuntimeError, TypeError) as problem:
        title = "the sizes in config.json do not make a model"
        raise EffcError(Diagnostic("E432", title, notes=(str(problem)[:200],))) from None
    _tie_head(gm, bool(values.get("tied")))
    return Model(gm, config=config, architecture=family.name)


def _order(family: Architecture, values: Mapping[str, Any]) -> Order:
    if isinstance(family.order, str):
        return family.order  # type: ignore[return-value]
    chosen: Order = family.order["then" if values[family.order["when"]] else "else"]
    return chosen


def _tie_head(gm: fx.GraphModule, tied: bool) -> None:
    if tied and "head" in dict(gm.named_modules()):
        tie(gm, "head.weight", "embedding.weight")


def _weights(
    model: Model, family: Architecture, refs: Mapping[str, TensorRef]
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """Canonical name -> weights, and name on disk -> what the family carries beside them."""
    tensors, ties = model.tensors(), set(model.ties())
    prefix = family.prefix
    bare = prefix and not any(name.startswith(prefix) for name in refs)
    source = {(prefix + n if bare and not _outside(family, n) else n): r for n, r in refs.items()}
    used: set[str] = set()
    missing: list[str] = []
    wrong: list[str] = []
    found: dict[str, LazyTensor] = {}
    for name, place in places(family, model).items():
        wanted = [place.name.replace("{e}", str(e)) for e in range(place.experts)] or [place.name]
        lost = [w for w in wanted if w not in source]
        used.update(wanted)
        if lost:
            missing += lost
            continue
        due = stored_shape(place, name, tensors)
        off = [w for w in wanted if source[w].shape != due]
        if off:
            wrong.append(f"{off[0]} is {list(source[off[0]].shape)}, not {list(due)}")
            continue
        found[name] = _lazy(name, place, tensors, [source[w] for w in wanted])
    tied = {place_of(family, alias) for alias in ties}
    left = [n for n in source if n not in used and n not in tied and not _among(n, family.ignore)]
    extra = [n for n in left if not _among(n, family.beside)]
    problems = [
        Diagnostic(
            "E433",
            f"the weights do not fit config.json: {len(names)} tensors {what}",
            notes=[*names[:_SHOWN], *([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])],
            help=f"is the folder a whole {family.name} checkpoint, and is config.json its own?",
        )
        for what, names in (
            ("are missing", missing),
            ("have another shape", wrong),
            ("are not expected", extra),
        )
        if names
    ]
    if problems:
        raise EffcError(*problems)
    return found, {n: source[n].lazy() for n in left}


def _among(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _outside(family: Architecture, name: str) -> bool:
    """Tensors that carry no prefix even in full checkpoints, such as the head."""
    module = name.rpartition(".")[0]
    return any(module == t for t in family.tensors.values() if not t.startswith(family.prefix))


def _lazy(name: str, place: Place, tensors: Mapping[str, Tensor], refs: list[TensorRef]) -> LazyTensor:
    shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
    plain = not (place.parts or place.transpose or place.experts or place.shape) and refs[0].dtype == dtype
    if plain:
        return refs[0].lazy()
    return LazyTensor(shape, dtype, lambda: _rows(name, place, tensors, refs).to(dtype))


def _rows(name: str, place: Place, tensors: Mapping[str, Tensor], refs: list[TensorRef]) -> Tensor:
    """Read a tensor that is transposed, stacked or fused on disk into its canonical form."""
    if place.experts:
        return torch.stack([ref.read() for ref in refs])
    if place.shape:
        return refs[0].read().view(tensors[name].shape)
    if not place.parts:
        return refs[0].read().t().contiguous() if place.transpose else refs[0].read()
    if place.head_dim:
        heads_first = refs[0].read().unflatten(0, (-1, len(place.parts), place.head_dim))
        own: Tensor = heads_first[:, place.part].flatten(0, 1).contiguous()
        return own
    start = sum(tensors[p].shape[0] for p in place.parts[: place.part])
    stop = start + tensors[name].shape[0]
    if place.transpose:
        return refs[0].read()[:, start:stop].t().contiguous()
    return refs[0].read((start, stop))
