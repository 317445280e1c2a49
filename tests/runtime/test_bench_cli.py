"""Kernels on the command line: which run, what `effc bench` and `effc explain` say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from effc.compiler.method import Data
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.passes.quantize.rtn import RTN
from effc.runtime.bench import bytes_per_token
from effc.runtime.choice import choose
from effc.runtime.cli import main
from effc.runtime.data.text import Text
from effc.runtime.decoder import ProgramDecoder, TorchDecoder, ready
from effc.runtime.evaluate import loss
from effc.runtime.kernel_table import kernels_of
from effc.runtime.load import load
from effc.runtime.program_loss import program_loss
from effc.specs.diagnostic import EffcError

PROMPTS = ("def add(a, b):", "import os\n\n", "class Point:\n    def __init__(self")


def eight() -> Model:
    rewriter = Rewriter(load("zoo:pylm").materialize())
    RTN(bits=8, group=64).rewrite(rewriter)
    return rewriter.done()


@pytest.fixture(scope="module")
def model() -> Model:
    return eight()


def test_programs_choose_the_tokens_of_torch_unless_two_are_level(model: Model) -> None:
    """Greedy tokens; where they part, torch's two best logits are closer than rounding of activations."""
    vocabulary: Any = model.tokenizer
    from effc.runtime.data._vocabulary import Vocabulary

    rows = [ids.tolist() for ids in Vocabulary.of(vocabulary.files).encode(list(PROMPTS))]
    made = ready(model, threads=1)
    same = 0
    for row in rows:
        ids = torch.tensor([row])
        program, blocks = ProgramDecoder(made, 1, len(row) + 24), TorchDecoder(model, len(row) + 24)
        with torch.inference_mode():
            mine, due = program.prefill(ids, None), blocks.prefill(ids, None)
            for _ in range(24):
                best = due[0].float().topk(2).values
                rounding = (mine - due).abs().max()
                assert rounding < 0.05 * due.abs().max()
                token = due.argmax(-1)
                if int(mine.argmax()) != int(token):
                    assert float(best[0] - best[1]) <= 2 * float(rounding)
                    break
                same += 1
                mine, due = program.next(token), blocks.next(token)
    assert same >= 24


def test_the_loss_of_a_program_is_that_of_the_model(model: Model, tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 20)
    data: Data = Text(path=str(tmp_path), seq=64).open(model.tokenizer.files if model.tokenizer else {})
    found, due = program_loss(ready(model, threads=1), data, limit=4), loss(model, data, limit=4)
    assert found == pytest.approx(due, rel=5e-3)


def test_a_step_reads_every_packed_byte_once(model: Model) -> None:
    made = ready(model, threads=1)
    packed = sum(t.numel() * t.element_size() for t in model.tensors().values())
    assert packed <= bytes_per_token(made) < 1.05 * packed


def test_dense_weights_get_a_program_too_and_say_why_it_is_not_faster() -> None:
    dense = load("zoo:pylm")
    found = kernels_of(dense)
    where = {row["where"] for row in found["rows"]}
    assert where == {"", f"layers 0-{dense.layers - 1}"}
    assert {row["why"] for row in found["rows"] if row["kernel"].startswith("dense")} == {
        "the weights are not packed"
    }
    rows = kernels_of(eight())["rows"]
    linears = {row["nodes"] for row in rows if row["kernel"].startswith("quant_linear")}
    assert {"attention.q, k, v", "mlp.gate, up"} <= linears


def test_what_cannot_be_lowered_runs_in_torch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from effc.passes.lower.decoder import Unlowered
    from effc.runtime import choice

    def none(*_: object) -> None:
        raise Unlowered("it has a lute")

    monkeypatch.setattr(choice, "ready", none)
    dense = load("zoo:pylm")
    assert choose(dense).why == "it has a lute"
    assert choose(dense, "torch").words == "torch"
    with pytest.raises(EffcError, match="E503"):
        choose(dense, "c")


def test_bench_names_its_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from effc.runtime import bench, cli_result

    monkeypatch.setattr(cli_result, "_data", lambda *_: None)
    monkeypatch.setattr(bench, "read_rate", lambda threads: 1e9)
    words = ["bench", "zoo:pylm", "--prompt-tokens", "4", "--max-new-tokens", "2", "--json"]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kernels"] == "c"
    assert record["read_share"] == pytest.approx(
        record["weight_bytes_per_token"] * record["decode_tokens_per_second"] / 1e9
    )
    assert main([*words, "--kernels", "torch"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["kernels"] == "torch"
    assert "read_rate" not in record
