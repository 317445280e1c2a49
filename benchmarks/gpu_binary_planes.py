"""Linear layers of sign planes on a GPU: effc's kernel against cuBLAS in bfloat16 and effc's 4-bit codes.

    python benchmarks/gpu_binary_planes.py [--runs 7]

Ratios are to cuBLAS. Prints a table last and writes JSON to out/bench; without a GPU, a line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_contest import Call, Make, Row, asked, checked, contest, dense, table

SHAPES = ((4096, 14336), (8192, 28672))
"""Columns and channels."""
ROWS = (1, 16, 64)
PLANES = (1, 2, 3, 4)


def main() -> int:
    if not (runs := asked(__doc__)):
        return 0
    if not checked(_specs()):
        return 1
    rows: list[Row] = []
    for k, n in SHAPES:
        for m in ROWS:
            made = {"torch": dense(m, n, k), "effc:4 bits": _codes(m, n, k)}
            for side in ("rows", "columns"):
                made |= {f"effc:{p} planes, {side}": _planes(m, n, k, p, side) for p in PLANES}
            rows += contest(f"{m} rows, {k} x {n}", made, n * k // 8, runs)
    table("gpu_binary_planes", rows)
    return 0


def _specs() -> list[tuple[Any, Any]]:
    """What is checked before it is timed."""
    from effc.kernels.binary_planes import gpu

    both = [{"planes": p, "side": "rows", "share": 128} for p in PLANES]
    return [(gpu, gpu.parse(fields)) for fields in (*both, {"planes": 3, "side": "columns"})]


def _codes(m: int, n: int, k: int) -> Make:
    import torch

    def make() -> Call:
        from effc.kernels.gpu.load import load
        from effc.kernels.quant_linear.emit_triton import emit
        from effc.kernels.quant_linear.spec_gpu import WeightOnlySpec

        spec = WeightOnlySpec(bits=4, group=128)
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        words = torch.randint(-(2**31), 2**31, (n, k // 8), device="cuda", dtype=torch.int32)
        scales = torch.rand(k // 128, n, device="cuda", dtype=torch.float16)
        xsum = x.float().view(m, -1, spec.run).sum(-1).t().contiguous()
        module = load(emit(spec))
        return lambda: module.launch(x, words, scales, n, xsum=xsum)

    return make


def _planes(m: int, n: int, k: int, planes: int, side: str) -> Make:
    import torch

    def make() -> Call:
        from effc.kernels.binary_planes.emit_triton import emit
        from effc.kernels.binary_planes.spec_gpu import BinaryPlanesGpuSpec
        from effc.kernels.gpu.load import load

        spec = BinaryPlanesGpuSpec.model_validate(
            {"planes": planes, "side": side, "share": 128 if side == "rows" else 0}
        )
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        words = torch.randint(-(2**31), 2**31, (planes, n, k // 32), device="cuda", dtype=torch.int32)
        shape = (planes, k // 128, n) if side == "rows" else (planes, 1, k)
        scales = torch.rand(shape, device="cuda", dtype=torch.float16)
        module = load(emit(spec))
        return lambda: module.launch(x, words, scales, n)

    return make


if __name__ == "__main__":
    raise SystemExit(main())
