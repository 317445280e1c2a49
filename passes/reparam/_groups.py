"""Groups of units that algebra may change together: a norm and the matrices that read it, or a unit alone.

Shapes: a unit's matrix W [o, i]; factors A [r, i], B [o, r]; gain g and bias b of a norm [d].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.blocks.norm import Norm
from effc.compiler.egraph import Term
from effc.compiler.model import Model
from effc.compiler.readers import readers
from effc.compiler.rewrite import Rewriter
from effc.passes._dense import shared

Leaf = tuple[str, str]


@dataclass(slots=True)
class Group:
    """Units, what each computes as a term of what comes in, and the norm before them."""

    norm: str | None
    units: dict[str, Term] = field(default_factory=dict)
    sizes: dict[Leaf, tuple[int, ...]] = field(default_factory=dict)
    read: Term | None = None
    """What the norm gives."""


def groups(model: Model, chosen: set[str], fold: bool) -> list[Group]:
    """Every group of a model in graph order; `fold` lets norms take part."""
    ties = shared(model)
    found: list[Group] = []
    taken: set[str] = set()
    for name in model.names() if fold else ():
        path = name.path
        norm = model.module(path)
        if not isinstance(norm, Norm) or path in ties:
            continue
        read = readers(model, path)
        able = [u for u in read.units if u in chosen and u not in ties and _known(model.module(u))]
        if not able or read.others or len(able) < len(read.units):
            continue  # what else reads the norm needs its gain
        group = Group(path)
        group.read = _normed(path, norm, group.sizes)
        for unit in able:
            group.units[unit] = term_of(unit, model.module(unit), group.read, group.sizes)
        taken.update(able)
        found.append(group)
    for path in chosen - taken - ties:
        module = model.module(path)
        if isinstance(module, LowRankLinear | LoraLinear) and _known(module):
            group = Group(None)
            x = Term("value", (), "x")
            group.sizes["value", "x"] = (module.in_features,)
            group.units[path] = term_of(path, module, x, group.sizes)
            found.append(group)
    order = {path: place for place, (path, _) in enumerate(model.gm.named_modules())}
    return sorted(found, key=lambda g: order[next(iter(g.units))])


def _known(unit: object) -> bool:
    """Units whose algebra is known; an adapter over packed weights is not."""
    if isinstance(unit, LoraLinear):
        return isinstance(unit.base, Linear)
    return isinstance(unit, Linear | LowRankLinear)


def _normed(path: str, norm: Norm, sizes: dict[Leaf, tuple[int, ...]]) -> Term:
    """g n(x) + b, with n(x) as the value that comes in."""
    sizes["value", "x"] = sizes["diag", path] = (norm.width,)
    out = Term("apply", (Term("diag", (), path), Term("value", (), "x")))
    if norm.bias is not None:
        sizes["vector", path] = (norm.width,)
        out = Term("add", (out, Term("vector", (), path)))
    return out


def term_of(path: str, unit: object, x: Term, sizes: dict[Leaf, tuple[int, ...]]) -> Term:
    """What a unit computes of x."""

    def matrix(name: str, tensor: Tensor) -> Term:
        sizes["matrix", name] = tuple(tensor.shape)
        return Term("matrix", (), name)

    def biased(y: Term, name: str, bias: Tensor | None) -> Term:
        if bias is None:
            return y
        sizes["vector", name] = tuple(bias.shape)
        return Term("add", (y, Term("vector", (), name)))

    if isinstance(unit, LowRankLinear):
        low = Term("apply", (matrix(f"{path}.a", unit.a), x))
        y = Term("apply", (matrix(f"{path}.b", unit.b), low))
        return biased(y, f"{path}.bias", unit.bias)  # type: ignore[arg-type]
    if isinstance(unit, LoraLinear):
        low = Term("scale", (Term("apply", (matrix(f"{path}.a", unit.a), x)),), unit.factor)
        change = Term("apply", (matrix(f"{path}.b", unit.b), low))
        return Term("add", (term_of(f"{path}.base", unit.base, x, sizes), change))
    assert isinstance(unit, Linear)
    y = Term("apply", (matrix(f"{path}.weight", unit.weight), x))
    return biased(y, f"{path}.bias", unit.bias)  # type: ignore[arg-type]


def leaves(rw: Rewriter, group: Group) -> Mapping[Leaf, Tensor] | None:
    """The numbers of a group, float64; None where they are not known."""
    found: dict[Leaf, Tensor] = {}
    held = {path: rw.present(path) for path in (*group.units, *([group.norm] if group.norm else []))}
    for op, name in group.sizes:
        if op == "value":
            continue
        if op == "diag" or (op == "vector" and name == group.norm):
            norm = held[name]
            tensor = norm.weight + norm.offset if op == "diag" else norm.bias
        else:
            owner = max((p for p in group.units if name.startswith(f"{p}.")), key=len)
            tensor = held[owner].get_parameter(name.removeprefix(f"{owner}."))
        if tensor.is_meta:
            return None
        found[op, name] = tensor.detach().double()
    return found


@dataclass(frozen=True, slots=True)
class Affine:
    """A chain of matrices, the last first, and a constant that is added; whether the norm's gain is read."""

    matrices: tuple[Term, ...]
    constant: Term | None
    gained: bool


def affine(term: Term, read: Term | None) -> Affine | None:
    """A term as a chain of matrices over what comes in; None where it is no such chain."""
    if term == read:
        return Affine((), None, True)
    match term.op:
        case "value":
            return Affine((), None, False)
        case "add":
            for moving, still in (term.args, term.args[::-1]):
                if constant(still) and (inner := affine(moving, read)) is not None and inner.constant is None:
                    return Affine(inner.matrices, still, inner.gained)
            return None
        case "apply":
            inner = affine(term.args[1], read)
            if inner is None or inner.constant is not None:
                return None
            return Affine((term.args[0], *inner.matrices), None, inner.gained)
    return None


def constant(term: Term) -> bool:
    """Whether nothing that comes in is in a term."""
    return all(part.op != "value" for part in term.parts())
