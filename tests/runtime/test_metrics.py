"""Metrics of a model: counted ones from structure, measured ones from data, speed from a clock."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from effc.compiler.model import Model, TokenizerFiles
from effc.compiler.rewrite import Rewriter
from effc.passes.quantize.rtn import RTN
from effc.runtime.bench import bench, bench_text
from effc.runtime.data.text import Text
from effc.runtime.evaluate import loss
from effc.runtime.metrics import COUNTED, MEASURED, measure
from effc.runtime.prompting import complete
from effc.specs.diagnostic import EffcError

from .doubles import TEXT, tiny, tokenizer_files


@pytest.fixture
def model() -> Model:
    return tiny()


@pytest.fixture
def data(tmp_path: Path, model: Model) -> object:
    for i in range(8):
        (tmp_path / f"{i}.py").write_text(TEXT + f"x = {i}\n")
    assert model.tokenizer is not None
    return Text(path=str(tmp_path / "*.py"), seq=32, heldout=0.4).open(model.tokenizer.files)


def test_bytes_count_what_is_stored_and_a_tied_table_once(model: Model) -> None:
    stored = sum(t.numel() * t.element_size() for t in model.tensors().values())
    assert measure(model, "bytes") == stored
    assert measure(model, "params") == stored / 4


def test_packing_changes_bytes_and_not_parameters(model: Model) -> None:
    rewriter = Rewriter(model)
    RTN(bits=4, group=16).rewrite(rewriter)
    small = rewriter.done()
    assert measure(small, "params") == measure(model, "params")
    assert measure(small, "bytes") == sum(t.numel() * t.element_size() for t in small.tensors().values())
    assert measure(small, "bytes") < 0.7 * measure(model, "bytes")


def test_the_cache_grows_with_the_sequence(model: Model) -> None:
    assert measure(model, "kv_bytes", arguments=(100,)) == 100 * measure(model, "kv_bytes", arguments=(1,))
    assert (
        measure(model, "kv_bytes", arguments=(1,)) == 2 * 2 * 2 * 8 * 4
    )  # layers, k and v, heads, width, bytes


def test_loss_and_bits_a_byte_agree(model: Model, data: object) -> None:
    nats = measure(model, "loss", data)
    assert nats == loss(model, data)  # type: ignore[arg-type]
    assert measure(model, "bpb", data) == pytest.approx(
        nats / math.log(2) / data.bytes_per_token  # type: ignore[attr-defined]
    )


def test_data_of_another_tokenizer_is_refused(model: Model, data: object) -> None:
    files = tokenizer_files()
    model.tokenizer = TokenizerFiles({**files, "tokenizer.json": files["tokenizer.json"] + b" "})
    with pytest.raises(EffcError) as caught:
        measure(model, "loss", data)
    assert caught.value.diagnostics[0].code == "E640"


def test_every_metric_of_the_language_is_measured() -> None:
    assert set(COUNTED) | set(MEASURED) == {
        "bytes", "params", "flops", "kv_bytes", "loss", "bpb", "acc", "spent", "latency"
    }  # fmt: skip


def test_what_is_spent_is_what_a_plan_says_where_nothing_depends_on_data(model: Model, data: object) -> None:
    assert measure(model, "spent", data) == measure(model, "flops")


def test_bench_reports_speed_size_and_loss(model: Model, data: object) -> None:
    record = bench(model, prompt_tokens=8, new_tokens=4, batch=2, data=data)
    assert record["bytes"] == measure(model, "bytes")
    assert record["loss"] == measure(model, "loss", data)
    assert record["decode_tokens_per_second"] > 0
    assert record["peak_bytes"] > record["bytes"]
    assert "tokens/s" in bench_text(record)
    assert measure(model, "latency") > 0


def test_prompts_of_unequal_length_are_continued_as_if_alone(model: Model) -> None:
    prompts = ["def add(first", "x", "return first + second\n"]
    together = complete(model, prompts, max_new_tokens=6)
    assert together == [complete(model, [p], max_new_tokens=6)[0] for p in prompts]
    assert len(together) == 3


def test_a_sample_depends_on_its_seed_alone(model: Model) -> None:
    drawn = [complete(model, ["def "], 8, temperature=1.0, seed=s)[0] for s in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    torch.manual_seed(99)
    assert complete(model, ["def "], 8, temperature=1.0, seed=1)[0] == drawn[0]
