"""Small Triton kernels, run by tests in a process of their own: `python small.py interpret` or `compile`."""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl

OPS = ("add", "subtract", "multiply", "divide", "larger", "less", "negative", "choose", "number", "whole")


@triton.jit
def elementwise(x, y, out, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    a = tl.load(x + i, mask=live, other=0.0)
    b = tl.load(y + i, mask=live, other=1.0)
    if OP == 0:
        c = a + b
    elif OP == 1:
        c = a - b
    elif OP == 2:
        c = a * b
    elif OP == 3:
        c = (a / b).to(tl.bfloat16)
    elif OP == 4:
        c = tl.maximum(a, b)
    elif OP == 5:
        c = (a < b).to(tl.bfloat16)
    elif OP == 6:
        c = -a
    elif OP == 7:
        c = tl.where(a > 0.5, a, b)
    elif OP == 8:
        c = a * 3.0 + 128.0
    else:
        c = (a * 100.0).to(tl.int32).to(tl.bfloat16)
    tl.store(out + i, c, mask=live)


@triton.jit
def product(x, y, out, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(out + i * N + j, tl.dot(tl.load(x + i * N + j), tl.load(y + i * N + j)))


@triton.jit
def careless(x, out, n, MASK: tl.constexpr, STEP: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    a = tl.load(x + i - BACK, mask=i < n)
    tl.store(out + i, a, mask=i < n + MASK)


@triton.jit
def neighbors(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + (i + BLOCK) % n)
    tl.store(x + i, a)


@triton.jit
def one_place(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, tl.load(x + i))


def torch_op(op: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    made = {
        0: lambda: a + b,
        1: lambda: a - b,
        2: lambda: a * b,
        3: lambda: (a.float() / b.float()).bfloat16(),
        4: lambda: torch.maximum(a, b),
        5: lambda: (a < b).bfloat16(),
        6: lambda: -a,
        7: lambda: torch.where(a > 0.5, a, b),
        8: lambda: a * 3.0 + 128.0,
        9: lambda: (a * 100.0).int().bfloat16(),
    }
    return made[op]()


def interpret() -> dict[str, object]:
    from effc.kernels.gpu.hopper import compiled
    from effc.kernels.gpu.interpret import _Builder, trusted

    before = dict(_Builder.__dict__)
    dice = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1000, generator=dice).bfloat16() for _ in range(2))
    found: dict[str, object] = {}
    with trusted():
        for op, name in enumerate(OPS):
            out = torch.full((1000,), torch.nan, dtype=torch.bfloat16)
            elementwise[(8,)](x, y, out, 1000, OP=op, BLOCK=128)
            found[name] = torch.equal(out, torch_op(op, x, y))
        square, other = x[:256].view(16, 16), y[:256].view(16, 16)
        out = torch.full((16, 16), torch.nan)
        product[(1,)](square, other, out, N=16)
        found["product"] = float((out - square.float() @ other.float()).abs().max())

        good = {"MASK": 0, "STEP": 128, "BACK": 0, "BLOCK": 128}
        whole = torch.zeros(2000, dtype=torch.bfloat16)
        runs = {
            "nothing wrong": lambda: careless[(8,)](x, whole, 1000, **good),
            "store past the end of a slice": lambda: careless[(8,)](
                x, whole[:1000], 1000, **good | {"MASK": 1}
            ),
            "load before the beginning": lambda: careless[(8,)](x, whole, 1000, **good | {"BACK": 1}),
            "two programs store": lambda: careless[(8,)](x, whole, 1000, **good | {"STEP": 127}),
            "one reads, one stores": lambda: neighbors[(8,)](whole[:1024], 1024, BLOCK=128),
            "two lanes store": lambda: one_place[(1,)](x, whole, BLOCK=16),
        }
        for name, run in runs.items():
            try:
                run()
                found[name] = ""
            except Exception as error:
                found[name] = str(error.__cause__)
        careless[(8,)](x, whole, 1000, **good | {"MASK": 1})
        found["undefined"] = bool(whole[1000].isnan())
    try:
        compiled(lambda: None)
    except RuntimeError as error:
        found["refusal"] = str(error)
    found["restored"] = dict(_Builder.__dict__) == before
    return found


@triton.jit
def long_product(x, y, out, K, N: tl.constexpr):
    i = tl.arange(0, N)
    acc = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N):
        a = tl.load(x + i[:, None] * K + k + i[None, :])
        b = tl.load(y + i[None, :] * K + k + i[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(out + i[:, None] * N + i[None, :], acc)


@triton.jit
def held(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i).to(tl.float32)
    tl.store(out + i, a * tl.sum(a))


def compile() -> dict[str, object]:
    from effc.kernels.gpu.hopper import compiled
    from effc.kernels.gpu.interpret import trusted
    from effc.kernels.gpu.resources import loop, resources

    x = torch.zeros(64, 256, dtype=torch.bfloat16)
    out = torch.full((64, 64), torch.nan)
    found: dict[str, object] = {"out": 0.0}
    kernels = compiled(
        lambda: (
            long_product[(1,)](x, x, out, 256, N=64, num_stages=3),
            long_product[(1,)](x, x, out, 250, N=64, num_stages=3),
            held[(1,)](x, out, BLOCK=8192, num_warps=1, maxnreg=32),
            held[(1,)](x, out, BLOCK=8192, num_warps=4),
        )
    )
    for name, kernel in zip(("plain", "odd", "squeezed", "fits"), kernels, strict=True):
        takes = resources(kernel)
        found[name] = takes.data() | {"wrong": takes.wrong(), "each": takes.each(64 * 64)}
    found["untouched"] = bool(out.isnan().all())
    found["loop"] = loop([(0, "MOV R1, R2"), (16, "IADD R1"), (32, "@P0 BRA 0x10"), (48, "BRA 0x30")])
    try:
        with trusted():
            pass
    except RuntimeError as error:
        found["refusal"] = str(error)
    return found


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile}[sys.argv[1]]()))
