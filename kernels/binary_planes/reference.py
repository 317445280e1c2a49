"""The definition of binary_planes in plain torch, in double precision, and examples of its operands."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effc.compiler.planes import dense, pack_signs
from effc.kernels.binary_planes.spec import BinaryPlanesSpec
from effc.kernels.epilogue import apply


def reference(
    spec: BinaryPlanesSpec, x: Tensor, signs: Tensor, scales: Tensor, given: Mapping[str, Tensor]
) -> Tensor:
    """x [M, K] float32, signs [P, N, ceil(K / 8)] uint8, scales [P, t, A, B] as stored -> y [M, N]."""
    y = (x.double() @ dense(signs, scales, x.shape[1]).double().T).float()
    return apply(spec.epilogue, y, given)


def example(spec: BinaryPlanesSpec, m: int, n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random x [M, K], stored signs and stored scales of W [N, K]; some powers are absent."""
    dice = torch.Generator().manual_seed(seed)
    shape = (spec.planes, spec.terms, *spec.grid(n, k))
    signs = pack_signs(torch.randint(0, 2, (spec.planes, n, k), generator=dice) * 2 - 1)
    if spec.scale == "float16":
        scales = (torch.rand(shape, generator=dice) * 0.2 + 0.01).to(torch.float16)
    else:
        scales = torch.randint(-9, 2, shape, generator=dice).to(torch.int8)
        scales[torch.rand(shape, generator=dice) < 0.05] = -128
    return torch.randn(m, k, generator=dice), signs, scales
