"""Programs of a GPU in Triton's interpreter, in a process of its own: `python -m tests.passes.gpu_programs`.

Prints what each model's program is off by, prompts of different lengths first, then tokens one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from effc.compiler.model import Model
from effc.kernels.gpu.caches import Caches
from effc.kernels.gpu.interpret import trusted
from effc.kernels.gpu.launches import Choice, LaunchPlan, Room
from effc.passes.lower.gpu import Rows, Unlowered, launches
from effc.runtime.decoder import TorchDecoder
from effc.runtime.launched import LaunchedDecoder
from effc.specs.diagnostic import EffcError

from . import gpu_models as models
from .gpu_models import V, attention, decoder_of, layer, mlp, packed

LENGTH, STEPS = 7, 3
CPU = torch.device("cpu")


def off(model: Model, rows: Rows = "bfloat16") -> list[float]:
    """Relative error of the logits, step by step, against the model in float32."""
    ids = torch.randint(0, V, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[1, :4], mask[2, :1] = False, False
    due = TorchDecoder(model, LENGTH + STEPS)
    ours = LaunchedDecoder(launches(model, CPU, rows), 3, LENGTH + STEPS)
    pairs = [(ours.prefill(ids, mask), due.prefill(ids, mask))]
    for i in range(STEPS):
        token = (ids[:, i] + 7) % V
        pairs.append((ours.next(token), due.next(token)))
        assert bool((ours.likeliest() == pairs[-1][0].argmax(-1)).all())
    return [float((found - expected).norm() / expected.norm()) for found, expected in pairs]


def astray(
    model: Model, lead: Callable[[LaunchedDecoder], None], changed: Callable[[LaunchPlan], LaunchPlan]
) -> float:
    """The error of the second token of two sequences when what the program keeps is led astray."""
    ids = torch.randint(0, V, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    due = TorchDecoder(model, LENGTH + STEPS)
    ours = LaunchedDecoder(changed(launches(model, CPU)), 2, LENGTH + STEPS)
    due.prefill(ids, None)
    ours.prefill(ids, None)
    lead(ours)
    found, expected = (decoder.next(ids[:, 0]) for decoder in (ours, due))
    return float((found - expected).norm() / expected.norm())


def one_place_on(ours: LaunchedDecoder) -> None:
    """New keys stand one row further on than they should."""
    caches = ours.session._caches
    for edges in (caches.begins, caches.afters):
        for span in edges:
            edges[span] = edges[span] + 1
    caches.pairs = [(torch.cat((k, k[:1])), torch.cat((v, v[:1]))) for k, v in caches.pairs]


def other_states(ours: LaunchedDecoder) -> None:
    """Each sequence has the states of the other."""
    for state in ours.session._caches.states:
        state.copy_(state.roll(1, 0))


def other_experts(plan: LaunchPlan) -> LaunchPlan:
    """Each row has the experts of the numbers before."""

    def rolled(run: Callable[[Room, Caches], None]) -> Callable[[Room, Caches], None]:
        def go(room: Room, caches: Caches) -> None:
            run(room, caches)
            for value, choice in room.choices.items():
                room.choices[value] = Choice(choice.weights, (choice.chosen - 1) % 4)

        return go

    made = [replace(one, run=rolled(one.run)) if one.op == "route" else one for one in plan.launches]
    return replace(plan, launches=tuple(made))


def refusal(model: Model) -> str:
    try:
        launches(model, CPU)
    except Unlowered as reason:
        return str(reason)
    return ""


def refusals() -> list[str]:
    many = attention(heads=34, kv_heads=2, head_dim=16)
    slots = models.LigerAttention(width=models.D, heads=2, kv_heads=1, head_dim=64, window=3, form="gsa")
    return [
        refusal(decoder_of([layer(attention(head_dim=40), mlp())])),
        refusal(decoder_of([layer(many, mlp())])),
        refusal(models.experts(gated=False)),
        refusal(models.experts(hidden=96)),
        refusal(decoder_of([layer(slots, mlp())])),
    ]


def too_long() -> str:
    """A batch whose keys lie beyond 31 bits; nothing is allocated for it."""
    plan = launches(models.llama(1), torch.device("meta"))
    try:
        Caches(plan, 2**10, 2**16)
    except EffcError as error:
        return error.diagnostics[0].title
    return ""


def ops_of(model: Model, rows: Rows = "bfloat16") -> list[list[str]]:
    """Launches that need no weights: name and why."""
    return [[one.op, one.why] for one in launches(model, torch.device("meta"), rows).launches]


def main() -> None:
    torch.set_num_threads(1)
    nothing: Any = lambda _: None  # noqa: E731
    same: Any = lambda plan: plan  # noqa: E731
    found: dict[str, Any] = {}
    with trusted(), torch.inference_mode():
        w4 = packed(models.llama(), bits=4, group=64)
        zeros = packed(models.llama(1), bits=4, group=64, scheme="asymmetric")
        plain = models.llama(1)
        found["off"] = {
            "dense": off(models.llama()),
            "4 bits": off(w4),
            "4 bits, zero codes, normed heads": off(
                packed(models.normed(), bits=4, group=64, scheme="asymmetric")
            ),
            "8 bits, positions": off(packed(models.gpt(), bits=8)),
            "windows and caps": off(models.gemma()),
            "a window, 4 bits": off(packed(models.mistral(), bits=4, group=64)),
            "experts": off(models.experts()),
            "packed experts": off(packed(models.experts(128, renormalize=False), bits=4, group=64)),
            "tempered and carved experts": off(models.carved()),
            "recurrences": off(models.hybrid()),
            "adapters within packed weights": off(models.adapted()),
            "two of four, chosen changes, planes": off(models.several()),
        }
        found["bytes"] = {"int8": off(zeros, "int8"), "float8": off(plain, "float8")}
        found["astray"] = {
            "keys": astray(plain, one_place_on, same),
            "keys of a window": astray(models.mistral(), one_place_on, same),
            "states": astray(models.hybrid(), other_states, same),
            "experts": astray(models.experts(), nothing, other_experts),
        }
    found["refusals"] = [*refusals(), too_long()]
    found["ops"] = {
        "bytes": ops_of(zeros, "int8"),
        "several": ops_of(models.several()),
        "adapted": ops_of(models.adapted()),
        "experts": ops_of(models.experts()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
