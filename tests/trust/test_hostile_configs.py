"""config.json and tokenizer files that ask for too much: code, absurd sizes, files elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from effc.runtime.load import load
from tests.trust.hostile import CONFIG, Spoil, configured, refused, sound


def _text(text: str | bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return spoil


def _sparse(name: str, size: int) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return spoil


def _link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def _pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def _with(**changes: object) -> Spoil:
    return lambda folder: configured(folder, **changes)


CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "auto_map": (_with(auto_map={"AutoModel": "modeling.Evil"}), ("E431",)),
    "trust_remote_code": (_with(trust_remote_code=True), ("E431",)),
    "remote code of an unknown family": (_with(model_type="evil", auto_map={"A": "b.C"}), ("E431",)),
    "custom_pipelines": (_with(custom_pipelines={"x": {"impl": "evil.py"}}), ("E431",)),
    "unknown family": (_with(model_type="transformer9000"), ("E430",)),
    "family that is a path": (_with(model_type="../../zoo/pylm/config"), ("E430",)),
    "family that is a list": (_with(model_type=["llama"]), ("E430",)),
    "quantized": (_with(quantization_config={"quant_method": "awq"}), ("E432",)),
    "10^9 layers": (_with(num_hidden_layers=10**9), ("E432",)),
    "no layers": (_with(num_hidden_layers=0), ("E432",)),
    "-3 layers": (_with(num_hidden_layers=-3), ("E432",)),
    "layers as text": (_with(num_hidden_layers="__import__('os')"), ("E432",)),
    "width 10^15": (_with(hidden_size=10**15), ("E432",)),
    "width of a billion digits' kind": (_with(hidden_size=10**400), ("E432",)),
    "width 1.5": (_with(hidden_size=1.5), ("E432",)),
    "vocabulary that is a list": (_with(vocab_size=[1, 2]), ("E432",)),
    "no heads": (_with(num_attention_heads=0), ("E432",)),
    "heads that do not divide": (_with(num_attention_heads=3, num_key_value_heads=2), ("E432",)),
    "activation that is code": (_with(hidden_act="__import__('os').system('id')"), ("E432",)),
    "rope of an unknown kind": (_with(rope_scaling={"rope_type": "spiral", "factor": 2}), ("E432",)),
    "rope that is a number": (_with(rope_parameters=7), ("E432",)),
    "rope theta as text": (_with(rope_theta="1e9999"), ("E432",)),
    "eps as text": (_with(rms_norm_eps="tiny"), ("E432",)),
    "eps that is a flag": (_with(rms_norm_eps=True), ("E432",)),
    "sizes of another model": (_with(hidden_size=32, head_dim=8), ("E433",)),
    "more layers than weights": (_with(num_hidden_layers=3), ("E433",)),
    "not JSON": (_text("{"), ("E414",)),
    "not UTF-8": (_text(b'{"a": "\xff"}'), ("E414",)),
    "a list": (_text("[]"), ("E414",)),
    "a key twice": (_text('{"model_type": "llama", "model_type": "gpt2"}'), ("E414",)),
    "nested 200,000 deep": (_text("[" * 200_000), ("E414",)),
    "an endless number": (_text('{"hidden_size": ' + "9" * 100_000 + "}"), ("E414",)),
    "infinity": (_text(json.dumps(CONFIG | {"rms_norm_eps": float("inf")})), ("E414", "E432")),
    "config of 1 TB": (_sparse("config.json", 1 << 40), ("E414",)),
    "config linked to a device": (_link("config.json", "/dev/zero"), ("E416",)),
    "config linked to a secret": (_link("config.json", "/etc/passwd"), ("E416",)),
    "config that is a pipe": (_pipe("config.json"), ("E416",)),
    "tokenizer of 1 TB": (_sparse("tokenizer.json", 1 << 40), ("E434",)),
    "vocabulary file of 1 TB": (_sparse("vocab.json", 1 << 40), ("E434",)),
    "tokenizer linked to a secret": (_link("tokenizer.json", "/etc/passwd"), ("E416",)),
    "template that is a pipe": (_pipe("chat_template.jinja"), ("E416",)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_asks_for_too_much_is_refused(case: str, tmp_path: Path) -> None:
    spoil, codes = CASES[case]
    folder = sound(tmp_path / "model")
    spoil(folder)
    with refused(*codes):
        load(folder)


@pytest.mark.parametrize(
    "where",
    [
        "zoo:../../etc",
        "zoo:nothing",
        "hf:../../etc/passwd",
        "hf:a/b/../..",
        "hf:org/name",
        "no/such/folder",
        "\0",
    ],
)
def test_a_name_that_leads_nowhere_is_refused(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with refused("E441", "E442"):
        load(where)


@pytest.mark.parametrize("commit", ["../../../outside", "/etc", "", "a" * 10_000])
def test_a_cache_reference_cannot_lead_elsewhere(
    commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    sound(tmp_path / "outside")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with refused("E442"):
        load("hf:org/name")


def test_a_cache_snapshot_loads_through_its_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "models--org--name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc123")
    (home / "snapshots").mkdir()
    sound(home / "blobs")
    (home / "snapshots" / "abc123").mkdir()
    for path in (home / "blobs").iterdir():
        (home / "snapshots" / "abc123" / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert not load("hf:org/name").materialize().is_meta
