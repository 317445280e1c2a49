"""Let samples of a training batch learn from each other, before a classifier that both share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import fx, nn

from effc.compiler.blocks.linear import Linear
from effc.compiler.contract import EXACT, Contract, Fact
from effc.compiler.model import Model
from effc.compiler.rewrite import Rewriter
from effc.compiler.roles import Role
from effc.compiler.shapes import Rewrite
from effc.passes._waived import on_a_decoder
from effc.passes.reparam._batchformer import SampleMixer
from effc.specs.diagnostic import Diagnostic
from effc.specs.paper import Paper


class Batchformer(Rewrite):
    """Put x' = encoder(x) beside the features x [N, C] in training, with the batch as the sequence.

    Both are classified: what comes out has 2 N rows, the second N for the same labels again.

    `apply` puts the encoder layer before the classifier, `remove` takes it out. At rest it hands x on, so
    either way the deployed function is the same and samples stand by themselves; in training they do not, as
    analyze.batch_isolation tells.

    Use when: a classifier trains on few samples of some kinds; labels are given twice: cat((y, y)).
    Costs:    about 4 C^2 + 2 C ff weights and N^2 C FLOPs a batch in training, nothing at rest. On several
              machines each looks at its own samples alone.
    """

    paper = Paper(
        "BatchFormer: Learning to Explore Sample Relationships for Robust Representation Learning",
        arxiv="2203.01522",
        year=2022,
        section="3",
    )
    contract = Contract(EXACT, keeps=tuple(map(Fact, ("tied", "packed", "sparse", "low_rank"))))
    waives: ClassVar[Mapping[str, str]] = on_a_decoder(
        "decoders classify every token; tests/passes/test_batchformer.py holds it to classifiers"
    )
    examples = ("reparam.batchformer(heads = 4)", "reparam.batchformer(mode = remove)")

    mode: Literal["apply", "remove"] = Field(default="apply", description="put the layer in, or take it out")
    at: str = Field(default="", description="path of the classifier; default: the last linear")
    heads: int = Field(default=4, ge=1, description="heads of the encoder layer")
    ff: int = Field(
        default=0, ge=0, description="width inside its feed-forward part; 0: that of the features"
    )
    dropout: float = Field(default=0.5, ge=0, lt=1, description="dropout inside the layer")
    seed: int = Field(default=0, ge=0, description="what the layer's first weights are drawn by")

    def classifier(self, model: Model) -> str | None:
        """The path of the linear that the features go into."""
        linears = [str(n.target) for n in model.gm.graph.nodes if _is_linear(model, n)]
        if self.at:
            return self.at if self.at in linears else None
        return linears[-1] if linears else None

    def mixers(self, model: Model) -> list[str]:
        return [path for path, module in model.gm.named_modules() if isinstance(module, SampleMixer)]

    def refuses(self, model: Model, others: Sequence[Model] = ()) -> Sequence[Diagnostic]:
        if self.mode == "remove":
            if self.mixers(model):
                return []
            return [Diagnostic("E320", f"`{self.kind}` finds no layer to remove", help="leave the stage out")]
        path = self.classifier(model)
        if path is None:
            what = f"`{self.at}` is no linear of the graph" if self.at else "the graph calls no linear"
            return [
                Diagnostic(
                    "E320",
                    f"`{self.kind}` finds no classifier",
                    notes=(what,),
                    help="name the last linear: at = PATH",
                    about="at",
                )
            ]
        width = int(model.module(path).in_features)  # type: ignore[arg-type]
        if width % self.heads:
            fits = [n for n in range(1, width + 1) if width % n == 0 and n <= 16]
            return [
                Diagnostic(
                    "E320",
                    f"{self.heads} heads do not divide the {width} features before `{path}`",
                    help=f"use heads in {{{', '.join(map(str, fits))}}}",
                    about="heads",
                )
            ]
        return []

    def rewrite(self, rw: Rewriter) -> None:
        if self.mode == "remove":
            for mixer in self.mixers(rw.model):
                rw.remove(mixer)
            return
        path = self.classifier(rw.model)
        assert path is not None
        head: Any = rw.module(path)
        node = rw.node(path)
        width = head.in_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layer = SampleMixer(width, self.heads, self.ff or width, self.dropout)
        layer = layer.to(head.weight.device, head.weight.dtype).eval().requires_grad_(False)
        name = f"{path.replace('.', '_')}_mixer"
        rw.model.gm.add_submodule(name, layer)
        with rw.surgery(name, f"before {path}") as graph, graph.inserting_before(node):
            node.args = (graph.call_module(name, (node.args[0],)), *node.args[1:])
        rw.model.roles |= {
            f"{name}.{inner}": Role("other")
            for inner, module in layer.named_modules()
            if inner and (module._parameters or module._buffers)
        }


def _is_linear(model: Model, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = model.module(str(node.target))
    return isinstance(module, Linear) or type(module) is nn.Linear
