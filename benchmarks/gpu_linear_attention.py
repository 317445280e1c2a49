"""Gated linear attention on a GPU: effc's kernels against flash-linear-attention and flash attention.

    python benchmarks/gpu_linear_attention.py [--runs 7]

Forward, forward and backward, and one decoding step. flash-linear-attention is measured where it is
installed. Ratios are to causal flash attention of torch at the same heads, which has no gates; those of a
step are to the recurrence in plain torch. Prints a table last and writes JSON to out/bench; without a GPU,
one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from gpu_contest import Call, Make, Row, asked, checked, contest, table

SHAPES = ((4, 2048, 16, 128), (1, 8192, 32, 128), (1, 32768, 16, 128))
"""Sequences, tokens, heads, channels of keys and of values."""
CONTENDERS = ("torch", "effc:key", "effc:head", "fla:key", "fla:head")
STEPS = ((1, 32, 128), (64, 32, 128))
"""Sequences, heads, channels."""


def main() -> int:
    if not (runs := asked(__doc__)):
        return 0
    if not checked(_specs()):
        return 1
    rows: list[Row] = []
    for b, t, h, d in SHAPES:
        for slopes in (False, True):
            made = {name: _call(name, b, t, h, d, slopes) for name in CONTENDERS}
            job = f"{'forward + backward' if slopes else 'forward'} {b}x{t}, {h} heads of {d}"
            rows += contest(job, made, 2 * 4 * b * t * h * d, runs)
    for b, h, d in STEPS:
        steps = {name: _step(name, b, h, d) for name in ("torch", "effc:key", "effc:head")}
        rows += contest(f"step of {b}, {h} heads of {d}", steps, 4 * b * h * d * d, runs)
    table("gpu_linear_attention", rows)
    return 0


def _specs() -> list[tuple[Any, Any]]:
    """What is checked before it is timed."""
    from effc.kernels.linear_attention import gpu
    from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec

    fields = {"heads": 4, "kv_heads": 2, "key_dim": 128, "value_dim": 128, "scale": 0.09}
    gates = ("key", "head")
    return [(gpu, LinearAttentionGpuSpec.model_validate(fields | {"gate": gate})) for gate in gates]


def _call(name: str, b: int, t: int, h: int, d: int, slopes: bool) -> Make:
    import torch
    import torch.nn.functional as F

    who, _, gate = name.partition(":")

    def make() -> Call:
        def draw(*shape: int) -> Any:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(slopes)

        shape = (b, h, t, d) if who == "torch" else (b, t, h, d)
        q, k, v = draw(*shape), draw(*shape), draw(*shape)
        forward: Callable[[], Any]
        leaves = [q, k, v]
        if who == "torch":

            def forward() -> Any:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            width = (d,) if gate == "key" else ()
            g = F.logsigmoid(torch.randn(b, t, h, *width, device="cuda")).div(16).requires_grad_(slopes)
            leaves.append(g)
            forward = _fla(gate, q, k, v, g) if who == "fla" else _effc(gate, q, k, v, g)
        dy = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        def both() -> object:
            y = forward()
            return torch.autograd.grad(y, leaves, dy.view(y.shape)) if slopes else y

        return both

    return make


def _fla(gate: str, q: Any, k: Any, v: Any, g: Any) -> Callable[[], Any]:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda: (chunk_gla if gate == "key" else chunk_simple_gla)(
        q, k, v, g=g, scale=q.shape[-1] ** -0.5
    )[0]


def _effc(gate: str, q: Any, k: Any, v: Any, g: Any) -> Callable[[], Any]:
    import torch

    from effc.kernels.linear_attention.call_gpu import attend
    from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec

    b, t, h, d = q.shape
    fields = {
        "heads": h,
        "kv_heads": h,
        "key_dim": d,
        "value_dim": v.shape[-1],
        "scale": d**-0.5,
        "gate": gate,
    }
    spec = LinearAttentionGpuSpec.model_validate(fields)
    starts = torch.arange(0, b * t + 1, t, device="cuda", dtype=torch.int32)
    return lambda: attend(spec, *(x.view(b * t, h, -1) for x in (q, k, v, g)), None, starts)[0]


def _step(name: str, b: int, h: int, d: int) -> Make:
    import torch

    who, _, gate = name.partition(":")

    def make() -> Call:
        from effc.kernels.linear_attention.call_gpu import step
        from effc.kernels.linear_attention.spec_gpu import LinearAttentionGpuSpec

        q, k, v = (torch.randn(b, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        g = -torch.rand(b, h, 1 if gate == "head" else d, device="cuda")
        state = torch.randn(b, h, d, d, device="cuda")
        if who == "torch":

            def plain() -> object:
                state.mul_(g.exp()[..., None]).add_(k[..., None].float() * v[..., None, :].float())
                return (q[..., None, :].float() @ state).to(q.dtype)

            return plain
        fields = {"heads": h, "kv_heads": h, "key_dim": d, "value_dim": d, "scale": d**-0.5, "gate": gate}
        spec = LinearAttentionGpuSpec.model_validate(fields)
        return lambda: step(spec, q, k, v, g, state)

    return make


if __name__ == "__main__":
    raise SystemExit(main())
