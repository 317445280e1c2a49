"""Make a model of the zoo again: its tokenizer, and the card that says what it is worth.

python -m effc.runtime.zoo tokenizer specs/zoo/pylm
effc compile specs/recipes/pylm.effc
python -m effc.runtime.zoo publish out/pylm specs/zoo/pylm
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from effc.compiler.cost import count
from effc.compiler.model import Model
from effc.runtime.data._packed import Packed
from effc.runtime.data._vocabulary import Vocabulary
from effc.runtime.data.corpus import Corpus, listed_files
from effc.runtime.ngram import NGram, bits_per_byte, byte_model
from effc.specs.units import fmt_bytes, fmt_count

VOCABULARY = 4096
SEQ = 512
_END, _PAD = "<|endoftext|>", "<|pad|>"
_SHIPPED = ("config.json", "model.safetensors")


def texts(split: str) -> list[str]:
    """The files of the corpus in one split."""
    return [path.read_text(encoding="utf-8") for path, found in listed_files() if found == split]


def tokenizer() -> Tokenizer:
    """Byte-level byte pairs of the train split; a document opens with `<|endoftext|>`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_END, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts("train"), trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{_END} $A", pair=f"{_END} $A {_END} $B", special_tokens=[(_END, 0)]
    )
    return made


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and its companions."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": _END,
        "clean_up_tokenization_spaces": False,
        "eos_token": _END,
        "model_max_length": SEQ,
        "pad_token": _PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    for name, content in (("tokenizer_config.json", settings), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def publish(made: Path, folder: Path) -> None:
    """Take the weights of an exported folder into the zoo, and write the card."""
    for name in _SHIPPED:
        shutil.copyfile(made / name, folder / name)
    (folder / "README.md").write_text(card(folder), encoding="utf-8")


def baselines(files: dict[str, bytes]) -> dict[str, float]:
    """Bits a byte of n-gram models on the held-out files."""
    train, heldout = texts("train"), texts("heldout")
    vocabulary = Vocabulary.of(files)
    counted, judged = (
        [ids.astype(np.uint64) for ids in vocabulary.encode(t, around=True)] for t in (train, heldout)
    )
    tokens = NGram([d[1:] for d in counted], 5, bits=12, symbols=VOCABULARY)
    size = sum(len(text.encode()) for text in heldout)
    return {
        "5-gram over bytes": bits_per_byte(byte_model(train, 5), heldout),
        "8-gram over bytes": bits_per_byte(byte_model(train, 8), heldout),
        "5-gram over this model's tokens": tokens.bits_of([d[1:] for d in judged]) / size,
    }


def card(folder: Path) -> str:
    """README.md of a model of the zoo, every number measured now."""
    from effc.runtime import evaluate
    from effc.runtime.load import load

    model = load(folder).materialize()
    files = dict(model.tokenizer.files) if model.tokenizer else {}
    data = Corpus(name="python-stdlib", seq=SEQ).open(files)
    loss = evaluate.loss(model, data)
    bits = loss / np.log(2) / data.bytes_per_token
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in baselines(files).items())
    return _CARD.format(**_words(model, data), loss=loss, bits=bits, rows=rows)


def _words(model: Model, data: Packed) -> dict[str, object]:
    config, cost = model.config, count(model)
    words: dict[str, object] = {
        f"{split}_{what}": value
        for split in ("train", "heldout")
        for what, value in (
            ("files", int(data.streams[split].document[-1]) + 1),
            ("bytes", fmt_bytes(data.streams[split].bytes)),
            ("tokens", fmt_count(data.tokens(split))),
        )
    }
    shape = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    )
    words["shape"] = ", ".join(str(config[key]) for key in shape)
    words |= {"params": fmt_count(cost.params), "bytes": fmt_bytes(cost.bytes), "seq": SEQ}
    return words | {"vocabulary": VOCABULARY, "fingerprint": data.fingerprint[:16]}


_CARD = """---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
---
# pylm

A small decoder that models Python source: llama layout, {params} parameters, {bytes} in bf16,
{vocabulary} byte-level byte-pair tokens, sequences of up to {seq} tokens.
effc's tests, demo and tour run on it.

| | |
|---|---|
| layers, width, mlp, heads, key heads | {shape} |
| data | `corpus("python-stdlib")`: CPython 3.11's standard library, tests left out |
| train split | {train_files} files, {train_bytes}, {train_tokens} tokens |
| held-out split | {heldout_files} files, {heldout_bytes}, {heldout_tokens} tokens |
| data fingerprint | `{fingerprint}` |
| held-out loss | {loss:.3f} nats a token |
| held-out bits a byte | **{bits:.3f}** |

On the same held-out bytes, counted on the same train files (`effc.runtime.ngram`, modified Kneser-Ney):

| model | bits a byte |
|---|---|
{rows}
| pylm | **{bits:.3f}** |

`make zoo` makes it again: the tokenizer, the training (`specs/recipes/pylm.effc`), this card.
It knows the look of Python, not its meaning: expect plausible names and indentation, not working programs.
"""


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["tokenizer", folder]:
            write_tokenizer(Path(folder))
        case ["publish", made, folder]:
            publish(Path(made), Path(folder))
        case ["card", folder]:
            (Path(folder) / "README.md").write_text(card(Path(folder)), encoding="utf-8")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
