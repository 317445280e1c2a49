"""Linear layers on a GPU: effc's kernels against cuBLAS in bfloat16 and the low-bit kernels that torch has.

    python benchmarks/gpu_linear.py [--shapes 4096x14336 8192x28672] [--rows 1 4 16 32 64 128 256] [--tune]

Shapes are columns x channels. First every kernel's values are checked on this GPU, then each is timed: CUDA
graphs, weights taken in turns so that the cache is cold, medians; ratios are to cuBLAS in the same run, and
`share` is that of 4.3 TB/s (an H200 copies as much) at the bytes that must be read. Mixtures are measured
against `torch._grouped_mm`. gemlite is measured where it is installed. With --tune, tiles other than a
kernel's own are timed too. Prints a table last and writes JSON to out/bench; without a GPU, one line.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpu_timing import Call, copies, gpu, report, seconds, wrong

RATE = 4.3e12
"""Bytes a second that an H200 copies."""
TARGETS = {1: 3.3, 4: 3.3, 16: 3.3, 32: 3.0}
"""4 bits against cuBLAS in bfloat16, by rows."""
SPLITS = (1, 2, 3, 4, 6, 8)
MIXTURES = {
    "8 experts, 2 of 4096 x 14336": (8, 2, 4096, 14336),
    "128 experts, 8 of 2048 x 768": (128, 8, 2048, 768),
}
Row = dict[str, Any]


def bits(n: int, k: int, b: int, group: int) -> tuple[Any, dict[str, Any]]:
    """A weight-only spec of b bits, and random tensors for its kernel."""
    from effc.kernels.quant_linear.spec_gpu import WeightOnlySpec

    spec = WeightOnlySpec.model_validate({"bits": b, "group": group, "symmetric": b == 8})
    words = torch.randint(
        -(2**31), 2**31 - 1, (n, spec.padded(k) // spec.each), dtype=torch.int32, device="cuda"
    )
    given: dict[str, Any] = {"words": words, "n": n}
    given["scales"] = torch.rand(spec.groups(k), n, device="cuda").half() * 0.01
    if not spec.symmetric:
        given["zeros"] = torch.randint(0, 1 << b, (spec.groups(k), n), dtype=torch.uint8, device="cuda")
    return spec, given


def bytes_of(n: int, k: int, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """A spec for rows of bytes, and random tensors for its kernel."""
    from effc.kernels.byte_linear.layout import DTYPES
    from effc.kernels.byte_linear.spec import ByteLinearSpec

    spec = ByteLinearSpec.model_validate(fields)
    if spec.bits == 4:
        words = torch.randint(-(2**31), 2**31 - 1, (n, k // 8), dtype=torch.int32, device="cuda")
    elif spec.kind == "int8":
        words = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    else:
        words = torch.randn(n, k, device="cuda").to(DTYPES["float8"])
    return spec, {"words": words, "scales": torch.rand(spec.groups(k), n, device="cuda") * 0.01, "n": n}


def half(n: int, k: int) -> tuple[Any, dict[str, Any]]:
    """A spec for two of four columns, and random tensors for its kernel."""
    from effc.kernels.sparse_linear.spec_gpu import TwoOfFourSpec, padded

    values = torch.randn(n, padded(k) // 2, device="cuda").bfloat16().view(torch.int32)
    places = torch.full((n, padded(k) // 32), 0x5A39635A, dtype=torch.int32, device="cuda")
    return TwoOfFourSpec(), {"values": values, "places": places, "n": n, "ordered": True}


OURS = {
    "effc W4A16 g128": lambda n, k: bits(n, k, 4, 128),
    "effc W8A16": lambda n, k: bits(n, k, 8, 128),
    "effc W3A16 g128": lambda n, k: bits(n, k, 3, 128),
    "effc W2A16 g128": lambda n, k: bits(n, k, 2, 128),
    "effc W4A8 g128": lambda n, k: bytes_of(n, k, bits=4, group=128),
    "effc W8A8 int8": lambda n, k: bytes_of(n, k),
    "effc W8A8 float8": lambda n, k: bytes_of(n, k, kind="float8"),
    "effc 2:4 bfloat16": half,
}


def ours(name: str, tune: bool, m: int, n: int, k: int) -> Iterator[tuple[str, float, int]]:
    """Name, seconds and bytes of a kernel with the tile it picks, or with the best of several."""
    from effc.kernels.byte_linear import emit_triton as of_bytes
    from effc.kernels.gpu.load import load
    from effc.kernels.quant_linear import emit_triton as of_bits
    from effc.kernels.sparse_linear import emit_triton as of_half

    emitter: Any = of_bytes if "A8" in name else of_half if "2:4" in name else of_bits
    spec, first = OURS[name](n, k)
    module = load(emitter.emit(spec))
    count = copies(spec.bytes(n, k))
    sets = [first, *(OURS[name](n, k)[1] for _ in range(count - 1))]
    x = torch.randn(m, k, device="cuda").bfloat16()
    # A norm before gives the sums; their pass is not this kernel's.
    more = {"xsum": module.sums(x)} if emitter is of_bits and spec.sums else {}
    tiles = [module.pick(m)]
    if tune:
        tiles += [
            (*tile[:4], split) for tile in module.TILES for split in SPLITS if tile[0] <= max(16, 2 * m)
        ]
    best: tuple[float, Any] | None = None
    for tile in dict.fromkeys(tiles):
        calls: list[Call] = [
            lambda one=one, tile=tile: module.launch(x, **one, **more, tile=tile) for one in sets
        ]
        taken = seconds(calls)
        best = min(best, (taken, tile), key=lambda found: found[0]) if best else (taken, tile)
    assert best is not None
    yield (f"{name} {best[1]}" if tune else name), best[0], spec.bytes(n, k)


def cublas(m: int, n: int, k: int) -> Iterator[tuple[str, float, int]]:
    x = torch.randn(m, k, device="cuda").bfloat16()
    sets = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(copies(2 * n * k))]
    yield "cuBLAS bfloat16", seconds([lambda w=w: F.linear(x, w) for w in sets]), 2 * n * k


def of_torch(m: int, n: int, k: int) -> Iterator[tuple[str, float, int]]:
    """tinygemm with 4 bits, cuBLAS with int8 and float8, rows quantized by torch's own operations."""
    x = torch.randn(m, k, device="cuda").bfloat16()
    size = n * k // 2 + n * k // 128 * 4
    packed = []
    for _ in range(copies(size)):
        codes = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(k // 128, n, 2, device="cuda").bfloat16()
        packed.append((torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales))
    multiply = torch.ops.aten._weight_int4pack_mm
    yield "tinygemm W4A16 g128", seconds([lambda p=p: multiply(x, p[0], 128, p[1]) for p in packed]), size
    wide = max(m, 32)  # _int_mm takes more than 16 rows
    q = torch.randint(-127, 127, (wide, k), dtype=torch.int8, device="cuda")
    sets = [torch.randint(-127, 127, (n, k), dtype=torch.int8, device="cuda") for _ in range(copies(n * k))]
    yield "torch._int_mm alone", seconds([lambda w=w: torch._int_mm(q, w.t()) for w in sets]), n * k
    to = torch.float8_e4m3fn
    b, rows = q.float().to(to), torch.ones(wide, 1, device="cuda")
    channels = torch.ones(1, n, device="cuda")
    sets = [w.float().to(to) for w in sets]
    calls: list[Call] = [
        lambda w=w: torch._scaled_mm(b, w.t(), rows, channels, out_dtype=torch.bfloat16) for w in sets
    ]
    yield "torch._scaled_mm alone", seconds(calls), n * k


def gemlite(m: int, n: int, k: int) -> Iterator[tuple[str, float, int]]:
    """Its 4-bit layer as its documentation packs it, where it is installed."""
    if importlib.util.find_spec("gemlite") is None:
        return
    core: Any = __import__("gemlite.core", fromlist=["core"])
    x = torch.randn(m, k, device="cuda").bfloat16()
    size = n * k // 2 + n * k // 128 * 4
    layers = []
    for _ in range(copies(size)):
        kind = core.DType.BF16
        layer = core.GemLiteLinear(4, 128, k, n, input_dtype=kind, output_dtype=kind)
        codes = torch.randint(0, 15, (n, k), dtype=torch.uint8, device="cuda")
        scales, zeros = (torch.rand(n, k // 128, device="cuda").bfloat16() for _ in range(2))
        layer.pack(codes, scales, zeros, None)
        layers.append(layer)
    yield "gemlite W4A16 g128", seconds([lambda layer=layer: layer(x) for layer in layers]), size


def mixture(label: str, m: int) -> Iterator[Row]:
    """Rows through the experts they choose: bfloat16 and 4 bits against torch._grouped_mm."""
    from effc.kernels.gpu.load import load
    from effc.kernels.grouped_linear.emit_triton import emit
    from effc.kernels.grouped_linear.spec_gpu import GroupedLinearSpec

    experts, active, d, f = MIXTURES[label]
    x = torch.randn(m, d, device="cuda").bfloat16()
    chosen = torch.stack([torch.randperm(experts, device="cuda")[:active] for _ in range(m)]).int()
    weights = torch.rand(m, active, device="cuda")
    used = len(chosen.unique())
    both = torch.randn(experts, 2 * f, d, device="cuda").bfloat16()
    down = torch.randn(experts, d, f, device="cuda").bfloat16()

    def theirs() -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        ends = (chosen.flatten()[None] <= torch.arange(experts, device="cuda")[:, None]).sum(1).int()
        gate, up = torch._grouped_mm(x[order // active], both.transpose(1, 2), offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        y = y * weights.flatten()[order, None]
        return torch.empty_like(y).index_copy_(0, order, y).view(m, active, d).sum(1).bfloat16()

    base = seconds([theirs] * 4)
    yield {
        "shape": label,
        "rows": m,
        "kernel": "torch._grouped_mm",
        "microseconds": round(base * 1e6, 1),
        "ratio": 1.0,
    }
    for b in (16, 4):
        spec = GroupedLinearSpec.model_validate(
            {"experts": experts, "active": active, "bits": b, "group": 0 if b == 16 else 128}
        )
        given: dict[str, Any] = {"up_words": both, "down_words": down}
        if spec.packed is not None:
            for name, n, k in (("up", 2 * f, d), ("down", d, f)):
                words = (experts, n, k // spec.packed.each)
                given[f"{name}_words"] = torch.randint(
                    -(2**31), 2**31 - 1, words, dtype=torch.int32, device="cuda"
                )
                given[f"{name}_scales"] = torch.rand(experts, k // 128, n, device="cuda").half() * 0.01
        module = load(emit(spec))
        taken = seconds([lambda module=module, given=given: module.launch(x, weights, chosen, **given)] * 4)
        share = spec.bytes(d, f, used) / taken / RATE
        yield {
            "shape": label, "rows": m, "kernel": f"effc {b} bits", "microseconds": round(taken * 1e6, 1),
            "ratio": round(base / taken, 2), "share": round(share, 2),
        }  # fmt: skip


def check() -> None:
    """Every kernel's cases on this GPU.

    Raises:
        SystemExit: a value is wrong.
    """
    from effc.kernels.byte_linear import gpu as of_bytes
    from effc.kernels.grouped_linear import gpu as of_experts
    from effc.kernels.quant_linear import gpu as of_bits
    from effc.kernels.sparse_linear import gpu as of_half

    some = (
        *((of_bits, {"bits": b, "group": 128, "symmetric": b == 8}) for b in (2, 3, 4, 8)),
        (of_bytes, {"bits": 4, "group": 128}), (of_bytes, {}), (of_bytes, {"kind": "float8"}), (of_half, {}),
        (of_experts, {"experts": 5, "active": 2}),
        (of_experts, {"experts": 5, "active": 2, "bits": 4, "group": 128}),
    )  # fmt: skip
    for op, fields in some:
        if words := wrong(op, op.parse(fields)):
            raise SystemExit(f"{op.__name__} {fields}: {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x14336", "8192x28672"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 32, 64, 128, 256])
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if not gpu():
        print("there is no GPU that CUDA knows; nothing is measured")
        return
    check()
    rows: list[Row] = []
    for shape in options.shapes:
        k, n = (int(number) for number in shape.split("x"))
        for m in options.rows:
            base = 0.0
            for make in (cublas, *(partial(ours, name, options.tune) for name in OURS), of_torch, gemlite):
                try:
                    found = list(make(m, n, k))
                except (
                    RuntimeError,
                    TypeError,
                    AttributeError,
                ) as error:  # a peer that this torch does not have
                    print(f"{shape}, {m} rows: {error}".splitlines()[0], file=sys.stderr)
                    continue
                for name, taken, size in found:
                    base = base or taken
                    row: Row = {
                        "shape": shape,
                        "rows": m,
                        "kernel": name,
                        "microseconds": round(taken * 1e6, 1),
                    }
                    row |= {"ratio": round(base / taken, 2), "share": round(size / taken / RATE, 2)}
                    if name.startswith("effc W4A16") and m in TARGETS:
                        row["due"] = f">= {TARGETS[m]}"
                    rows.append(row)
    for label in MIXTURES:
        for m in (1, 4, 16, 64):
            rows += mixture(label, m)
    report("gpu_linear", rows, ("shape", "rows", "kernel", "microseconds", "ratio", "share", "due"))


if __name__ == "__main__":
    main()
