"""What layers share is written once: sizes of files, storages behind a load, what an optimizer holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from effc.compiler.cost import count
from effc.compiler.method import Context
from effc.compiler.model import Model
from effc.compiler.shapes import Rewrite
from effc.compiler.trained import parameters
from effc.passes.moe.widenet import WideNet
from effc.passes.tie.foldgpt import FoldGPT
from effc.passes.tie.mor import MoR
from effc.passes.tie.recursive import Recursive
from effc.runtime import artifact
from effc.runtime.fit import fit
from effc.runtime.rewriting import rewrite
from effc.specs.recipe import Ref

from .tiny_models import LAYERS, Sequences, outputs

SHARED = {
    "widenet": WideNet(experts=3),
    "recursive": Recursive(loops=2, lora_rank=2),
    "mor": MoR(recursions=2, share="cycle"),
    "foldgpt": FoldGPT(data=Ref("text"), remove=0.17, group=2, steps=1, batch=2, precision="fp32"),
}


def shared(name: str, model: Model) -> Model:
    method = SHARED[name]
    if isinstance(method, Rewrite):
        return rewrite(method, model, Context(1)).model
    return fit(method, model, Context(1, {"data": Sequences(model)})).model


def written(model: Model, folder: Path) -> int:
    """Bytes of the weights on disk."""
    artifact.write(model, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", SHARED)
def test_a_file_holds_each_tensor_once(name: str, tiny: Model, tmp_path: Path) -> None:
    model = shared(name, tiny)
    ties = {alias: owner for alias, owner in model.ties().items() if alias.startswith("layers")}
    assert len(ties) >= LAYERS
    size = written(model, tmp_path / "shared.effc")
    apart = sum(t.numel() * t.element_size() for n, t in model.named_parameters(remove_duplicate=False))
    assert count(model).bytes <= size < count(model).bytes + 32_768, "the numbers, and a header beside them"
    assert apart - count(model).bytes > 0.1 * apart
    back = artifact.read(tmp_path / "shared.effc").materialize()
    assert back.ties() == model.ties()
    for alias, owner in ties.items():
        one, other = (back.module(path.rpartition(".")[0]) for path in (alias, owner))
        slots = [path.rpartition(".")[2] for path in (alias, owner)]
        assert getattr(one, slots[0]) is getattr(other, slots[1])
    ids = Sequences(tiny).ids
    assert outputs(back, ids).equal(outputs(model, ids))


@pytest.mark.parametrize("name", SHARED)
def test_an_optimizer_is_given_each_tensor_once(name: str, tiny: Model) -> None:
    model = shared(name, tiny)
    names = parameters(model)
    tensors = [dict(model.named_parameters(remove_duplicate=False))[n] for n in names]
    assert len({id(t) for t in tensors}) == len(tensors) == len({id(p) for p in model.parameters()})
