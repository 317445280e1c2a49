"""The command line with which EleutherAI's lm-evaluation-harness (lm_eval) evaluates an exported folder.

The harness scores how likely texts are, so a folder without a tokenizer has no such line, nor has an encoder.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

TASK = "lambada_openai"
"""Prose of which the last word is to be told: one number in minutes, sensitive to damage by compression."""

OFFLINE = f"""\
{TASK} loads its text from the Hugging Face hub. Without a network, put a task file (YAML) of your own beside
a JSON Lines file and replace `--tasks {TASK}` by `--include_path FOLDER --tasks NAME`."""

_DECODERS = ("ForCausalLM", "LMHeadModel")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def evaluation(folder: Path, task: str = TASK, tasks: Path | None = None) -> str | None:
    """The line for a folder in the layout of transformers, quoted for a shell; None where none works.

    `tasks` is a folder with task files of one's own.
    """
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    classes = config.get("architectures") or [""]
    if not str(classes[0]).endswith(_DECODERS):
        return None
    place = str(folder)
    given = f"pretrained={place},dtype=auto"
    if "," in place or "=" in place:  # what separates the harness's own arguments
        given = json.dumps({"pretrained": place, "dtype": "auto"})
    own = f"--include_path {shlex.quote(str(tasks))} " if tasks is not None else ""
    return f"lm_eval --model hf --model_args {shlex.quote(given)} {own}--tasks {task} --batch_size 8"
