"""The line that evaluates an export with lm_eval: right for the folder, withheld where it could not work."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from effc.runtime.harness import evaluation

ROOT = Path(__file__).parents[2]
LOCAL = """task: local_pick
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_choice: "{{[good, bad]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def folder(place: Path, kind: str, tokenizer: bool = True) -> Path:
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps({"architectures": [kind]}))
    if tokenizer:
        (place / "tokenizer.json").write_text("{}")
    return place


def test_decoders_with_a_tokenizer_have_a_line(tmp_path: Path) -> None:
    place = folder(tmp_path / "small hf", "LlamaForCausalLM")
    words = shlex.split(str(evaluation(place)))
    assert words[:3] == ["lm_eval", "--model", "hf"]
    assert words[words.index("--model_args") + 1] == f"pretrained={place},dtype=auto"


def test_names_that_the_harness_would_cut_are_given_as_json(tmp_path: Path) -> None:
    place = folder(tmp_path / "shrink-bits=3,4", "GPT2LMHeadModel")
    words = shlex.split(str(evaluation(place)))
    given = json.loads(words[words.index("--model_args") + 1])
    assert given == {"pretrained": str(place), "dtype": "auto"}


def test_others_have_none(tmp_path: Path) -> None:
    assert evaluation(folder(tmp_path / "encoder", "BertModel")) is None
    assert evaluation(folder(tmp_path / "silent", "LlamaForCausalLM", tokenizer=False)) is None
    assert evaluation(tmp_path / "nowhere") is None


@pytest.mark.claim
@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm_eval is not installed")
def test_the_line_works(tmp_path: Path) -> None:
    """Offline, on a task of our own; the model must prefer Python to noise."""
    rows = [
        ("import os\nfor name in os.", "listdir(path):", "qqzzx xx"),
        ("if x is not ", "None:", "%% zz %%"),
    ]
    lines = (json.dumps({"prompt": p, "good": good, "bad": bad}) for p, good, bad in rows)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "local.yaml").write_text(LOCAL.replace("ROWS", str(tmp_path / "rows.jsonl")))
    line = evaluation(ROOT / "specs" / "zoo" / "pylm", "local_pick", tmp_path)
    more = ["--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run([*shlex.split(str(line)), *more], check=True, env=environment, cwd=tmp_path)
    [result] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(result.read_text())["results"]["local_pick"]["acc,none"] == 1.0
