"""Run a shared stack of layers in loops, each token as often as a router says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import fx, nn

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.depth_attention import DepthAttention
from effc.compiler.blocks.lora_linear import LoraLinear
from effc.compiler.blocks.recursion import Act, Enter, Head, Leave
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.layers import segments
from effc.compiler.method import Work
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.compiler.tokens import Router, Source
from effc.passes.tie._groups import tails
from effc.passes.tie.recursive import Recursive
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Share

_TAKEN = (
    *("width", "heads", "kv_heads", "head_dim", "bias", "bias_o"),
    *("rope", "qk_norm", "window", "cap", "scale", "dtype"),
)


class MoR(Rewrite):
    """Loop a stack F of shared layers `recursions` times; in loop r it runs a share c_r of the tokens, which
    alone attend to each other and are cached.

    expert: h_t <- h_t + alpha act(theta_r h_t) F(h)_t for the floor(c_r T) tokens with the largest theta_r h
    among those of the loop before. That choice looks at later tokens, so it is made in training alone; else a
    token runs where the logit is positive: of the same router, which a small cross-entropy has trained to
    agree (`aux = loss`), or of a second one that looks on (`router`). token: p = softmax(Theta h_0) once, a
    token runs argmax p + 1 loops and h_0 + p_depth F^depth(h) comes out; balance = loss asks for even depths
    by N sum f_i P_i, bias moves a bias of the argmax instead, by `balance_weight` a step. capacity: linear
    is 1, (N - 1) / N, ..., 1 / N, or a share for each loop. kv = share_first: later loops read keys and
    values of the first one, of all tokens. Models that tie.recursive made keep their shared weights.

    Use when: tokens differ in how much work they need, and you can train: routers start at random, and a
              checkpoint's layers learn their new place (adapt.full, distill.logits).
    Costs:    weights as tie.recursive and N d of routers. FLOPs and cache of the stack fall to (N + 1) / 2N,
              those of its attention further. There is no C kernel yet, so torch runs the model.
    """

    paper = Paper(
        "Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation",
        arxiv="2507.10524",
        year=2025,
        section="2",
    )
    contract = Contract(HEALED, needs=(Fact("trainable", "model"),), gives=(Fact("tied", "model"),))
    examples = (
        "tie.mor(recursions = 2)",
        "tie.mor(recursions = 3, share = cycle, kv = share_first, aux = router, head = mlp, act = tanh)",
        "tie.mor(recursions = 2, router = token, init = stepwise, capacity = [100%, 60%])",
    )

    recursions: int = Field(default=3, ge=2, le=16, description="N: how often the stack runs at most")
    share: Literal["cycle", "middle_cycle"] = Field(
        default="middle_cycle", description="all layers in the stack, or all but the first and the last"
    )
    init: Literal["average", "stepwise", "lower", "upper"] = Field(
        default="average", description="what shared weights start as, as in tie.recursive"
    )
    router: Router = Field(default="expert", description="loops choose tokens, or tokens their depth")
    head: Head = Field(default="linear", description="a router's form: a matrix, or two with a gelu between")
    act: Act = Field(default="sigmoid", description="what makes a gate of a logit, of router = expert")
    alpha: float = Field(default=0.1, gt=0, description="factor of that gate")
    capacity: Literal["linear"] | tuple[Share, ...] = Field(
        default="linear", description="share of all tokens that run each loop"
    )
    kv: Literal["per_recursion", "share_first"] = Field(
        default="per_recursion", description="keys and values of each loop, or of the first for all"
    )
    aux: Literal["loss", "router"] = Field(
        default="loss", description="what learns to choose without the future: the router, or a second one"
    )
    aux_weight: float = Field(default=1e-3, ge=0, description="weight of its cross-entropy")
    balance: Literal["loss", "bias"] = Field(
        default="loss", description="what keeps depths even, of router = token"
    )
    balance_weight: float = Field(default=0.1, ge=0, description="weight of that loss, or step of the bias")
    z: float = Field(default=0.0, ge=0, description="weight of the square of a router's logits")

    @model_validator(mode="after")
    def _one_way_of_routing(self) -> Self:
        foreign = {"token": {"act", "alpha", "aux", "aux_weight"}, "expert": {"balance", "balance_weight"}}
        if told := foreign[self.router] & self.model_fields_set:
            raise ValueError(f"{min(told)} has no say with router = {self.router}; leave it out")
        shares = self.shares
        if len(shares) != self.recursions:
            raise ValueError(f"capacity has {len(shares)} shares for {self.recursions} recursions")
        if min(shares) <= 0 or any(b > a for a, b in pairwise(shares)):
            raise ValueError("capacity must fall from loop to loop and stay above 0: tokens leave for good")
        if self.kv == "share_first" and shares[0] < 1:
            raise ValueError("kv = share_first needs keys of all tokens, so the first capacity must be 100%")
        return self

    @property
    def shares(self) -> tuple[float, ...]:
        """c_r of every loop."""
        n = self.recursions
        return tuple((n - r) / n for r in range(n)) if isinstance(self.capacity, str) else self.capacity

    @property
    def _sharing(self) -> Recursive:
        """The stage that lets layers share, where none did before."""
        return Recursive(loops=self.recursions, share=self.share, init=self.init, tie_norms=True)

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        sharing = self._sharing
        tied = self._tied(model)
        found = list(sharing.refuses(model)) if not tied else []
        if tied and not self._fits(model):
            title = f"`{self.kind}` cannot loop layers that share weights in another pattern"
            note = f"{tied[0]} is tied, and loop {self.recursions} times over a {self.share} is not how"
            help_ = "use the loops and the share of the stage that tied them, or leave that stage out"
            return [Diagnostic("E341", title, (), (note,), help_)]
        found = [d if d.about != "loops" else _renamed(d) for d in found]
        if found:
            return found
        inner = [layer for slot in sharing.slots(model.layers) for layer in slot]
        odd = [n for n in inner if not _plain(model, n)]
        if odd:
            title = f"`{self.kind}` loops layers with causal softmax attention, and layer {odd[0]} has none"
            note = f"its attention is {_kind(model, odd[0])}"
            return [Diagnostic("E320", title, (), (note,), "use a decoder, and loop before other rewrites")]
        own = [n for n in inner if isinstance(model.module(f"layers.{n}.attention.k"), LoraLinear)]
        if self.kv == "share_first" and own:
            title = f"`{self.kind}` cannot share keys of loops that project them differently"
            note = f"layers.{own[0]}.attention.k has a low-rank difference of its own"
            help_ = "write kv = per_recursion, or tie with lora_rank = 0"
            return [Diagnostic("E320", title, (), (note,), help_, about="kv")]
        return []

    def _tied(self, model: Model) -> list[str]:
        return [alias for alias in model.ties() if alias.startswith("layers.")]

    def _fits(self, model: Model) -> bool:
        """Whether the layers of every slot share the weights of all that is no norm, as this stage would."""
        sharing = self._sharing
        inner = len(sharing.slots(model.layers)) * self.recursions
        if not inner or inner != model.layers - (2 if self.share == "middle_cycle" else 0):
            return False
        ties = model.ties()
        for first, *rest in sharing.slots(model.layers):
            names = [n for n, p in model.module(f"layers.{first}").named_parameters() if p.dim() > 1]
            for layer in rest:
                for name in names:
                    mine, theirs = f"layers.{layer}.{name}", f"layers.{first}.{name}"
                    lora = name.endswith((".a", ".b"))
                    if not lora and ties.get(mine, mine) != ties.get(theirs, theirs):
                        return False
        return True

    def outline(self, rw: Rewriter, others: Sequence[Model]) -> None:
        if not self._tied(rw.model):
            self._sharing.outline(rw, others)
        self._loop(rw, meta=True)

    def rewrite(self, rw: Rewriter) -> Mapping[str, float]:
        errors = {} if self._tied(rw.model) else self._sharing.rewrite(rw)
        self._loop(rw, meta=False)
        return errors

    def _loop(self, rw: Rewriter, meta: bool) -> None:
        slots = self._sharing.slots(rw.model.layers)
        width = int(rw.module("embedding").width)
        dtype = str(rw.module(f"layers.{slots[0][0]}.attention").dtype)
        with rw.together():
            for number, layers in enumerate(slots):
                for loop, layer in enumerate(layers):
                    path = f"layers.{layer}.attention"
                    rw.swap(
                        path, self._among(rw.module(path), loop, number), f"among tokens of loop {loop + 1}"
                    )
        for loop, share in enumerate(self.shares):
            first, last = slots[0][loop], slots[-1][loop]
            enter = self._enter(width, loop, share, dtype)
            if not meta:
                _draw(enter)
            rw.insert(
                f"layers.{first}.enter", enter, after=_name(segments(rw.model.gm.graph)[1][first].entry)
            )
            leave = Leave(
                width=width,
                loop=loop,
                loops=self.recursions,
                router=self.router,
                act=self.act,
                alpha=self.alpha,
            )
            rw.insert(f"layers.{last}.leave", leave, after=_name(segments(rw.model.gm.graph)[1][last].exit))

    def _enter(self, width: int, loop: int, share: float, dtype: str) -> Enter:
        expert = self.router == "expert"
        return Enter(
            width=width,
            loop=loop,
            loops=self.recursions,
            router=self.router,
            head=self.head,
            share=share,
            guess=expert and self.aux == "router" and share < 1,
            bias=not expert and self.balance == "bias" and loop == 0,
            aux=self.aux_weight if expert and share < 1 else 0.0,
            balance=0.0 if expert or loop else self.balance_weight,
            z=self.z if expert or not loop else 0.0,
            dtype=dtype,
        )

    def _among(self, old: Attention, loop: int, slot: int) -> DepthAttention:
        kv: Source = "own" if self.kv == "per_recursion" else "hear" if loop else "tell"
        given: dict[str, Any] = {name: getattr(old, name) for name in _TAKEN}
        new = DepthAttention(**given, loop=loop, slot=slot, share=self.shares[loop], kv=kv)
        for name in new._modules:
            new._modules[name] = old._modules[name]
        return new

    def work(self, model: Model, seq: int = 0) -> Work:
        return Work() if self._tied(model) else self._sharing.work(model, seq)


def _draw(enter: Enter) -> None:
    """Matrices of deviation 0.02, a bias of zeros; from the stream that the stage's seed set."""
    for name, tensor in list(enter.named_parameters()):
        path, _, slot = name.rpartition(".")
        drawn = 0.02 * torch.randn(tensor.shape) if tensor.dim() > 1 else torch.zeros(tensor.shape)
        setattr(enter.get_submodule(path), slot, nn.Parameter(drawn.to(tensor.dtype), requires_grad=False))


def _name(node: fx.Node | None) -> str:
    assert node is not None
    return str(node.target) if node.op == "call_module" else node.name


def _plain(model: Model, layer: int) -> bool:
    if "attention.q" not in tails(model, layer):
        return False
    block = model.module(f"layers.{layer}.attention")
    return type(block) is Attention and block.causal


def _kind(model: Model, layer: int) -> str:
    if "attention.q" not in tails(model, layer):
        return "missing"
    block = model.module(f"layers.{layer}.attention")
    return "one that sees what comes" if type(block) is Attention else type(block).__name__


def _renamed(told: Diagnostic) -> Diagnostic:
    """The words of tie.recursive, about this stage's argument."""
    help_ = (told.help or "").replace("loops", "recursions")
    return Diagnostic(
        told.code, told.title, told.labels, told.notes, help_, told.severity, about="recursions"
    )
