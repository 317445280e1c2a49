"""Read the weights of softmax attention as a gated recurrence, beside a sliding window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from effc.compiler.blocks.attention import Attention
from effc.compiler.blocks.liger_attention import LigerAttention
from effc.compiler.contract import HEALED, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.shapes import Rewrite
from effc.passes._dense import some
from effc.passes.linearize._blocks import Blocks
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper
from effc.specs.units import Count, Share

_KEPT = ("packed", "sparse", "sparse_2_4", "sparse_4_8", "tied", "low_rank", "adapter", "dense")


class Liger(Blocks, Rewrite):
    """y = W_o (mix * window attention + (1 - mix) * recurrence), of the q, k, v and o that are there.

    There is no new weight. The recurrence reads q and k without rotary positions; its gates are
    sigmoid(pool(k))^(1 / gate_div), so the key projection doubles as the gate. gla: S_t = diag(a_t) S_{t-1}
    + softmax(k_t)^T v_t, o_t = softmax(q_t) S_t. hgrn2: 1 - a_t in place of softmax(k_t), gate_div = 1.
    gsa: m slots of keys and values that forget alike, read by softmax(q_t K_t^T) V_t. The window sees the
    last `window` tokens, as the attention did. A window over the whole context with mix = 1 is the
    attention itself (an option of effc). Where q and k have norms, the recurrence reads them normed and
    pools gates of raw keys: the paper's models have none, so this is not confirmed there.

    Use when: sequences are long and the model may be healed: adapt.lora on q, k and v is enough.
    Costs:    quality until it is healed. A token costs the same however long the sequence; the cache is a
              state of Hk h^2 numbers and a ring of `window` tokens a layer. There is no C kernel yet, so
              torch runs the model.
    """

    paper = Paper(
        "Liger: Linearizing Large Language Models to Gated Recurrent Structures",
        arxiv="2503.01496",
        year=2025,
        section="3",
    )
    contract = Contract(HEALED, keeps=tuple(Fact(name, "model") for name in _KEPT))
    streams = True
    examples = (
        "linearize.liger(window = 8)",
        "linearize.liger(window = 4, form = hgrn2, mix = 0.3)",
        'linearize.liger(window = 0, form = gsa, slots = 4, select = ["layers[::2].attention"])',
    )

    form: Literal["gla", "hgrn2", "gsa"] = Field(default="gla", description="which recurrence")
    window: Count = Field(
        default=64, description="tokens that softmax attention still sees; 0: none, all recurrence"
    )
    mix: Share = Field(default=0.5, description="share of the window in the sum")
    gate_div: float = Field(default=16.0, gt=0, description="divisor of the log gates, of gla and gsa")
    slots: Count = Field(default=0, description="slots a key head, of gsa; 0: as many as a key has channels")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.window and not self.mix:
            raise ValueError("mix = 0 leaves a window unread; write window = 0")
        if not self.window and self.mix == 1:
            raise ValueError("mix = 1 leaves nothing but a window, and window = 0 is none")
        if self.slots and self.form != "gsa":
            raise ValueError(f"slots belong to form = gsa, not to {self.form}")
        return self

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        paths = self.blocks(model)
        return list(self.unfit(model, paths)) or list(self._unread(model, paths))

    def _unread(self, model: Model, paths: Sequence[str]) -> Iterator[Diagnostic]:
        blocks: dict[str, Any] = {path: model.module(path) for path in paths}
        bare = [path for path, block in blocks.items() if block.rope is None]
        if bare:
            yield Diagnostic(
                "E320",
                f"`{self.kind}` needs rotary positions, which the recurrence can do without",
                notes=(
                    f"{some(bare)} has learned or no positions of its own, and they are in what it reads",
                ),
                help="use a model with rotary positions, or linearize.gla and train it anew",
            )
        longest = model.config.get("max_position_embeddings")
        if isinstance(longest, int) and self.window > longest:
            yield Diagnostic(
                "E320",
                f"a window of {self.window} tokens is longer than the model's context",
                notes=(f"it was trained on {longest} positions",),
                help=f"use a window of at most {longest}",
                about="window",
            )
        width = next(iter(blocks.values())).head_dim
        if self.slots and width % self.slots:
            fits = [n for n in range(1, width + 1) if width % n == 0]
            yield Diagnostic(
                "E320",
                f"the {width} channels of a key cannot be pooled to {self.slots} slots",
                help=f"use slots in {{{', '.join(map(str, fits))}}}",
                about="slots",
            )

    def rewrite(self, rw: Rewriter) -> None:
        with rw.together():
            for path in self.blocks(rw.model):
                rw.swap(path, self._block(rw.module(path)), self._words())

    def _block(self, old: Attention) -> LigerAttention:
        """The block with the attention's own children."""
        given = {name: getattr(old, name) for name in _TAKEN}
        window = self.window if old.window is None else min(self.window, old.window)
        new = LigerAttention(
            **given, window=window, mix=self.mix, form=self.form, slots=self.slots, gate_div=self.gate_div
        )
        for name, child in old._modules.items():
            new._modules[name] = child
        return new

    def _words(self) -> str:
        recurrence = f"{self.form}, no window" if not self.window else f"{self.form}, window {self.window}"
        return f"Attention -> {recurrence}, mix {self.mix:g}"


_TAKEN = (
    *("width", "heads", "kv_heads", "head_dim", "bias", "bias_o"),
    *("rope", "qk_norm", "cap", "scale", "dtype"),
)
"""Arguments of an attention block that the new block has as well."""
