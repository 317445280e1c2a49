"""Layers as parts of a graph: take a decoder apart at its layers and put it together in another order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import fx, nn

from effc.compiler.assemble import module_of
from effc.compiler.roles import layer_of
from effc.specs.diagnostic import Diagnostic, EffcError


@dataclass(slots=True)
class Segment:
    """The nodes of one layer: one stream comes in, one goes out."""

    nodes: list[fx.Node] = field(default_factory=list)
    entry: fx.Node | None = None
    exit: fx.Node | None = None


def segments(graph: fx.Graph) -> tuple[list[fx.Node], list[Segment], list[fx.Node]]:
    """Nodes before the layers, the layers, nodes behind them.

    A node belongs to the highest layer it reads from or calls into, so a residual addition belongs to the
    layer whose block it adds.

    Raises:
        EffcError: E402 when there are no layers, or one reads or feeds more than one stream.
    """
    place: dict[fx.Node, int] = {}
    found: dict[int, Segment] = {}
    before: list[fx.Node] = []
    after: list[fx.Node] = []
    for node in graph.nodes:
        layer = layer_of(str(node.target)) if node.op == "call_module" else None
        if layer is None and node.op in ("call_function", "call_method"):
            layer = max((place[a] for a in node.all_input_nodes if a in place), default=None)
        if layer is not None:
            place[node] = layer
            found.setdefault(layer, Segment()).nodes.append(node)
        else:
            (after if found else before).append(node)
    if not found or sorted(found) != list(range(len(found))):
        raise EffcError(Diagnostic("E402", "the model has no layers that could be rearranged"))
    layers = [found[i] for i in range(len(found))]
    for index, segment in enumerate(layers):
        _streams(index, segment)
    return before, layers, after


def _streams(index: int, segment: Segment) -> None:
    inside = set(segment.nodes)
    entries = {a for n in segment.nodes for a in n.all_input_nodes if a not in inside and a.name != "step"}
    exits = {n for n in segment.nodes if any(user not in inside for user in n.users)}
    if len(entries) != 1 or len(exits) != 1:
        note = f"{len(entries)} streams come in, {len(exits)} go out"
        raise EffcError(Diagnostic("E402", f"layer {index} cannot be moved", notes=(note,)))
    segment.entry, segment.exit = entries.pop(), exits.pop()


def arranged(
    gm: fx.GraphModule, order: Sequence[int], copy: Callable[[nn.Module], nn.Module], origin: str
) -> tuple[fx.GraphModule, dict[str, tuple[str, int]]]:
    """A graph whose layer i is layer order[i] of `gm`; modules move, repeated ones are made by `copy`.

    Also gives, for every module path in a layer, the path it had and its new layer.
    """
    before, layers, after = segments(gm.graph)
    if wrong := [i for i in order if not 0 <= i < len(layers)]:
        raise EffcError(
            Diagnostic("E402", f"there is no layer {wrong[0]}; layers are 0 to {len(layers) - 1}")
        )
    if not order:
        raise EffcError(Diagnostic("E402", "no layer would be left", help="keep at least one"))
    graph = fx.Graph()
    modules: dict[str, nn.Module] = {}
    places: dict[str, tuple[str, int]] = {}
    nodes: dict[fx.Node, fx.Node] = {}

    def take(node: fx.Node, path: str | None = None) -> None:
        nodes[node] = graph.node_copy(node, lambda n: nodes[n])
        if node.op == "call_module":
            target = path or str(node.target)
            nodes[node].target = target
            modules[target] = gm.get_submodule(str(node.target))

    for node in before:
        take(node)
    stream = nodes[cast(fx.Node, layers[0].entry)]
    used: set[int] = set()
    for new, old in enumerate(order):
        segment = layers[old]
        nodes[cast(fx.Node, segment.entry)] = stream
        copies: dict[str, nn.Module] = {}
        for node in segment.nodes:
            target = str(node.target)
            moved = f"layers.{new}.{target.split('.', 2)[2]}" if node.op == "call_module" else None
            take(node, moved)
            if new != old or old in used:
                nodes[node].meta["origin"] = origin
            if moved is None:
                continue
            if old in used:
                modules[moved] = copies.setdefault(target, copy(modules[moved]))
            for inner, _ in modules[moved].named_modules():
                tail = f".{inner}" if inner else ""
                places[moved + tail] = (target + tail, new)
        used.add(old)
        stream = nodes[cast(fx.Node, segment.exit)]
    _told(modules)
    for index in range(len(layers)):
        nodes[cast(fx.Node, layers[index].exit)] = stream
    for node in after:
        if node.op == "output":
            graph.output(nodes[cast(fx.Node, node.args[0])])
        else:
            take(node)
    return module_of(modules, graph), places


def _told(modules: Mapping[str, nn.Module]) -> None:
    """What a block hears of an earlier one must be told before it."""
    told: set[str] = set()
    for path, module in modules.items():
        if (name := getattr(module, "hears", None)) is not None and name not in told:
            note = f"`{path}` computes with what an earlier layer hands on, and that layer would be gone"
            help_ = "rearrange layers before the stage that lets them share"
            title = "a layer would lose what it hears of another"
            raise EffcError(Diagnostic("E402", title, (), (note,), help_))
        if (name := getattr(module, "tells", None)) is not None:
            told.add(name)


def runs(order: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    runs: list[list[int]] = []
    for n in order:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
