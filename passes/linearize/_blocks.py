"""The attention blocks that a linearizing method changes, those that it cannot, and how new ones begin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from pydantic import Field
from torch import Tensor, nn

from effc.compiler.blocks.attention import Attention
from effc.compiler.model import Model
from effc.compiler.selects import Selects
from effc.passes._dense import some
from effc.specs.diagnostic import Diagnostic


class Blocks(Selects):
    """Selects whole blocks: one changes as soon as any of its weights is selected."""

    select: tuple[str, ...] = Field(
        default=("attention",), description="blocks to change, by their weights; default: all attention"
    )

    def blocks(self, model: Model) -> list[str]:
        """Paths of the selected blocks, in model order."""
        return list(dict.fromkeys(path.rpartition(".")[0] for path in self.targets(model)))

    def unfit(self, model: Model, paths: Sequence[str]) -> Iterator[Diagnostic]:
        """Blocks that are no softmax attention, or one that sees what comes."""
        kinds = {path: model.module(path) for path in paths}
        others = [path for path, block in kinds.items() if type(block) is not Attention]
        both = [path for path, block in kinds.items() if type(block) is Attention and not block.causal]
        if others:
            yield Diagnostic(
                "E320",
                f"`{self.kind}` changes softmax attention, and `{others[0]}` is none",
                notes=(f"{some(others)}: {type(kinds[others[0]]).__name__}",),
                help='linearize once, and select attention, e.g. select = ["layers[0..3].attention"]',
                about="select",
            )
        if both:
            yield Diagnostic(
                "E320",
                f"`{self.kind}` needs attention that sees the past alone",
                notes=(f"{some(both)} of an encoder sees what comes as well",),
                help="use a decoder",
            )


def begun(block: nn.Module, first: Callable[[str, str, Tensor], Tensor], kept: Collection[str] = ()) -> None:
    """Give a block its first values: `first(child, slot, empty tensor)` for each, `kept` children as is."""
    for name, tensor in list(block.named_parameters()):
        inner, _, slot = name.rpartition(".")
        if inner not in kept:
            fresh = nn.Parameter(first(inner, slot, tensor), requires_grad=False)
            setattr(block.get_submodule(inner), slot, fresh)


def depth_scale(child: str, layers: int) -> float:
    """What first values are divided by: sqrt(2 layers) for what writes into the stream, which adds up."""
    return (2 * layers) ** 0.5 if child == "o" else 1.0
