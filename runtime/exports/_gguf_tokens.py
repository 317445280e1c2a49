"""A byte-level byte-pair tokenizer as GGUF metadata: tokens, merges, special numbers, splitting rule."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from effc.specs.diagnostic import Diagnostic

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of token, as llama.cpp numbers them."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    _WORDS + r"|\p{N}{1,3}|" + _REST: "llama-bpe",
    _WORDS + r"|\p{N}|" + _REST: "qwen2",
}
"""Regular expression of a pre-tokenizer -> the name by which llama.cpp knows it."""


def problems(files: Mapping[str, bytes]) -> Iterator[Diagnostic]:
    """What about the tokenizer GGUF cannot say, as far as effc writes it."""
    told = json.loads(files.get("tokenizer.json", b"null"))
    if not told:
        yield _cannot("has no tokenizer.json", "save the tokenizer with the `tokenizers` library")
        return
    if told["model"].get("type") != "BPE" or told["model"].get("byte_fallback"):
        kind = "byte fallback" if told["model"].get("byte_fallback") else told["model"].get("type")
        yield _cannot(f"is not a byte-level BPE but {kind}", "export as hf or artifact")
        return
    if split_of(told) is None:
        yield _cannot("splits text in a way that llama.cpp has no name for", "export as hf or artifact")
    if told.get("normalizer"):
        yield _cannot(f"normalizes text ({told['normalizer'].get('type')})", "export as hf or artifact")


def split_of(told: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the splitting rule; None when it has none."""
    before = told.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return "gpt-2" if parts[0].get("use_regex", True) else None
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        return _SPLITS.get(parts[0].get("pattern", {}).get("Regex", ""))
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "starcoder" if parts[1].get("use_regex", True) else None
    return None


def metadata(files: Mapping[str, bytes], vocab: int) -> dict[str, Any]:
    """Key -> value below `tokenizer.`; rows of the embedding that no token has are marked as unused."""
    told = json.loads(files["tokenizer.json"])
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    tokens = [f"[PAD{number}]" for number in range(vocab)]
    kinds = [UNUSED] * vocab
    for token, number in told["model"]["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
    for token in told.get("added_tokens", []):
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in told["model"]["merges"]]
    found: dict[str, Any] = {
        "ggml.model": "gpt2",
        "ggml.pre": split_of(told),
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.merges": merges,
        "ggml.add_bos_token": bool(settings.get("add_bos_token", False)),
        "ggml.add_space_prefix": False,
    }
    for key, name in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("pad_token", "padding"),
        ("unk_token", "unknown"),
    ):
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text in tokens:
            found[f"ggml.{name}_token_id"] = tokens.index(text)
    template = files.get("chat_template.jinja", b"").decode() or settings.get("chat_template")
    if isinstance(template, str) and template:
        found["chat_template"] = template
    return found


def _cannot(what: str, remedy: str) -> Diagnostic:
    return Diagnostic(
        "E553", "`gguf` cannot hold the tokenizer of this model", notes=(f"it {what}",), help=remedy
    )
