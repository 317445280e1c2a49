"""Merges by C kernels have the bits of numpy's, on every instruction set, and refuse what numpy refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from effc.compiler.architecture import architecture
from effc.compiler.checkpoint_write import SafetensorsWriter
from effc.compiler.importer import build, import_folder
from effc.compiler.method import Context
from effc.compiler.places import places
from effc.compiler.shapes import Merge
from effc.kernels.cpu.build import compiler
from effc.kernels.cpu.isa import Isa, available
from effc.passes.merge.dare_ties import DareTies
from effc.passes.merge.linear import Linear
from effc.passes.merge.slerp import Slerp
from effc.passes.merge.task_arithmetic import TaskArithmetic
from effc.passes.merge.ties import Ties
from effc.runtime import stretches
from effc.runtime.merge import merge
from effc.specs.diagnostic import EffcError
from effc.specs.recipe import Ref

BASE = Ref("base")
METHODS: dict[str, Merge] = {
    "linear": Linear(weight=(3, 1, 2)),
    "slerp": Slerp(t=0.3),
    "task": TaskArithmetic(base=BASE, weight=(1, -2), lambda_=0.7),
    "ties": Ties(base=BASE, density=0.3, weight=(1, 3), lambda_=1.3),
    "ties by votes, a tensor": Ties(base=BASE, density=0.2, sign="count", scope="tensor"),
    "dare": DareTies(base=BASE, density=0.4, weight=(2, 1)),
    "dare by votes": DareTies(base=BASE, density=0.7, sign="count", rescale="none", lambda_=0.5, seed=9),
    "dare of all": DareTies(base=BASE, density=1.0),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "tie_word_embeddings": False,
}
SETS = [isa for isa in available() if isa is not Isa.AMX]
pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="there is no C compiler"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, about numbers that overflow
]


def hostile(shape: tuple[int, ...], dice: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random numbers among few values that tie, zeros of both signs, the smallest and very large ones."""
    limits = torch.finfo(dtype)
    few = torch.tensor([0.0, -0.0, 0.5, -0.5, 0.25, limits.tiny, -limits.tiny, limits.smallest_normal / 4])
    large = torch.tensor([limits.max, -limits.max, limits.max / 2, -limits.max / 3])
    noise = torch.randn(shape, generator=dice)
    kind = torch.rand(shape, generator=dice)
    picked = few[torch.randint(len(few), shape, generator=dice)]
    wild = large[torch.randint(len(large), shape, generator=dice)]
    return torch.where(kind < 0.5, noise, torch.where(kind < 0.97, picked, wild)).to(dtype)


def checkpoint(folder: Path, seed: int, dtype: torch.dtype, broken: str = "") -> Path:
    family = architecture("llama")
    model = build(family, CONFIG, dtype)
    shapes = {p.name: tuple(model.tensors()[n].shape) for n, p in places(family, model).items()}
    dice = torch.Generator().manual_seed(seed)
    folder.mkdir()
    with SafetensorsWriter(folder / "model.safetensors", {n: (s, dtype) for n, s in shapes.items()}) as file:
        for name, shape in shapes.items():
            numbers = hostile(shape, dice, dtype)
            if broken:
                numbers.view(-1)[-1] = float(broken)
            file.put(name, numbers)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("family")
    return [checkpoint(place / str(seed), seed, request.param) for seed in range(3)]


def run(
    method: Merge, folders: list[Path], isa: Isa | None, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    monkeypatch.setattr("effc.runtime.merge.instructions", lambda: isa)
    base, *models = (import_folder(folder) for folder in folders)
    if isinstance(method, Linear):
        models = [base, *models]
    named = {"base": base} if "base" in type(method).model_fields else {}
    return dict(merge(method, models, Context(models=named)).model.materialize().tensors())


@pytest.mark.parametrize("name", METHODS)
def test_kernels_have_the_bits_of_numpy(
    name: str, family: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effc.runtime.pieces.PIECE", 333)
    want = run(METHODS[name], family, None, monkeypatch)
    for isa in SETS:
        got = run(METHODS[name], family, isa, monkeypatch)
        for tensor, due in want.items():
            found = got[tensor]
            none = due.isnan()
            assert torch.equal(found.isnan(), none), (isa, tensor)
            width = {2: torch.int16, 4: torch.int32}[due.element_size()]
            assert torch.equal(found.view(width)[~none], due.view(width)[~none]), (isa, tensor)


def test_kernels_are_what_runs(family: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = stretches.Stretches._call

    def call(self: stretches.Stretches, *given: object) -> None:
        seen.append(self.name)
        real(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(stretches.Stretches, "_call", call)
    assert stretches.instructions() is not None
    run(METHODS["ties"], family, stretches.instructions(), monkeypatch)
    assert len({*seen}) == len(import_folder(family[0]).tensors())


@pytest.mark.parametrize("broken", ["nan", "inf"])
@pytest.mark.parametrize("name", ["linear", "slerp", "ties", "dare"])
def test_damaged_numbers_are_found_where_they_are(
    name: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = [checkpoint(tmp_path / f"fine{seed}", seed, torch.bfloat16) for seed in range(2)]
    bad = checkpoint(tmp_path / "bad", 3, torch.bfloat16, broken)
    for folders in ([*fine, bad], [bad, *fine]):
        said = []
        for isa in (None, SETS[0]):
            try:
                run(METHODS[name], folders, isa, monkeypatch)
                said.append("")
            except EffcError as problem:
                (told,) = problem.diagnostics
                said.append(f"{told.code} {told.title} {told.notes}")
        assert said[0] == said[1]
        assert said[0].startswith("E456") or (name == "slerp" and folders[0] is bad)


def test_without_a_compiler_numpy_merges(family: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("no kernel can be built")

    monkeypatch.setattr(stretches, "compiler", lambda: None)
    monkeypatch.setattr(stretches, "compiled", refused)
    stretches.instructions.cache_clear()
    try:
        assert stretches.instructions() is None
        run(METHODS["linear"], family, stretches.instructions(), monkeypatch)
    finally:
        stretches.instructions.cache_clear()
