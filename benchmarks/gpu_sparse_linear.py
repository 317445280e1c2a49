"""Linear layers with zeros on a GPU: effc's kernels against cuBLAS in bfloat16, and its own dense 8 bits.

    python benchmarks/gpu_sparse_linear.py [--runs 7]

Half of every four columns, and a half, three quarters and nine tenths of the weights anywhere. First values
are checked on this GPU; ratios are to cuBLAS. Prints a table last and writes JSON to out/bench; without a
GPU, a line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_contest import Call, Make, Row, asked, checked, contest, dense, table

SHAPES = ((4096, 14336), (8192, 28672))
"""Columns and channels."""
ROWS = (1, 16, 64, 512)
ZEROS = (0.5, 0.75, 0.9)


def main() -> int:
    if not (runs := asked(__doc__)):
        return 0
    if not checked(_specs()):
        return 1
    rows: list[Row] = []
    for k, n in SHAPES:
        for m in ROWS:
            made = {"cuBLAS": dense(m, n, k), "effc:8 bits": _codes(m, n, k), "effc:2:4": _half(m, n, k)}
            for values in ("bfloat16", "int8"):
                made |= {f"effc:{z:.0%} zeros, {values}": _bitmap(m, n, k, z, values) for z in ZEROS}
            rows += contest(f"{m} rows, {k} x {n}", made, n * k // 2, runs)
    table("gpu_sparse_linear", rows)
    return 0


def _specs() -> list[tuple[Any, Any]]:
    """What is checked before it is timed."""
    from effc.kernels.sparse_linear import gpu, gpu_bitmap

    bitmaps: list[dict[str, object]] = [{}, {"values": "int8", "group": 128}]
    return [(gpu, gpu.parse({})), *((gpu_bitmap, gpu_bitmap.parse(fields)) for fields in bitmaps)]


def _codes(m: int, n: int, k: int) -> Make:
    import torch

    def make() -> Call:
        from effc.kernels.gpu.load import load
        from effc.kernels.quant_linear.emit_triton import emit
        from effc.kernels.quant_linear.spec_gpu import WeightOnlySpec

        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        words = torch.randint(-(2**31), 2**31, (n, k // 4), device="cuda", dtype=torch.int32)
        scales = torch.rand(k // 128, n, device="cuda", dtype=torch.float16)
        module = load(emit(WeightOnlySpec(bits=8, group=128)))
        return lambda: module.launch(x, words, scales, n)

    return make


def _half(m: int, n: int, k: int) -> Make:
    import torch

    def make() -> Call:
        from effc.kernels.gpu.load import load
        from effc.kernels.sparse_linear.emit_triton import emit
        from effc.kernels.sparse_linear.spec_gpu import TwoOfFourSpec, padded

        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        values = torch.randn(n, padded(k) // 2, device="cuda").bfloat16().view(torch.int32)
        places = torch.full((n, padded(k) // 32), 0x5A39635A, dtype=torch.int32, device="cuda")
        module = load(emit(TwoOfFourSpec()))
        return lambda: module.launch(x, values, places, n, ordered=True)

    return make


def _bitmap(m: int, n: int, k: int, zeros: float, values: str) -> Make:
    """The packed matrix of one draw; its tensors are copied for each call."""
    import torch

    from effc.kernels.sparse_linear.bitmap_triton import emit
    from effc.kernels.sparse_linear.layout_bitmap import pack
    from effc.kernels.sparse_linear.spec_bitmap import MIDDLE, BitmapSpec

    codes = values == "int8"
    spec = BitmapSpec.model_validate({"values": values} | ({"group": 128} if codes else {}))

    def make() -> Call:
        from effc.kernels.gpu.load import load

        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        gone = torch.rand(256, k) < zeros
        w = torch.randint(0, 256, (256, k), dtype=torch.uint8) if codes else torch.randn(256, k).bfloat16()
        scales = torch.rand(256, spec.groups(k)) if codes else None
        packed = pack(spec, w.masked_fill(gone, MIDDLE if codes else 0), scales)
        # Rows beyond 256 have the same places and numbers of their own.
        times, stored = n // 256, packed.values.numel()
        given = {
            "values": packed.values.repeat(times),
            "bits": packed.bits.repeat(1, times),
            "starts": (packed.starts + stored * torch.arange(times, dtype=torch.int32).view(-1, 1, 1))
            .permute(1, 0, 2)
            .reshape(packed.starts.shape[0], -1),
        }
        if packed.scales is not None:
            given["scales"] = packed.scales.repeat(1, times)
        held = {name: t.contiguous().cuda() for name, t in given.items()}
        module = load(emit(spec))
        return lambda: module.launch(x, **held, n=n)

    return make


if __name__ == "__main__":
    raise SystemExit(main())
