"""Whether models can be mixed weight by weight: same architecture, tensors, vocabulary, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effc.specs.diagnostic import Diagnostic

if TYPE_CHECKING:
    from effc.compiler.model import Model

_SHOWN = 4
"""Names listed in a message before it counts the rest."""


def unlike(kind: str, models: Sequence[Model], template: str = "same") -> list[Diagnostic]:
    """Everything that keeps `kind` from mixing these models, all at once; each is compared with the first.

    With `template = "first"` chat templates may differ.
    """
    first, *others = models
    found: list[Diagnostic] = []
    for number, other in enumerate(others, start=2):
        which, about = f"model {number} of {len(models)}", f"models[{number - 1}]"
        if other.architecture != first.architecture:
            found.append(
                Diagnostic(
                    "E450",
                    f"`{kind}` cannot mix models of different architectures",
                    notes=(f"the first is {first.architecture}, {which} is {other.architecture}",),
                    help="mix models that were fine-tuned from one checkpoint",
                    about=about,
                )
            )
            continue
        problems = [*_tensors(kind, first, other, which), *_texts(kind, first, other, which, template)]
        found += [replace(problem, about=about) for problem in problems]
    packed = [str(number) for number, model in enumerate(models, start=1) if _packed(model)]
    if packed:
        found.append(
            Diagnostic(
                "E453",
                f"`{kind}` cannot mix packed weights",
                notes=(f"quantized: model {', '.join(packed)} of {len(models)}",),
                help="merge the dense models first, then quantize the result",
            )
        )
    return found + _heads(kind, models)


def _heads(kind: str, models: Sequence[Model]) -> list[Diagnostic]:
    """A warning that what travels beside the weights, poolers and task heads, is taken from one model."""
    if not any(model.beside for model in models):
        return []
    held = [{name: lazy.shape for name, lazy in model.beside.items()} for model in models]
    notes = [f"the first has {_some(sorted(held[0])) or 'none'}"]
    notes += [
        f"model {number} of {len(models)} has {_some(sorted(own)) or 'none'}"
        for number, own in enumerate(held[1:], start=2)
        if own != held[0]
    ]
    return [
        Diagnostic(
            "W453",
            f"`{kind}` keeps the pooler and task head of the first model and mixes none",
            notes=tuple(notes),
            help="name the model whose head is to stay first, or train a head afterwards",
            severity="warning",
        )
    ]


def _packed(model: Model) -> bool:
    return any(not tensor.is_floating_point() for tensor in model.tensors().values())


def _tensors(kind: str, first: Model, other: Model, which: str) -> list[Diagnostic]:
    ours = {name: tuple(tensor.shape) for name, tensor in first.tensors().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in other.tensors().items()}
    notes: list[str] = []
    for word, names in (
        (f"{which} lacks", [name for name in ours if name not in theirs]),
        (f"only {which} has", [name for name in theirs if name not in ours]),
    ):
        if names:
            notes.append(f"{word} {_some(names)}")
    shapes = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    notes += [
        f"{name} is {_shape(ours[name])} in the first, {_shape(theirs[name])} in {which}"
        for name in shapes[:_SHOWN]
    ]
    if len(shapes) > _SHOWN:
        notes.append(f"and {len(shapes) - _SHOWN} more of other shapes")
    if not notes:
        return []
    title = f"`{kind}` needs models with the same tensors"
    return [
        Diagnostic("E451", title, notes=tuple(notes), help="mix models that have one checkpoint as ancestor")
    ]


def _texts(kind: str, first: Model, other: Model, which: str, template: str) -> list[Diagnostic]:
    """Tokenizers decide what a row of the embedding means, templates how a chat is written."""
    if first.tokenizer is None or other.tokenizer is None:
        return []
    ours, theirs = first.tokenizer.files, other.tokenizer.files
    found = []
    if _vocabulary(ours) != _vocabulary(theirs):
        found.append(
            Diagnostic(
                "E454",
                f"`{kind}` cannot mix models with different vocabularies",
                notes=(f"{which} gives tokens other numbers than the first",),
                help="mix models that share a tokenizer; equal sizes are not enough",
            )
        )
    if template == "same" and _template(ours) != _template(theirs):
        found.append(
            Diagnostic(
                "E455",
                f"`{kind}` finds different chat templates",
                notes=(f"{which} writes chats in another way than the first",),
                help="give the models one template, or write template = first to keep the first model's",
            )
        )
    return found


def _vocabulary(files: Mapping[str, bytes]) -> Any:
    """Token -> number, added tokens included; the files themselves where there is no tokenizer.json."""
    if "tokenizer.json" not in files:
        return {
            name: content for name, content in files.items() if name.startswith(("vocab", "tokenizer.model"))
        }
    told = json.loads(files["tokenizer.json"])
    vocab = told.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # unigram: pairs of token and score, numbered by place
        vocab = {pair[0]: number for number, pair in enumerate(vocab)}
    return vocab | {token["content"]: token["id"] for token in told.get("added_tokens", [])}


def _template(files: Mapping[str, bytes]) -> Any:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    return json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"
