"""Let layers that attend alike share one attention map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from effc.compiler.blocks.attention import Attention as Block
from effc.compiler.blocks.echo_attention import EchoAttention
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.cost import count
from effc.compiler.method import DataRef, Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Inspect, Statistic
from effc.compiler.step import Step
from effc.passes.tie._alike import differ, grouped, leading, likeness, mask_of, most, rows_of_map
from effc.specs.diagnostic import Diagnostic, EffcError
from effc.specs.paper import Paper
from effc.specs.units import Count, Share


class Attention(Inspect):
    """Followers compute W_o A W_v x with the map A = softmax(Q K^T / sqrt(h)) of their leader, an earlier
    layer of their group; W_q, W_k, their norms and rotary positions are gone from them.

    sim(l, l') is the mean cosine of attention matrices over heads and sequences, taken on `rows` query rows
    of each. Of the layers between the first and the last ones, with like heads and masks, groups of at most
    `span` neighbors are chosen so that `ratio` of all layers follow and the sum of sim(leader, follower) is
    largest (effc's reading of "consecutive similar layers"). `groups` names them instead, leader first, and
    looks at no data. maps = store hands on probabilities, as the costs below count; recompute hands on
    queries and keys, for sequences whose maps do not fit memory, and saves the products with W_q and W_k.

    Use when: a decoder's middle layers look at the same places, and the model may be healed by
              distill.hidden or distill.logits, then adapt.full.
    Costs:    a follower loses d h (H + Hk) weights, 2 d h (H + Hk) + 2 T H h FLOPs a token and its keys in
              the cache. Quality falls until healed. There is no C kernel yet, so torch runs the model.
    """

    paper = Paper(
        "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
        arxiv="2409.14595",
        year=2024,
        section="3",
    )
    contract = Contract(
        HEALED,
        keeps=tuple(
            Fact(name, "model")
            for name in ("packed", "sparse", "sparse_2_4", "sparse_4_8", "unit_gain", "low_rank")
        ),
    )
    examples = (
        "tie.attention(data = code, keep_first = 1, keep_last = 1, ratio = 34%)",
        "tie.attention(groups = [[1, 2, 3], [4, 5]])",
        "tie.attention(data = code, samples = 4, span = 3, ratio = 34%, keep_last = 1, maps = recompute)",
    )

    data: DataRef | None = Field(default=None, description="sequences on which maps are compared")  # type: ignore[assignment]
    samples: int = Field(default=32, ge=1, description="sequences of the train split that are seen")
    groups: tuple[tuple[int, ...], ...] = Field(
        default=(), description="layers that share, leader first, counted from 0; in place of `data`"
    )
    keep_first: Count = Field(default=2, description="first layers that take no part")
    keep_last: Count = Field(default=2, description="last layers that take no part")
    span: int = Field(default=2, ge=2, description="layers in a group, at most")
    ratio: Share = Field(default=0.4, gt=0, lt=1, description="share of all layers that follow another")
    min_similarity: float = Field(
        default=0.0,
        ge=-1,
        le=1,
        description="least likeness of a follower to its leader, else the stage ends",
    )
    rows: int = Field(default=32, ge=1, description="query rows of each map that are compared")
    maps: Literal["store", "recompute"] = Field(
        default="store", description="whether probabilities are handed on, or queries and keys"
    )

    @model_validator(mode="after")
    def _chooses_once(self) -> Self:
        chosen = {"data", "keep_first", "keep_last", "span", "ratio", "min_similarity", "rows"}
        if self.groups and (told := chosen & self.model_fields_set):
            raise ValueError(f"groups name the layers, so {min(told)} has no say; leave one out")
        if not self.groups and self.data is None:
            raise ValueError(
                "sequences to compare maps on are missing; add data = ..., or name groups = [[2, 3]]"
            )
        short = [group for group in self.groups if len(group) < 2 or sorted(set(group)) != list(group)]
        if short:
            raise ValueError(f"group {list(short[0])} is no leader with later layers, in rising order")
        named = [layer for group in self.groups for layer in group]
        if len(set(named)) < len(named):
            raise ValueError("groups name a layer twice; a layer has one leader")
        return self

    def followers(self, layers: int) -> int:
        """How many of `layers` follow; a share is rounded to the nearest count."""
        return int(self.ratio * layers + 0.5)

    def chains(self, model: Model) -> list[list[int]]:
        """The layers that may take part, in order, those with like heads and masks together."""
        found: dict[object, list[int]] = {}
        for layer in range(self.keep_first, model.layers - self.keep_last):
            found.setdefault(mask_of(_block(model, layer)), []).append(layer)
        return list(found.values())

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        layers = model.layers
        inner = sorted(n for g in self.groups for n in g) or list(
            range(self.keep_first, layers - self.keep_last)
        )
        if beyond := [n for n in inner if not 0 <= n < layers]:
            note = f"the layers are 0 to {layers - 1}"
            return [
                Diagnostic("E331", f"there is no layer {beyond[0]} to share", (), (note,), about="groups")
            ]
        if len(inner) < 2:
            title = f"`{self.kind}` needs layers to share between those that are kept"
            note = f"of {layers} layers {self.keep_first} first and {self.keep_last} last ones take no part"
            return [Diagnostic("E330", title, notes=(note,))]
        odd = [n for n in inner if type(_block(model, n)) is not Block]
        if odd:
            title = f"`{self.kind}` shares maps of softmax attention, and layer {odd[0]} has none to share"
            note = f"layers.{odd[0]}.attention is {type(_block(model, odd[0])).__name__}"
            help_ = "share maps before the stage that put it there, or name `groups` without the layer"
            return [Diagnostic("E320", title, (), (note,), help_)]
        return self._unlike(model) if self.groups else self._too_many(model)

    def _unlike(self, model: Model) -> list[Diagnostic]:
        """Leaders and followers with other heads, windows or positions."""
        for leader, *rest in self.groups:
            for layer in rest:
                if (name := differ(_block(model, leader), _block(model, layer))) is not None:
                    values = [getattr(_block(model, n), name) for n in (leader, layer)]
                    title = f"layers {leader} and {layer} cannot share a map"
                    note = f"they differ in {name}: {values[0]} and {values[1]}"
                    return [Diagnostic("E332", title, notes=(note,), about="groups")]
        return []

    def _too_many(self, model: Model) -> list[Diagnostic]:
        wanted, limit = self.followers(model.layers), most(self.chains(model), self.span)
        if 1 <= wanted <= limit:
            return []
        title = f"`ratio` of `{self.kind}` asks for {wanted} followers among {model.layers} layers"
        note = f"between those that are kept at most {limit} can follow in groups of {self.span}"
        help_ = f"use a ratio of about {limit / model.layers:.0%}" if limit else "keep fewer layers"
        return [Diagnostic("E331", title, (), (note,), help_, about="ratio")]

    def watched(self, model: Model) -> list[str]:
        layers = [] if self.groups else [layer for chain in self.chains(model) for layer in chain]
        return [f"layers.{layer}.attention" for layer in sorted(layers)]

    def start(self, rw: Rewriter, path: str) -> Statistic:
        raise TypeError("maps are looked at whole")

    def inspect(self, module: nn.Module, x: Tensor, step: Step) -> Tensor:
        assert isinstance(module, Block)
        return rows_of_map(module, x, step, self.rows)

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        chosen = self.groups or self._chosen(rw.model, {})
        self._share(rw, chosen, {})

    def rewrite(self, rw: Rewriter, seen: Mapping[str, Tensor]) -> Mapping[str, float]:
        alike = likeness({int(path.split(".")[1]): found for path, found in seen.items()})
        chosen = self.groups or self._chosen(rw.model, alike)
        self._checked(rw.model, chosen, alike)
        self._share(rw, chosen, alike)
        return {f"layers.{a} layers.{b}": value for (a, b), value in alike.items()}

    def _chosen(self, model: Model, alike: Mapping[tuple[int, int], float]) -> Sequence[Sequence[int]]:
        wanted = self.followers(model.layers)
        found = grouped(self.chains(model), self.span, wanted, lambda a, b: alike.get((a, b), 0.0))
        assert found is not None, "refused before"
        return found

    def _checked(
        self, model: Model, chosen: Sequence[Sequence[int]], alike: Mapping[tuple[int, int], float]
    ) -> None:
        """Raises EffcError E333 when a follower is less like its leader than was asked for."""
        pairs = [(group[0], other) for group in chosen for other in group[1:] if (group[0], other) in alike]
        low = min(pairs, key=lambda pair: alike[pair], default=None)
        if low is None or alike[low] >= self.min_similarity:
            return
        least = self.min_similarity
        fits = [
            n
            for n in range(1, len(pairs))
            if (
                found := grouped(self.chains(model), self.span, n, lambda a, b: _or_never(alike[a, b], least))
            )
            is not None
            and all(alike[g[0], f] >= least for g in found for f in g[1:])
        ]
        help_ = f"write min_similarity = {alike[low] - 0.005:.2f}"
        help_ += f", or ratio = {max(fits) / model.layers:.1%}" if fits else ""
        note = f"layers {low[0]} and {low[1]}: {alike[low]:.3f}; asked for: {least:g}"
        title = f"layers do not attend alike enough for {len(pairs)} followers"
        raise EffcError(Diagnostic("E333", title, (), (note,), help_, about="min_similarity"))

    def _share(
        self, rw: Rewriter, chosen: Sequence[Sequence[int]], alike: Mapping[tuple[int, int], float]
    ) -> None:
        with rw.together():
            for leader, *rest in chosen:
                led = ", ".join(map(str, rest))
                lead = leading(rw.module(f"layers.{leader}.attention"), leader, self.maps)
                rw.swap(f"layers.{leader}.attention", lead, f"its map also serves layers {led}")
                for layer in rest:
                    path = f"layers.{layer}.attention"
                    how = f" ({alike[leader, layer]:.3f} alike)" if (leader, layer) in alike else ""
                    rw.swap(path, self._following(rw.module(path), leader), f"the map of layer {leader}{how}")

    def _following(self, old: Block, leader: int) -> EchoAttention:
        names = (
            "width",
            "heads",
            "kv_heads",
            "head_dim",
            "bias",
            "bias_o",
            "window",
            "causal",
            "cap",
            "scale",
        )
        given: dict[str, Any] = {name: getattr(old, name) for name in (*names, "dtype")}
        new = EchoAttention(**given, group=leader, maps=self.maps)
        new._modules["v"], new._modules["o"] = old.v, old.o
        return new

    def work(self, model: Model, seq: int = 0) -> Work:
        if self.groups:
            return Work()
        heads = max((_block(model, n).heads for n in range(model.layers)), default=0)
        layers = sum(map(len, self.chains(model)))
        kept = 8 * layers * self.samples * heads * min(self.rows, seq) * seq  # and once more when compared
        tokens = self.samples * seq
        return Work(flops=float(tokens * count(model, seq // 2).flops_per_token), memory=kept)


def _block(model: Model, layer: int) -> Any:
    """The attention of a layer; the layer itself stands in where it has none."""
    try:
        return model.module(f"layers.{layer}.attention")
    except AttributeError:
        return model.module(f"layers.{layer}")


def _or_never(value: float, least: float) -> float:
    return value if value >= least else -1e9
