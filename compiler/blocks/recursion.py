"""Enter and Leave: the ends of a loop that some tokens run, with the router that says which.

Shapes: x [B, T, d] outside of a loop, [1, N, d] inside: the tokens that run it, row by row.
Source: Mixture-of-Recursions, arXiv 2507.10524, section 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from effc.compiler.blocks.linear import Linear
from effc.compiler.blocks.unit import Unit, empty
from effc.compiler.step import Step
from effc.compiler.tokens import Router, best, put, real, taken

if TYPE_CHECKING:
    from effc.compiler.op_graph import Ops, Value

Head = Literal["linear", "mlp"]
Act = Literal["sigmoid", "tanh"]


class Enter(Unit):
    """Takes the tokens of loop r out of the stream.

    expert: l_r = theta_r h. In training the floor(share n) largest of a row run, among those that ran the
    loop before; otherwise those with l_r > 0, or with a positive guess where a second router guesses: it
    looks at no later token. A share of 1 takes all. token: the first loop's router gives logits of all
    depths, and argmax (logits + bias) is the last loop that a token runs.
    """

    takes_step = True
    leads: ClassVar[tuple[str, ...]] = ("1", "N")
    """Letters of all but the last dimension of what comes out."""

    def __init__(
        self,
        *,
        width: int,
        loop: int,
        loops: int,
        router: Router = "expert",
        head: Head = "linear",
        share: float = 1.0,
        guess: bool = False,
        bias: bool = False,
        aux: float = 0.0,
        balance: float = 0.0,
        z: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        """`aux`, `balance`, `z` weigh losses of compiler/depth_losses.py; of a bias, balance is its step."""
        super().__init__()
        if not 0 <= loop < loops or not 0 < share <= 1:
            raise ValueError(f"loop {loop} of {loops} with {share} of the tokens")
        self.width = width
        self.loop = loop
        self.loops = loops
        self.route: Router = router
        self.head: Head = head
        self.share = share
        self.guesses = guess
        self.biased = bias
        self.aux = aux
        self.balance = balance
        self.z = z
        self.dtype = dtype
        self.load: Tensor | None = None
        """Tokens of each depth [loops] since the last optimizer step, where a bias balances them."""
        if router == "expert" or loop == 0:
            out = 1 if router == "expert" else loops
            inner = width
            if head == "mlp":
                self.router_up = Linear(in_features=width, out_features=2 * width, dtype=dtype)
                inner = 2 * width
            self.router = Linear(in_features=inner, out_features=out, dtype=dtype)
        if guess:
            self.guess = Linear(in_features=width, out_features=1, dtype=dtype)
        self.register_parameter("bias", empty(loops, dtype=dtype) if bias else None)

    def spec(self) -> dict[str, Any]:
        names = ("width", "loop", "loops", "head", "share", "aux", "balance", "z", "dtype")
        given = {name: getattr(self, name) for name in names}
        return {"type": "Enter", **given, "router": self.route, "guess": self.guesses, "bias": self.biased}

    @property
    def says(self) -> str:
        """What `effc show` tells of it."""
        return f"loop {self.loop + 1} of {self.loops}, {self.share:.0%} of tokens"

    def logits(self, x: Tensor) -> Tensor:
        """x [B, T, d] -> [B, T, 1], or [B, T, loops] of routing by tokens."""
        inner = functional.gelu(self.router_up(x)) if self.head == "mlp" else x
        found: Tensor = self.router(inner)
        return found

    def expand(self, ops: Ops, x: Value) -> Value:
        logits: Value | None = None
        if self.route == "expert" or self.loop == 0:
            inner = x
            if self.head == "mlp":
                inner = ops("activate", ops.inline("router_up", self.router_up, x), form="gelu")
            logits = ops.inline("router", self.router, inner)
        guess = ops.inline("guess", self.guess, x) if self.guesses else None
        bias = ops.weight("bias") if self.biased else None
        given = {"loop": self.loop, "route": self.route, "share": self.share}
        return ops("enter", x, logits, guess, bias, ops.step, **given)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        logits = self.logits(x) if self.route == "expert" or self.loop == 0 else None
        guess = self.guess(x.detach()) if self.guesses else None
        bias = cast(Tensor | None, self.bias)
        return entered(x, logits, guess, bias, step, self.loop, self.route, self.share, self.training)


class Leave(Unit):
    """Puts the tokens of loop r back into the stream: no weights.

    expert: h + alpha act(l_r) u where a token ran, h elsewhere, to the bit. token: u stands in for h until
    the last loop, behind which the stream is h_0 + p_depth u.
    """

    takes_step = True
    leads: ClassVar[tuple[str, ...]] = ("B", "T")
    """Letters of all but the last dimension of what comes out."""

    def __init__(
        self,
        *,
        width: int,
        loop: int,
        loops: int,
        router: Router = "expert",
        act: Act = "sigmoid",
        alpha: float = 0.1,
    ) -> None:
        super().__init__()
        self.width = width
        self.loop = loop
        self.loops = loops
        self.router: Router = router
        self.act: Act = act
        self.alpha = alpha

    @property
    def says(self) -> str:
        """What `effc show` tells of it."""
        how = f"+ {self.alpha:g} {self.act}" if self.router == "expert" else "+ p"
        return f"loop {self.loop + 1} of {self.loops}, {how}"

    def expand(self, ops: Ops, x: Value) -> Value:
        given = {"loop": self.loop, "loops": self.loops, "route": self.router}
        return ops("leave", x, ops.step, act=self.act, alpha=self.alpha, **given)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return left(x, step, self.loop, self.loops, self.router, self.act, self.alpha)


def entered(
    x: Tensor,
    logits: Tensor | None,
    guess: Tensor | None,
    bias: Tensor | None,
    step: Step,
    loop: int,
    route: Router,
    share: float,
    training: bool = False,
) -> Tensor:
    """x [B, T, d], logits [B, T, 1 or loops], guess [B, T, 1], bias [loops] -> [1, N, d], and the sides."""
    sides = step.sides
    whole = real(x, step)
    before = sides[f"alive {loop - 1}"] if loop else whole
    sides[f"bypass {loop}"] = x
    if route == "token":
        if logits is not None:
            sides["depths"] = wide = logits.float() if logits.element_size() == 2 else logits
            score = wide if bias is None else wide + bias.to(wide.dtype)
            sides["depth"] = score.argmax(-1)
            sides["weight"] = torch.softmax(wide, -1).gather(-1, sides["depth"][..., None])[..., 0]
        alive = before & (sides["depth"] >= loop)
    else:
        assert logits is not None
        sides[f"logits {loop}"] = told = logits[..., 0]
        if guess is not None:
            sides[f"guess {loop}"] = guess[..., 0]
        if share == 1:
            alive = before
        elif training:
            alive = best(told.detach(), before, share, whole)
        else:
            alive = before & ((told if guess is None else guess[..., 0]) > 0)
    sides[f"alive {loop}"] = alive
    return taken(x, alive)


def left(u: Tensor, step: Step, loop: int, loops: int, route: Router, act: Act, alpha: float) -> Tensor:
    """u [1, N, d] -> [B, T, d]"""
    sides = step.sides
    alive, h = sides[f"alive {loop}"], sides[f"bypass {loop}"]
    new = u[0]
    if route == "expert":
        told = sides[f"logits {loop}"][alive]
        g = alpha * (torch.sigmoid(told) if act == "sigmoid" else torch.tanh(told))
        return put(h, alive, g[:, None].to(new.dtype) * new, add=True)
    total = sides[f"sum {loop - 1}"] if loop else torch.zeros_like(h)
    ends = sides["depth"][alive] == loop
    weight = torch.where(ends, sides["weight"][alive], 0.0)
    total = put(total, alive, weight[:, None].to(new.dtype) * new, add=True)
    sides[f"sum {loop}"] = total
    return sides["bypass 0"] + total if loop + 1 == loops else put(h, alive, new, add=False)
