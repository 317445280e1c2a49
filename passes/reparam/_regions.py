"""The linear part of a traced graph as terms, and a graph made of other terms in its place.

Shapes: values [..., n], the last axis being the one that matrices act on.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.egraph import Term
from effc.compiler.graph_shapes import graph_shapes
from effc.compiler.linear_terms import computed
from effc.compiler.readers import runs_once
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import Role
from effc.compiler.trace import TracedModel
from effc.passes._dense import shared
from effc.passes.reparam._groups import Leaf, constant

_ADDS = (operator.add, torch.add)


@dataclass(slots=True)
class Region:
    """Roots are nodes of the linear part that others read; leaves are what it reads."""

    roots: dict[str, Term] = field(default_factory=dict)
    """Name of a node -> what it computes."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Name of a value -> the node that gives it."""
    sizes: dict[Leaf, tuple[int, ...]] = field(default_factory=dict)


def region(model: TracedModel, chosen: set[str]) -> Region:
    """Linears that run once, their sums, and scaling by numbers; everything else gives a value."""
    shapes, ties = graph_shapes(model), shared(model)
    found = Region()
    terms: dict[fx.Node, Term] = {}
    inside: list[fx.Node] = []

    def value(node: fx.Node) -> Term | None:
        shape = shapes.get(node.name)
        if not shape:
            return None
        found.inputs[node.name] = node.name
        found.sizes["value", node.name] = (shape[-1],)
        return Term("value", (), node.name)

    for node in model.gm.graph.nodes:
        made = _linear(model, node, terms, chosen - ties, found.sizes) or _sum(node, terms, shapes)
        if made is not None:
            inside.append(node)
        elif (made := value(node)) is None:
            continue
        terms[node] = made
    members = set(inside)
    for node in inside:
        if any(user not in members for user in node.users):
            found.roots[node.name] = terms[node]
    return found


def _linear(
    model: TracedModel, node: fx.Node, terms: dict[fx.Node, Term], chosen: set[str], sizes: dict[Leaf, Any]
) -> Term | None:
    path = str(node.target)
    if node.op != "call_module" or path not in chosen or not runs_once(model, path):
        return None
    module, source = model.module(path), node.args[0]
    plain = isinstance(module, Linear) or type(module) is nn.Linear
    if not plain or not isinstance(source, fx.Node) or source not in terms:
        return None
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    sizes["matrix", path] = tuple(weight.shape)
    y = Term("apply", (Term("matrix", (), path), terms[source]))
    if bias is None:
        return y
    sizes["vector", path] = tuple(bias.shape)
    return Term("add", (y, Term("vector", (), path)))


def _sum(node: fx.Node, terms: dict[fx.Node, Term], shapes: dict[str, Any]) -> Term | None:
    """A sum of two values of one shape, one of them of the linear part; a product with a number."""
    if node.op != "call_function" or node.kwargs or len(node.args) != 2:
        return None
    left, right = node.args
    if node.target in _ADDS and isinstance(left, fx.Node) and isinstance(right, fx.Node):
        alike = shapes.get(left.name) == shapes.get(right.name) is not None
        linear = any(terms[n].op != "value" for n in (left, right) if n in terms)
        if alike and linear and left in terms and right in terms:
            return Term("add", (terms[left], terms[right]))
    if node.target is operator.mul:
        numbers = [a for a in (left, right) if isinstance(a, int | float)]
        nodes = [a for a in (left, right) if isinstance(a, fx.Node) and a in terms]
        if len(numbers) == len(nodes) == 1 and terms[nodes[0]].op != "value":
            return Term("scale", (terms[nodes[0]],), float(numbers[0]))
    return None


def rebuilt(rw: Rewriter, found: Region, terms: Sequence[Term]) -> None:
    """Put nodes that compute `terms` in place of the roots; matrices become linears of their own."""
    held = _leaves(rw, found)
    roots = dict(zip(found.roots, terms, strict=True))
    nodes = {node.name: node for node in rw.model.gm.graph.nodes}
    made: dict[Term, Any] = {}
    first = next(iter(found.roots))
    with rw.surgery(first, f"{len(roots)} linear values in their cheapest form") as graph:
        for name, term in roots.items():
            root = nodes[name]
            with graph.inserting_before(root):
                for part in term.parts():
                    if part not in made and not constant(part):
                        made[part] = _node(rw, graph, part, made, nodes, found, held)
            root.replace_all_uses_with(made[term])


def _node(
    rw: Rewriter, graph: fx.Graph, term: Term, made: dict[Term, Any], nodes: Any, found: Region, held: Any
) -> Any:
    data: Any = term.data
    match term.op:
        case "value":
            return nodes[found.inputs[str(data)]]
        case "apply":
            return graph.call_module(_place(rw, term.args[0], None, found, held), (made[term.args[1]],))
        case "scale":
            return graph.call_function(operator.mul, (made[term.args[0]], data))
        case "take":
            cut: Any = (Ellipsis, slice(data[0], data[0] + data[1]))
            return graph.call_function(operator.getitem, (made[term.args[0]], cut))
    left, right = term.args
    if not constant(left) and not constant(right):
        return graph.call_function(operator.add, (made[left], made[right]))
    moving, still = (right, left) if constant(left) else (left, right)
    if moving.op == "apply":
        path = _place(rw, moving.args[0], still, found, held)
        return graph.call_module(path, (made[moving.args[1]],))
    name = _free(rw, "constant")
    dtype = next(t.dtype for t in rw.model.tensors().values() if t.is_floating_point())
    rw.model.gm.register_buffer(name, _number(still, held, found).to(dtype))
    return graph.call_function(operator.add, (made[moving], graph.get_attr(name)))


def _place(rw: Rewriter, matrix: Term, bias: Term | None, found: Region, held: Any) -> str:
    """A linear of its own that holds a matrix, and a constant as its bias."""
    names = [
        str(part.data)
        for part in (*matrix.parts(), *(bias.parts() if bias else ()))
        if part.data in _paths(found)
    ]
    weight = _number(matrix, held, found)
    like = rw.module(names[0])
    unit = Linear(
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        bias=bias is not None,
        dtype=str(like.weight.dtype).removeprefix("torch."),
    )
    unit.weight = nn.Parameter(weight.to(like.weight.dtype), requires_grad=False)
    if bias is not None:
        unit.bias = nn.Parameter(_number(bias, held, found).to(like.weight.dtype), requires_grad=False)
    path = _free(rw, f"{names[0]}_simple")
    rw.model.gm.add_submodule(path, unit)
    rw.model.roles[path] = Role("linear", rw.role(names[0]).layer)
    return path


def _paths(found: Region) -> set[Any]:
    return {name for op, name in found.sizes if op == "matrix"}


def _free(rw: Rewriter, name: str) -> str:
    """A name that nothing has."""
    there = {path for path, _ in rw.model.gm.named_modules()} | dict(rw.model.gm.named_buffers()).keys()
    number, fresh = 2, name
    while fresh in there:
        fresh, number = f"{name}{number}", number + 1
    return fresh


def _number(term: Term, held: dict[Leaf, Tensor] | None, found: Region) -> Tensor:
    """The numbers of a matrix or constant; on meta where they are not known."""
    if held is not None:
        return computed(term, held)
    blank = {
        leaf: torch.empty(size, dtype=torch.float64, device="meta") for leaf, size in found.sizes.items()
    }
    return computed(term, blank)


def _leaves(rw: Rewriter, found: Region) -> dict[Leaf, Tensor] | None:
    tensors: dict[Leaf, Tensor] = {}
    for op, name in found.sizes:
        if op != "value":
            tensor = rw.module(name).get_parameter("weight" if op == "matrix" else "bias").detach()
            if tensor.is_meta:
                return None
            tensors[op, name] = tensor.double()
    return tensors
