"""Decoding attention over a shared prefix on a GPU: effc's kernels against attention that does not share.

    python benchmarks/gpu_shared_prefix.py [--runs 7]

`torch` holds keys and values of the prefix for every sequence, `torch:copied` gathers them from one copy at
each step. Ratios are to the first. Prints a table last and writes JSON to out/bench; without a GPU, a line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_contest import Call, Make, Row, asked, checked, contest, table

JOBS = ((64, 16384, 128), (64, 4096, 128), (16, 16384, 128), (256, 2048, 128))
"""Sequences, tokens of the prefix, tokens of each suffix."""
HEADS, KV_HEADS, WIDTH = 32, 8, 128


def main() -> int:
    if not (runs := asked(__doc__)):
        return 0
    if not checked(_specs()):
        return 1
    rows: list[Row] = []
    for b, prefix, suffix in JOBS:
        made = {"torch": _torch(b, prefix, suffix), "torch:copied": _copied(b, prefix, suffix)}
        made["effc"] = _effc(b, prefix, suffix)
        size = 4 * KV_HEADS * WIDTH * (prefix + b * suffix)
        rows += contest(f"{b} sequences, prefix {prefix}, suffix {suffix}", made, size, runs)
    table("gpu_shared_prefix", rows)
    return 0


def _specs() -> list[tuple[Any, Any]]:
    """What is checked before it is timed."""
    from effc.kernels.shared_prefix import gpu
    from effc.kernels.shared_prefix.spec import SharedPrefixSpec

    return [(gpu, SharedPrefixSpec(heads=8, kv_heads=2, head_dim=width, scale=0.1)) for width in (64, 128)]


def _torch(b: int, prefix: int, suffix: int) -> Make:
    import torch
    import torch.nn.functional as F

    kept: list[torch.Tensor] = []

    def make() -> Call:
        q = torch.randn(b, HEADS, 1, WIDTH, device="cuda", dtype=torch.bfloat16)
        if not kept:  # beyond any cache by itself, and too large for copies
            shape = (b, KV_HEADS, prefix + suffix, WIDTH)
            kept.extend(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, v = kept
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return make


def _copied(b: int, prefix: int, suffix: int) -> Make:
    import torch
    import torch.nn.functional as F

    def make() -> Call:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        q = draw(b, HEADS, 1, WIDTH)
        shared = [draw(1, KV_HEADS, prefix, WIDTH) for _ in range(2)]
        own = [draw(b, KV_HEADS, suffix, WIDTH) for _ in range(2)]

        def call() -> object:
            k, v = (torch.cat((s.expand(b, -1, -1, -1), o), 2) for s, o in zip(shared, own, strict=True))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return call

    return make


def _effc(b: int, prefix: int, suffix: int) -> Make:
    import torch

    def make() -> Call:
        from effc.kernels.gpu.load import load
        from effc.kernels.shared_prefix.emit_triton import emit
        from effc.kernels.shared_prefix.plan import plan
        from effc.kernels.shared_prefix.spec import SharedPrefixSpec

        spec = SharedPrefixSpec(heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH, scale=WIDTH**-0.5)
        lengths = [prefix, *([suffix] * b)]
        made = plan(spec, lengths, [(0, 1 + i) for i in range(b)])
        parts, device = int(made.first[-1]), made.to("cuda")
        end = torch.tensor(lengths, device="cuda").cumsum(0).int()
        begin = (end - torch.tensor(lengths, device="cuda")).int()
        q = torch.randn(b, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
        shape = (sum(lengths), KV_HEADS, WIDTH)
        k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        module = load(emit(spec))
        return lambda: module.launch(q, k, v, begin, end, *device, parts)

    return make


if __name__ == "__main__":
    raise SystemExit(main())
