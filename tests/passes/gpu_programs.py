"""Programs of a GPU in Triton's interpreter, in a process of its own: `python -m tests.passes.gpu_programs`.

Prints what each model's program is off by, prompts of different lengths first, then tokens one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effc.compiler.assemble import assemble
from effc.compiler.blocks import MLP, Attention, Embedding, Linear, Norm
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.sharing import tie
from effc.kernels.gpu.interpret import trusted
from effc.passes.lower.gpu import Unlowered, launches
from effc.passes.quantize.rtn import RTN
from effc.runtime.decoder import TorchDecoder
from effc.runtime.launched import LaunchedDecoder
from tests.compiler.conftest import FAMILIES, ROPE, fill

D, V, LENGTH, STEPS = 128, 61, 7, 3
CPU = torch.device("cpu")


def decoder_of(
    attention: dict[str, Any], norm: Callable[[], Norm], mlp: dict[str, Any], embedding: dict[str, Any]
) -> Model:
    """Two layers of width 128 with heads of 64, tied to the table."""

    def layer(_: int) -> dict[str, nn.Module]:
        mixer = Attention(**{"width": D, "heads": 2, "kv_heads": 1, "head_dim": 64, "rope": ROPE} | attention)
        return {"norm1": norm(), "attention": mixer, "norm2": norm(), "mlp": MLP(width=D, hidden=192, **mlp)}

    head = Linear(in_features=D, out_features=V)
    gm = assemble(Embedding(vocab=V, width=D, **embedding), [layer(i) for i in range(2)], norm(), head)
    tie(gm, "head.weight", "embedding.weight")
    model = fill(Model(gm))
    with torch.no_grad():
        for name, tensor in model.tensors().items():  # of variance 1 / width, and attention is listened to
            if tensor.dim() == 2:
                tensor.mul_(2.0 if name.endswith("attention.o.weight") else 0.3)
    return model


def rms() -> Norm:
    return Norm(width=D)


def layer_norm() -> Norm:
    return Norm(width=D, form="layer", eps=1e-5, bias=True)


def packed(model: Model, **grid: Any) -> Model:
    method = RTN.model_validate({"rules": [{"on": "head", "bits": 8}], "scale": "bf16"} | grid)
    rw = Rewriter(model, method.kind)
    method.rewrite(rw)
    return rw.done()


def off(model: Model) -> list[float]:
    """Relative error of the logits, step by step, against the model in float32."""
    ids = torch.randint(0, V, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, :4], mask[2, :1] = False, False
    due, ours = TorchDecoder(model, LENGTH + STEPS), LaunchedDecoder(launches(model, CPU), 3, LENGTH + STEPS)
    pairs = [(ours.prefill(ids, mask), due.prefill(ids, mask))]
    for i in range(STEPS):
        token = (ids[:, i] + 7) % V
        pairs.append((ours.next(token), due.next(token)))
        assert bool((ours.likeliest() == pairs[-1][0].argmax(-1)).all())
    return [float((found - expected).norm() / expected.norm()) for found, expected in pairs]


def misplaced(model: Model) -> float:
    """The error of the second token when the program takes it for one place further on."""
    ids = torch.randint(0, V, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    due, ours = TorchDecoder(model, LENGTH + STEPS), LaunchedDecoder(launches(model, CPU), 1, LENGTH + STEPS)
    due.prefill(ids, None)
    ours.prefill(ids, None)
    ours.session._room.row += 1
    found, expected = (decoder.next(ids[:, 0]) for decoder in (ours, due))
    return float((found - expected).norm() / expected.norm())


def refusal(model: Model) -> str:
    try:
        launches(model, CPU)
    except Unlowered as reason:
        return str(reason)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    llama = decoder_of({}, rms, {}, {})
    normed = decoder_of({"qk_norm": 1e-6, "kv_heads": 2, "bias": True}, rms, {}, {"scale": 3.0})
    gpt = decoder_of(
        {"rope": None, "kv_heads": 2, "bias": True, "bias_o": True}, layer_norm,
        {"activation": "gelu_tanh", "gated": False, "bias": True}, {"positions": 20},
    )  # fmt: skip
    found: dict[str, Any] = {}
    with trusted(), torch.inference_mode():
        found["dense"] = off(llama)
        found["4 bits"] = off(packed(llama, bits=4, group=64))
        found["4 bits, zero codes, normed heads"] = off(packed(normed, bits=4, group=64, scheme="asymmetric"))
        found["8 bits, positions"] = off(packed(gpt, bits=8))
        found["one place off"] = misplaced(llama)
    found["refusals"] = [
        refusal(decoder_of({"window": 4}, rms, {}, {})),
        refusal(decoder_of({"cap": 5.0}, rms, {}, {})),
        refusal(fill(FAMILIES["llama"]())),
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
