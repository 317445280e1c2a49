"""Simplify linear algebra by equality saturation: all equal forms at once, then the cheapest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.low_rank_linear import LowRankLinear
from effc.compiler.contract import EXACT, Contract, Fact
from effc.compiler.egraph import EGraph, Rule, Term
from effc.compiler.extract import extract
from effc.compiler.linear_terms import RULES, computed, joined, known_by, price_of
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.selects import Selects
from effc.compiler.shapes import Rewrite
from effc.compiler.trace import TracedModel
from effc.passes.reparam._affine import add_bias, put_affine
from effc.passes.reparam._groups import Affine, Group, affine, groups, leaves
from effc.passes.reparam._regions import Region, rebuilt, region
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.select import resolve

Kind = Literal["fold", "assoc", "lora_merge", "concat"]
_GROUPS: Mapping[str, str] = {"fold": "fold", "assoc": "assoc", "lora_merge": "merge"}


class Egraph(Selects, Rewrite):
    """Write linear layers in their cheapest equal form: A (B x) as (A B) x, W x + s B A x as (W + s B A) x,
    W (g n(x) + b) as (W diag g) n(x) + W b, and in traced modules layers of one input as one.

    All forms that the rules reach are held at once in an e-graph, and the cheapest is taken, what several
    layers share being paid once. Matrices are multiplied and added beforehand, so only what is left for a run
    has a price: `flops` and `bytes` of one token, or `latency`, which is bytes moved and a start for every
    operation. Without a norm's gain its weight is one and its bias zero.

    Use when: adapters, factors or norms were left over by earlier stages, or a traced network has linear
              layers behind or beside each other.
    Costs:    nothing; weights are rounded once more. Steps and nodes are limited, time is not.
    """

    paper = Paper(
        "High-performance symbolic-numerics via multiple dispatch", arxiv="2105.03949", year=2021, section="3"
    )
    contract = Contract(
        EXACT, breaks=(Fact("adapter"),), keeps=tuple(map(Fact, ("tied", "packed", "unit_gain")))
    )
    examples = (
        "reparam.egraph()",
        "reparam.egraph(rules = [fold, assoc], cost = flops)",
    )

    select: tuple[str, ...] = Field(
        default=(), description="layers that may change; default: weights of attention, mlp and head"
    )
    rules: tuple[Kind, ...] = Field(  # type: ignore[assignment]
        default=("fold", "assoc", "lora_merge", "concat"),
        description="fold gains and biases, associate products, merge adapters and sums, concatenate",
    )
    cost: Literal["latency", "flops", "bytes"] = Field(default="latency", description="what is made least")
    iters: int = Field(default=30, ge=1, le=1000, description="rounds of rewriting at most")
    nodes: int = Field(default=20_000, ge=100, le=1_000_000, description="terms held at once at most")

    def targets(self, model: Model) -> dict[str, Self]:  # pyright: ignore[reportIncompatibleMethodOverride]
        kinds = (Linear, LowRankLinear, LoraLinear, nn.Linear)
        names = [n for n in model.names() if isinstance(model.module(n.path), kinds)]
        wanted = self.select or ("attention", "mlp", "head", "linear")
        able = [w for w in wanted if self.select or any(_within(n.role, w) for n in names)]
        if not able:
            return {}
        table = resolve(able, self.except_, (), names)
        return dict.fromkeys((path for path, given in table.items() if given is not None), self)

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if any(self._simplified(g) for g in self._groups(model)) or self._region(model) is not None:
            return []
        return [
            Diagnostic(
                "E320",
                f"`{self.kind}` finds nothing to simplify",
                notes=(f"by {', '.join(self.rules)} no layer has a cheaper equal form in {self.cost}",),
                help="leave the stage out, or allow more rules",
            )
        ]

    def rewrite(self, rw: Rewriter) -> None:
        for group in self._groups(rw.model):
            if found := self._simplified(group):
                self._write(rw, group, *found)
        if (made := self._region(rw.model)) is not None:
            rebuilt(rw, *made)

    def work(self, model: Model, seq: int = 0) -> Work:
        sizes = [max(g.sizes.values(), key=_numel) for g in self._groups(model)]
        return Work(solve=2.0 * sum(_numel(s) for s in sizes), memory=24 * max(map(_numel, sizes), default=0))

    # -- searching

    def _rules(self) -> list[Rule]:
        return [rule for word in self.rules if word in _GROUPS for rule in RULES[_GROUPS[word]]]

    def _groups(self, model: Model) -> list[Group]:
        if isinstance(model, TracedModel):
            return []
        return groups(model, set(self.targets(model)), "fold" in self.rules and "assoc" in self.rules)

    def _region(self, model: Model) -> tuple[Region, list[Term]] | None:
        """The linear part of a traced graph and its cheapest form; None where it has that already."""
        if not isinstance(model, TracedModel):
            return None
        found = region(model, set(self.targets(model)))
        if not found.roots:
            return None
        terms, saved = self._cheapest(found.sizes, list(found.roots.values()), "concat" in self.rules)
        return (found, terms) if saved else None

    def _cheapest(self, sizes: Any, roots: list[Term], concat: bool) -> tuple[list[Term], bool]:
        """The cheapest terms, and whether they are cheaper than those given."""
        graph = EGraph(known_by(sizes))
        numbers = [graph.add(root) for root in roots]
        price = price_of(self.cost)
        before = extract(graph, numbers, price)[1]
        graph.saturate(self._rules(), self.iters, self.nodes, joined if concat else None)
        terms, after = extract(graph, numbers, price)
        return (terms, True) if after < before - 1e-9 else (roots, False)

    def _simplified(self, group: Group) -> tuple[list[Affine], bool] | None:
        """Each unit as a chain of matrices, and whether the norm loses its gain; None: nothing changes."""
        terms, saved = self._cheapest(group.sizes, list(group.units.values()), False)
        if not saved:
            return None
        chains = [affine(term, group.read) for term in terms]
        if any(c is None or not 1 <= len(c.matrices) <= 2 for c in chains):
            return None
        found = [c for c in chains if c is not None]
        kept = {c.gained for c in found} if group.norm else {False}
        if len(kept) > 1:
            return None
        return found, group.norm is not None and kept == {False}

    # -- writing

    def _write(self, rw: Rewriter, group: Group, chains: Sequence[Affine], folded: bool) -> None:
        held = leaves(rw, group)
        for (path, before), chain in zip(group.units.items(), chains, strict=True):
            if not folded and affine(before, group.read) == chain:
                continue
            _put(rw, path, chain, held)
        if not folded or group.norm is None:
            return
        norm = rw.module(group.norm)
        if held is not None:
            gain = torch.full_like(norm.weight, 1 - norm.offset, device="cpu")
            rw.write(group.norm, "weight", gain, "gain one")
            if norm.bias is not None:
                rw.write(group.norm, "bias", torch.zeros_like(norm.bias, device="cpu"), "bias zero")


def _put(rw: Rewriter, path: str, chain: Affine, held: Mapping[Any, Tensor] | None) -> None:
    """One unit as a chain of one or two matrices and a constant."""
    old = rw.module(path)
    dtype = (old.base if isinstance(old, LoraLinear) else old).dtype
    wanted = getattr(torch, dtype)
    numbers = None if held is None else [computed(m, held).to(wanted) for m in chain.matrices]
    bias = None if held is None or chain.constant is None else computed(chain.constant, held).to(wanted)
    detail = "cheapest equal form"
    if isinstance(old, Linear) and len(chain.matrices) == 1:
        if chain.constant is not None and old.bias is None and bias is None:
            add_bias(rw, path, None, None, detail)
        elif numbers is not None:
            put_affine(rw, path, numbers[0], bias, detail)
        return
    rw.swap(path, _unit(old, chain, dtype, numbers, bias), detail)


def _unit(old: Any, chain: Affine, dtype: str, numbers: Sequence[Tensor] | None, bias: Tensor | None) -> Any:
    """A linear, or one of two factors."""
    form: dict[str, Any] = {"in_features": old.in_features, "out_features": old.out_features, "dtype": dtype}
    form["bias"] = chain.constant is not None
    if len(chain.matrices) == 1:
        made: Any = Linear(**form)
        names = ["weight"]
    else:
        made = LowRankLinear(rank=old.rank, **form)
        names = ["b", "a"]
    if numbers is not None:
        for name, tensor in zip(names, numbers, strict=True):
            setattr(made, name, nn.Parameter(tensor, requires_grad=False))
        if bias is not None:
            made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def _within(role: str, prefix: str) -> bool:
    return role == prefix or role.startswith(f"{prefix}.")


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
