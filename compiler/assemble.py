"""Assemble: from named blocks to the block graph of a model, built node by node and never traced.

    embedding -> (norm1 -> attention -> add -> norm2 -> mlp -> add) x L -> norm -> head

A layer is a mapping from canonical names to blocks: norm1, attention, norm2, mlp or moe, and for sandwich
layers norm1_post and norm2_post.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import fx, nn

from effc.compiler.blocks import Unit

Order = Literal["pre", "post", "parallel"]
"""pre: x + f(n(x)); post: n(x + f(x)); parallel: x + attention(n1(x)) + mlp(n2(x))."""


class Draft:
    """A graph in the making: blocks are called by path, nodes keep the stage that made them."""

    def __init__(self, origin: str) -> None:
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}
        self.origin = origin
        self.ids = self.graph.placeholder("ids")
        self.step = self.graph.placeholder("step")

    def call(self, path: str, module: nn.Module, x: fx.Node) -> fx.Node:
        self.modules[path] = module
        takes_step = isinstance(module, Unit) and module.takes_step
        return self._mark(self.graph.call_module(path, (x, self.step) if takes_step else (x,)))

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self._mark(self.graph.call_function(operator.add, (a, b)))

    def done(self, out: fx.Node) -> fx.GraphModule:
        self.graph.output(out)
        return module_of(self.modules, self.graph)

    def _mark(self, node: fx.Node) -> fx.Node:
        node.meta["origin"] = self.origin
        return node


def module_of(modules: Mapping[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule that holds exactly `modules` (and tensors that nodes read) at their paths."""
    gm = fx.GraphModule(dict(modules), graph, class_name="Blocks")
    return gm.eval()


def assemble(
    embedding: nn.Module,
    layers: Sequence[Mapping[str, nn.Module]],
    norm: nn.Module | None,
    head: nn.Module | None = None,
    tail: Iterable[tuple[str, nn.Module]] = (),
    order: Order = "pre",
    origin: str = "load",
) -> fx.GraphModule:
    """The block graph of a decoder (with a head) or an encoder (without).

    `tail` are blocks after the head, such as ("softcap", Softcap(cap = 30)).
    """
    draft = Draft(origin)
    x = draft.call("embedding", embedding, draft.ids)
    for index, layer in enumerate(layers):
        x = _layer(draft, f"layers.{index}", layer, x, order)
    for path, module in [("norm", norm), ("head", head), *tail]:
        if module is not None:
            x = draft.call(path, module, x)
    return draft.done(x)


def _layer(draft: Draft, path: str, layer: Mapping[str, nn.Module], x: fx.Node, order: Order) -> fx.Node:
    def call(name: str, x: fx.Node) -> fx.Node:
        return draft.call(f"{path}.{name}", layer[name], x) if name in layer else x

    mixer = "moe" if "moe" in layer else "mlp"
    if order == "parallel":
        mixed = draft.add(x, call("attention", call("norm1", x)))
        return draft.add(mixed, call(mixer, call("norm2", x)))
    if order == "post":
        x = call("norm1", draft.add(x, call("attention", x)))
        return call("norm2", draft.add(x, call(mixer, x)))
    x = draft.add(x, call("norm1_post", call("attention", call("norm1", x))))
    return draft.add(x, call("norm2_post", call(mixer, call("norm2", x))))
