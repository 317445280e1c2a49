"""View: a model as patterns see it, nodes with what may be asked of them, over blocks or over their ops.

Fields of every node: `users` (readers of its value), `inputs` (values it reads), `layer`, `role`, `dtype` (of
its weights), `params`, `tied`, `in` and `out` (features, channels; for an embedding its width). Over blocks
also every argument of the block's constructor (heads, form, eps, bias, kernel_size, ...), over ops every
attribute of the op (form, factor, cap, ...) and `block`, the type of the block that it is part of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from effc.compiler.blocks import Unit
from effc.compiler.blocks.quant_linear import Packed
from effc.compiler.model import Model
from effc.compiler.op_graph import Op, OpGraph, expand
from effc.compiler.pattern import Over, Value
from effc.compiler.roles import Role, canonical

SHAPE_ALONE = {("visible", 1), ("token_types", 1), ("shape_like", 1), ("route", 1), ("cast_like", 1)}
"""Op and place of a value of which an op reads only shape and dtype, so that it counts as no reader."""

GENERAL = ("users", "inputs", "layer", "role", "dtype", "params", "tied", "in", "out", "block")
"""Fields that every node may be asked for, whether it has them or not."""

_IN = ("in_features", "in_channels")
_OUT = ("out_features", "out_channels", "width", "embedding_dim")


@dataclass(eq=False, slots=True)
class Vertex:
    """One node: a block, a function, or an op inside a block."""

    label: str
    """What captures give: the path of a block; of an op, the path of the unit whose weights it uses."""
    node: fx.Node
    """The node of the block graph that it is, or is part of."""
    names: tuple[str, ...]
    """Words that mean it, in lower case; roles are compared apart."""
    role: Role | None = None
    module: nn.Module | None = None
    """The block; of an op, the block that it is part of."""
    unit: nn.Module | None = None
    """Of an op, the unit whose weights it uses."""
    op: Op | None = None
    tensors: tuple[Tensor, ...] = ()
    tied: bool = False
    reads: list[Vertex] = field(default_factory=list)
    users: list[Vertex] = field(default_factory=list)

    def is_a(self, word: str) -> bool:
        if word == "*":
            return self.node.op != "placeholder"
        return word.lower() in self.names or (self.role is not None and self.role.within(word))

    def ask(self, name: str) -> tuple[Value] | None:
        """The value of a field, in a tuple; None where the node has no such field."""
        match name:
            case "users":
                return (len(self.users),)
            case "inputs":
                return (len(self.reads),)
            case "layer":
                return (self.role.layer,) if self.role else None
            case "role":
                return (self.role.name,) if self.role else None
            case "dtype":
                kinds = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in self.tensors)
                return ("+".join(kinds),) if kinds else None
            case "params":
                return (sum(t.numel() for t in self.tensors),)
            case "tied":
                return (self.tied,)
            case "block":
                return (type(self.module).__name__,) if self.module is not None and self.op else None
        if self.op is not None and name in self.op.attributes:
            return _plain(self.op.attributes[name])
        if self.op is None:
            return _argument(self.module, name)
        return self._side(name) if name in ("in", "out") else None

    def _side(self, name: str) -> tuple[Value] | None:
        """Features that an op takes or gives, by the shape of its weight [..., o, i]."""
        widest = max(self.tensors, key=Tensor.numel, default=None)
        if widest is None or isinstance(self.unit, Packed):
            return _argument(self.unit, name)
        if self.op is not None and self.op.name == "embed":
            return (widest.shape[-1],) if name == "out" else None
        return (widest.shape[-1 if name == "in" or widest.ndim == 1 else -2],)


def view(model: Model, over: Over) -> list[Vertex]:
    """The nodes of the block graph, or with blocks written out in ops, in graph order."""
    return _View(model, over).vertices


class _View:
    def __init__(self, model: Model, over: Over) -> None:
        self.model = model
        self.over = over
        self.vertices: list[Vertex] = []
        self.made: dict[fx.Node, Vertex] = {}
        """Node of the block graph -> what gives its value."""
        self.shared = {name for pair in model.ties().items() for name in pair}
        for node in model.gm.graph.nodes:
            if node.op not in ("get_attr", "output"):
                self._add(node)

    def _add(self, node: fx.Node) -> None:
        module = self.model.module(str(node.target)) if node.op == "call_module" else None
        if self.over == "ops" and isinstance(module, Unit):
            try:
                graph = expand(module)
            except TypeError:
                graph = None
            if graph is not None:
                self._expanded(node, module, graph)
                return
        path = str(node.target)
        tensors = owned(module) if module is not None else {}
        vertex = Vertex(
            path if module is not None else node.name,
            node,
            _names(node, module),
            self._role(path) if module is not None else None,
            module,
            tensors=tuple(tensors.values()),
            tied=any(f"{path}.{name}" in self.shared for name in tensors),
        )
        self._join(
            vertex, [self.made[a] for a in node.all_input_nodes if a in self.made and a.name != "step"]
        )
        self.made[node] = vertex

    def _expanded(self, node: fx.Node, block: Unit, graph: OpGraph) -> None:
        """The ops of one block; those that only unpack or cast weights count, but belong to their reader."""
        path, tensors = str(node.target), owned(block)
        source = node.args[0] if node.args else None
        values: dict[int, Vertex] = {}
        if isinstance(source, fx.Node) and source in self.made:
            values[0] = self.made[source]
        weights: dict[int, list[str]] = {}
        """Value made of weights alone -> their names in the block."""
        for number, op in enumerate(graph.ops):
            if op.name == "weight":
                weights[op.gives[0]] = [str(op.attributes["name"])]
                continue
            taken = [n for place, n in enumerate(op.takes) if (op.name, place) not in SHAPE_ALONE]
            inside = [n for n in taken if n is not None]
            names = [name for n in inside for name in weights.get(n, ())]
            unit = names[0].rpartition(".")[0] if names else ""
            whole = ".".join(filter(None, (path, unit)))
            held = {name: tensors[name] for name in names}
            vertex = Vertex(
                whole if names else f"{path}/{op.name}.{number}",
                node,
                (op.name,),
                self._role(whole if names else path),
                block,
                block.get_submodule(unit) if names else None,
                op,
                tuple(held.values()),
                any(f"{path}.{name}" in self.shared for name in held),
            )
            self._join(vertex, [values[n] for n in inside if n in values])
            if inside and all(n in weights for n in inside):
                for given in op.gives:
                    weights[given] = names
            values |= dict.fromkeys(op.gives, vertex)
        self.made[node] = values[graph.output] if graph.output in values else values[0]

    def _role(self, path: str) -> Role | None:
        """The role of a module; that of a whole block follows from its path."""
        return self.model.roles.get(path) or canonical(path)

    def _join(self, vertex: Vertex, reads: list[Vertex]) -> None:
        self.vertices.append(vertex)
        for other in reads:
            if other not in vertex.reads:
                vertex.reads.append(other)
                other.users.append(vertex)


def owned(module: nn.Module) -> Mapping[str, Tensor]:
    """Every tensor of a module by its name inside."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )


def _names(node: fx.Node, module: nn.Module | None) -> tuple[str, ...]:
    if module is not None:
        return tuple(kind.__name__.lower() for kind in type(module).__mro__[:-2])
    if node.op == "placeholder":
        return ("input",)
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return (name.lower(), name.lower().partition(".")[0])  # aten's add.Tensor is an add too


def _argument(module: nn.Module | None, name: str) -> tuple[Value] | None:
    """An argument of a module, by its own name or by `in` and `out`."""
    if module is None:
        return None
    for other in {"in": _IN, "out": _OUT}.get(name, (name,)):
        given: dict[str, Any] = module.spec() if isinstance(module, Unit) else vars(module)
        if other in given and other != "type":
            return _plain(given[other])
        if other == "bias" and "bias" in module._parameters:
            return (module._parameters["bias"] is not None,)
    return None


def _plain(value: Any) -> tuple[Value] | None:
    """A value that a condition can be compared with; a tuple of one number again and again is that number."""
    if isinstance(value, tuple) and value and len(set(value)) == 1:
        value = value[0]
    return (value,) if isinstance(value, int | float | bool | str | None) else None
