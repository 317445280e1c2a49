"""Thin products plus scattered numbers on a GPU: effc's kernels against a dense W built at every pass.

    python benchmarks/gpu_sparse_low_rank.py [--runs 7]

`built` makes W from its parts and multiplies, as published code does, and its gradient is that of a dense W.
`dense` is a layer that has W already, to which ratios are. Peak memory of a call is beside its operands.
Prints a table last and writes JSON to out/bench; without a GPU, a line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_contest import Call, Make, Row, asked, checked, contest, table

SHAPES = ((4096, 4096), (4096, 11008))
"""Columns and channels."""
ROWS = (16, 1024, 8192)
RANK, SHARE, FACTOR = 128, 0.03, 0.25


def main() -> int:
    if not (runs := asked(__doc__)):
        return 0
    if not checked(_specs()):
        return 1
    rows: list[Row] = []
    for k, n in SHAPES:
        for m in ROWS:
            for slopes in (False, True):
                made = {name: _call(name, m, n, k, slopes) for name in ("dense", "built", "effc")}
                job = f"{'forward + backward' if slopes else 'forward'} {m} rows, {k} x {n}"
                rows += contest(job, made, n * k // 4, runs)
    table("gpu_sparse_low_rank", rows)
    return 0


def _specs() -> list[tuple[Any, Any]]:
    """What is checked before it is timed."""
    from effc.kernels.sparse_low_rank import gpu

    return [(gpu, gpu.parse({"rank": RANK, "rows": rows})) for rows in (16, 128)]


def _call(name: str, m: int, n: int, k: int, slopes: bool) -> Make:
    import torch
    import torch.nn.functional as F

    def make() -> Call:
        def draw(*shape: int) -> Any:
            return (torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 16).requires_grad_(slopes)

        x, dy = draw(m, k), torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
        forward: Callable[[], Any]
        if name == "dense":
            w = draw(n, k)
            leaves = [x, w]

            def forward() -> Any:
                return F.linear(x, w)
        else:
            places = torch.randperm(n * k, device="cuda")[: int(SHARE * n * k)]
            a, b, values = draw(RANK, k), draw(n, RANK), draw(places.numel())
            leaves = [x, a, b, values]
            forward = (_built if name == "built" else _effc)(x, a, b, values, places)

        def both() -> object:
            y = forward()
            return torch.autograd.grad(y, leaves, dy) if slopes else y

        return both

    return make


def _built(x: Any, a: Any, b: Any, values: Any, places: Any) -> Callable[[], Any]:
    import torch.nn.functional as F

    def forward() -> Any:
        w = (FACTOR * (b @ a)).flatten().index_add(0, places, values).view(b.shape[0], a.shape[1])
        return F.linear(x, w)

    return forward


def _effc(x: Any, a: Any, b: Any, values: Any, places: Any) -> Callable[[], Any]:
    from effc.kernels.sparse_low_rank.call_gpu import linear
    from effc.kernels.sparse_low_rank.layout import pack
    from effc.kernels.sparse_low_rank.spec import SparseLowRankSpec

    spec = SparseLowRankSpec.model_validate({"rank": RANK, "rows": 16 if x.shape[0] <= 16 else 128})
    support = pack(places, b.shape[0], a.shape[1])
    return lambda: linear(spec, x, a, b, values, support, FACTOR)


if __name__ == "__main__":
    raise SystemExit(main())
