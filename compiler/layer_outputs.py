"""Layer outputs: the stream behind each layer of a model, taken while the model runs.

Shapes: B sequences, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, fx
from torch.utils.hooks import RemovableHandle

from effc.compiler.layers import segments
from effc.compiler.model import Model
from effc.specs.diagnostic import Diagnostic, EffcError


@contextmanager
def layer_outputs(model: Model, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """The stream [B, T, d] behind each of `layers`, filled in as the model runs while the context is open.

    Raises:
        EffcError: E402 when the model has no layers that can be told apart, or not that many.
    """
    _, parts, _ = segments(model.gm.graph)
    if missing := [layer for layer in layers if not 0 <= layer < len(parts)]:
        note = f"the layers are 0 to {len(parts) - 1}"
        raise EffcError(Diagnostic("E402", f"there is no layer {missing[0]} to look behind", notes=(note,)))
    seen: dict[int, Tensor] = {}
    handles = [_tap(model, layer, cast(fx.Node, parts[layer].exit), seen) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tap(model: Model, layer: int, node: fx.Node, seen: dict[int, Tensor]) -> RemovableHandle:
    """A hook on the block that gives the stream, or on one that reads it."""

    def given(module: Any, args: Any, out: Tensor) -> None:
        seen[layer] = out

    def read(module: Any, args: Any) -> None:
        seen[layer] = args[0]

    if node.op == "call_module":
        return model.module(str(node.target)).register_forward_hook(given)
    reader = next((user for user in node.users if user.op == "call_module" and user.args[0] is node), None)
    if reader is None:
        note = f"nothing but {', '.join(str(user.target) for user in node.users)} reads it"
        raise EffcError(Diagnostic("E402", f"no block reads the stream behind layer {layer}", notes=(note,)))
    return model.module(str(reader.target)).register_forward_pre_hook(read)
