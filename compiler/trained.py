"""Which parameters a training moves, what keeps them from moving, and what the training costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from effc.compiler.blocks.planes_linear import PlanesLinear
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.cost import count
from effc.compiler.method import Work
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.selector import Name, Selector, SelectorError

if TYPE_CHECKING:
    from effc.compiler.model import Model
    from effc.compiler.shapes import Train

_OUTSIDE = ("embedding", "head")
MOVED = 30
"""Bytes that a step moves for each parameter: gradients, AdamW, the working copy; measured."""
JUDGED = 88
"""Bytes that cross-entropy and its gradient move for each logit; measured."""


def chosen(model: Model, train: str | tuple[str, ...]) -> list[str]:
    """Paths of the modules that train: `all`, `body` (all but embedding and head), or selectors.

    Raises: E226 when a selector does not parse, E231 when it matches nothing.
    """
    names = model.names()
    if train == "all":
        return [name.path for name in names]
    if train == "body":
        return [name.path for name in names if name.role.split(".")[0] not in _OUTSIDE]
    found: dict[str, None] = {}
    for text in (train,) if isinstance(train, str) else train:
        matched = _matched(text, names)
        if not matched:
            raise EffcError(
                Diagnostic(
                    "E231",
                    f"`{text}` matches no module of the model",
                    notes=(f"the model has {', '.join(sorted({name.role for name in names}))}",),
                )
            )
        found |= dict.fromkeys(matched)
    return list(found)


def parameters(model: Model, train: str | tuple[str, ...] = "all") -> list[str]:
    """Names of the parameters below the chosen modules; a tied one once, under its first name."""
    inside = set(chosen(model, train))
    ties = model.ties()
    names = dict(model.named_parameters(remove_duplicate=False))
    found = [ties.get(name, name) for name in names if _holder(name, inside)]
    return list(dict.fromkeys(found))


def untrainable(kind: str, model: Model, train: str | tuple[str, ...] = "all") -> list[Diagnostic]:
    """Chosen modules that hold packed integers, through which no gradient can move a weight; or no choice."""
    inside = set(chosen(model, train))
    if not inside:
        help_ = "choose some in `train`, or leave it out: all weights train then"
        return [Diagnostic("E650", f"`{kind}` would train nothing", help=help_, about="train")]
    kinds = Packed | PlanesLinear
    packed = [
        path for path, unit in model.units() if isinstance(unit, kinds) and _holder(f"{path}.packed", inside)
    ]
    if not packed:
        return []
    return [
        Diagnostic(
            "E323",
            f"`{kind}` cannot train packed weights",
            notes=(f"quantized: {packed[0]}" + (f" and {len(packed) - 1} more" if len(packed) > 1 else ""),),
            help="train before quantizing, or train an adapter on top with adapt.lora",
        )
    ]


def training_work(
    method: Train, model: Model, seq: int, teachers: int = 0, teacher: Model | None = None
) -> Work:
    """Three forward passes' work for each token, one more for each teacher; weights four times in float32.

    Memory: master, gradient and optimizer state in float32, the working copy, the logits with their gradient,
    and the activations: the backward pass keeps 12 numbers a channel of the stream and 4 of the mlp in every
    layer, and 17 and 6 were measured with what is in flight (zoo:pylm, 2048 and 4096 tokens a step).
    """
    tokens = method.steps * method.batch * seq
    own = count(model, seq // 2)
    flops = 3.0 * own.flops_per_token * tokens
    held = own.params * (4 + 4 + 2 + 2)
    if method.optimizer is not None:
        held += sum(method.optimizer.state_bytes(t.shape) for t in model.tensors().values())
    if teacher is not None:
        other = count(teacher, seq // 2)
        flops += float(other.flops_per_token * tokens)
        held += other.bytes
    rows = -(-method.batch // method.accumulate) * seq
    width = int(model.config.get("hidden_size", 0))
    inner = int(model.config.get("intermediate_size", 4 * width))
    active = rows * model.layers * (17 * width + 6 * inner) * 2
    logits = rows * int(model.config.get("vocab_size", 0)) * 2 * (2 + teachers)
    vocabulary = int(model.config.get("vocab_size", 0))
    traffic = float(method.steps * own.params * MOVED + tokens * vocabulary * JUDGED)
    return Work(flops=flops, memory=held + active + logits, traffic=traffic)


def _matched(text: str, names: Sequence[Name]) -> list[str]:
    try:
        return Selector.parse(text).match(names)
    except SelectorError as problem:
        raise EffcError(Diagnostic("E226", f"`{text}` is no selector", notes=(str(problem),))) from problem


def _holder(name: str, inside: set[str]) -> bool:
    """Does one of the modules hold the tensor, itself or below?"""
    path = name.rpartition(".")[0]
    while path:
        if path in inside:
            return True
        path = path.rpartition(".")[0]
    return False
