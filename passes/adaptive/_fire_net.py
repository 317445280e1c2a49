"""Networks of convolutions whose channels fire by image: where masks lie, the edit, and what an image costs.

A mask lies behind a convolution, its batch norm and its activation; behind a residual sum too where an
activation follows it, since what is masked there is zero for all that read it. Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.graph_shapes import graph_shapes
from effc.compiler.model import Model
from effc.compiler.readers import runs_once
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import Role
from effc.compiler.trace import TracedModel
from effc.passes.adaptive._fire_conv import CONVOLUTIONS, FireConv, FireGate, Predictor

NORMS = ("batchnorm1d", "batchnorm2d", "batchnorm3d", "batchnorm")
ADDS = ("add", "iadd")
KEEPERS = (
    "relu", "relu6", "silu", "gelu", "hardswish", "leakyrelu", "elu", "tanh", "mish",
)  # fmt: skip
"""Activations of which a zero comes out as zero."""
ACTIVATIONS = (*KEEPERS, "sigmoid", "hardsigmoid", "softplus", "hardtanh")
POOLS = tuple(
    f"{name}{n}d" for name in ("maxpool", "avgpool", "adaptiveavgpool", "adaptivemaxpool") for n in (1, 2, 3)
)
PASS = (*KEEPERS, *POOLS, "dropout", "dropout1d", "dropout2d", "dropout3d", "identity", "contiguous")
"""What leaves a channel of zeros one of zeros, and others at their places."""

Live = Mapping[str, Tensor]
"""Path of a predictor -> which channels fire, bool [B, K]."""


@dataclass(frozen=True, slots=True)
class Place:
    """A value that gets a mask, and the convolutions that make it, the largest first."""

    convs: tuple[str, ...]
    gate: fx.Node

    @property
    def predictor(self) -> str:
        return f"{self.convs[0]}_fire"


def word(model: Model, node: fx.Node) -> str:
    """What a node does, in one word: of a module its class, of a function or method its name."""
    if node.op == "call_module":
        name = type(model.module(str(node.target))).__name__
    elif node.op == "call_function":
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    else:
        name = str(node.target)
    return name.lower().replace("_", "")


def places(model: Model) -> list[Place]:
    """Where masks lie, in graph order; nowhere in a network that has some. What no convolution or linear
    reads later is the answer, and stays.
    """
    found: dict[fx.Node, list[str]] = {}
    if any(isinstance(module, FireGate) for module in model.gm.modules()):
        return []
    if sum(node.op == "placeholder" for node in model.gm.graph.nodes) != 1:  # batches have images alone
        return []
    for node in model.gm.graph.nodes:
        path = str(node.target)
        if node.op != "call_module" or type(model.module(path)) not in CONVOLUTIONS:
            continue
        last = _behind(model, node)
        if runs_once(model, path) and read_on(model, last):
            found.setdefault(last, []).append(path)

    def size(path: str) -> int:
        return -model.module(path).get_parameter("weight").numel()

    return [Place(tuple(sorted(paths, key=size)), node) for node, paths in found.items()]


def _behind(model: Model, node: fx.Node) -> fx.Node:
    """The value that a mask of a convolution's channels lies behind."""
    while (user := _only(node)) is not None:
        does = word(model, user)
        if does in ACTIVATIONS:
            return user
        sums = does in ADDS and all(isinstance(a, fx.Node) for a in user.args)
        if sums and ((behind := _only(user)) is None or word(model, behind) not in ACTIVATIONS):
            return node
        if not sums and does not in NORMS:
            return node
        node = user
    return node


def _only(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def read_on(model: Model, node: fx.Node) -> bool:
    """Whether some convolution or linear lies behind a value."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user.op == "call_module" and isinstance(
                model.module(str(user.target)), (*CONVOLUTIONS, Linear, nn.Linear)
            ):
                return True
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def wire(rw: Rewriter, place: Place, mass: float, **settings: Any) -> None:
    """Put a predictor before the convolutions of a place and a gate behind them; call it in graph order.

    `settings` are those of a Predictor: pool, rank, softmax, detached. A convolution that runs before the
    predictor can tell anything is computed whole.
    """
    first: Any = rw.module(place.convs[0])
    role = rw.role(place.convs[0])
    predictor = Predictor(
        first.in_channels,
        first.out_channels,
        len(first.kernel_size),
        dtype=str(first.weight.dtype).removeprefix("torch."),
        **settings,
    )
    node = rw.node(place.convs[0])
    name = f"{place.convs[0]}_gate"
    rw.model.gm.add_submodule(place.predictor, predictor.eval())
    rw.model.gm.add_submodule(name, FireGate(mass).eval())
    for leaf, _ in predictor.named_children():
        rw.model.roles[f"{place.predictor}.{leaf}"] = Role("predictor", role.layer)
    with rw.surgery(place.predictor, f"channels that make {100 * mass:g}% of an image") as graph:
        with graph.inserting_after(node.all_input_nodes[0]):
            z = graph.call_module(place.predictor, (node.args[0],))
        with graph.inserting_after(place.gate):
            masked = graph.call_module(name, (place.gate, z))
        place.gate.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)
    told = list(rw.model.gm.graph.nodes).index(z)
    for path in place.convs:
        node = rw.node(path)
        if FireConv.takes(rw.module(path)) and list(rw.model.gm.graph.nodes).index(node) > told:
            own = rw.role(path)
            rw.swap(path, FireConv(rw.module(path)), "of channels that fire")
            rw.model.roles[path] = own
            node.args = (node.args[0], z, _source(rw.model, node.args[0]))
    rw.model.gm.recompile()


def _source(model: Model, node: Any) -> Any:
    """What tells which channels of a value are zero: z of the gate that it comes from; None where none."""
    while isinstance(node, fx.Node) and node.op != "placeholder":
        if node.op == "call_module" and isinstance(model.module(str(node.target)), FireGate):
            return node.args[1]
        if word(model, node) not in PASS:
            return None
        node = node.args[0]
    return None


def layer_flops(model: TracedModel) -> dict[str, int]:
    """Path of each convolution, linear and predictor -> multiplications and additions of a whole image."""
    shapes, found = graph_shapes(model), dict[str, int]()
    for node in model.gm.graph.nodes:
        if node.op != "call_module" or node.name not in shapes:
            continue
        path, shape = str(node.target), shapes[node.name]
        module: Any = model.module(path)
        module = module.conv if isinstance(module, FireConv) else module
        if type(module) in CONVOLUTIONS:
            flops = 2 * module.weight.numel() * prod(shape[2:])
        elif isinstance(module, Linear | nn.Linear):
            flops = 2 * module.get_parameter("weight").numel() * prod(shape[1:-1])
        elif isinstance(module, Predictor):
            flops = module.flops()
        else:
            continue
        found[path] = found.get(path, 0) + flops
    return found


def image_flops(model: TracedModel, live: Live) -> Tensor:
    """Multiplications and additions of every image, float64 [B], where these channels fire."""
    whole = layer_flops(model)
    total = torch.full((len(next(iter(live.values()))),), float(sum(whole.values())), dtype=torch.float64)
    for node in model.gm.graph.nodes:
        block = model.module(str(node.target)) if node.op == "call_module" else None
        if not isinstance(block, FireConv):
            continue
        share = live[str(node.args[1].target)].double().mean(1)
        if block.reads_all and node.args[2] is not None:
            share = share * live[str(node.args[2].target)].double().mean(1)
        total -= whole[str(node.target)] * (1 - share)
    return total


def as_weights(model: Model, images: Tensor) -> Tensor:
    """Images in the dtype that the network computes in."""
    return images.to(next(p.dtype for p in model.gm.parameters() if p.is_floating_point()))


@contextmanager
def watching(model: Model, due: bool) -> Iterator[dict[str, Tensor]]:
    """Which channels fire in a run, by predictor; `due`: which should, in a model without masks."""
    found: dict[str, Tensor] = {}
    handles = []

    def gated(path: str) -> Any:
        def leave(gate: Any, args: tuple[Tensor, Tensor], _: Tensor) -> Tensor | None:
            found[path] = gate.due(args[0]) if due else args[1] > 0
            return args[0] if due else None

        return leave

    for node in model.gm.graph.nodes:
        block = model.module(str(node.target)) if node.op == "call_module" else None
        if isinstance(block, FireGate):
            handles.append(block.register_forward_hook(gated(str(node.args[1].target))))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
