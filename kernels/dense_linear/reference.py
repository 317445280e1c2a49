"""The definition of dense_linear in plain torch, in the precision of x."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from effc.kernels.dense_linear.spec import DenseLinearSpec
from effc.kernels.epilogue import EPILOGUES


def reference(
    spec: DenseLinearSpec, x: Tensor, w: Tensor, w2: Tensor | None, given: Mapping[str, Tensor]
) -> Tensor:
    """x [M, K], w [N, K], w2 [N, K] when paired, operands of the epilogue by name -> y [M, N]."""
    y = x @ w.to(x.dtype).T
    for i, name in enumerate(spec.epilogue):
        step = EPILOGUES[name]
        y = step.torch(y, given[step.operand]) if step.operand else step.torch(y)
        if spec.paired and i == 0 and w2 is not None:
            y = y * (x @ w2.to(x.dtype).T)
    return y
