"""dense_linear in C: near the sum in double precision, and a row's bits depend on that row and W alone."""

from __future__ import annotations

import time
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from effc.kernels.cpu.isa import available
from effc.kernels.cpu.stored import DTYPES
from effc.kernels.dense_linear import panels_c
from effc.kernels.dense_linear.call import dense_linear
from effc.kernels.dense_linear.emit_c import MANY
from effc.kernels.dense_linear.reference import reference
from effc.kernels.dense_linear.spec import DenseLinearSpec

SPECS = [
    DenseLinearSpec(),
    DenseLinearSpec(weight="bfloat16", epilogue=("bias", "gelu_tanh", "residual")),
    DenseLinearSpec(weight="float16", paired=True, epilogue=("silu", "row_scale", "mul")),
]


def inputs(
    spec: DenseLinearSpec, m: int, n: int, k: int
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    dice = torch.Generator().manual_seed(1000 * m + n)
    x = torch.randn(m, k, generator=dice)
    w, w2 = (torch.randn(n, k, generator=dice).div(k**0.5).to(DTYPES[spec.weight]) for _ in range(2))
    shapes = {"bias": (n,), "residual": (m, n), "gate": (m, n), "row_scale": (m,)}
    given = {name: torch.randn(shape, generator=dice) for name, shape in shapes.items()}
    return x, w, w2 if spec.paired else None, given


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.weight)
def test_equals_the_reference_on_every_set_and_number_of_threads(spec: DenseLinearSpec) -> None:
    for m, n, k in ((1, 48, 128), (2, 37, 100), (5, 3, 33), (13, 70, 64), (6, 16, 7)):
        x, w, w2, given = inputs(spec, m, n, k)
        wide = None if w2 is None else w2.double()
        # the registry's steps keep to float32 operands; the sums of the reference are in double precision
        due = reference(spec, x.double(), w.double(), wide, given)
        for isa in available():
            one, two = (dense_linear(spec, isa, x, w, w2, given, threads) for threads in (1, 2))
            assert float((one - due).abs().max()) <= 2e-6 * max(1.0, float(due.abs().max())), (isa, m, n, k)
            assert torch.equal(one, two), isa


def test_a_row_does_not_depend_on_the_others_and_nan_stays_in_its_row() -> None:
    for m in (2, 3, 4, 5, 7, 14):
        x, w, _, _ = inputs(SPECS[0], m, 40, 90)
        for isa in available():
            alone = torch.cat([dense_linear(SPECS[0], isa, row[None], w, None, {}, 1) for row in x])
            spoiled = x.clone()
            spoiled[m // 2, 89] = float("nan")
            together = dense_linear(SPECS[0], isa, spoiled, w, None, {}, 2)
            keep = [i for i in range(m) if i != m // 2]
            assert torch.equal(alone[keep], together[keep]), (isa, m)
            assert bool(together[m // 2].isnan().all())


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.weight)
def test_panels_give_the_bits_of_single_rows(spec: DenseLinearSpec) -> None:
    """Rows from which panels are laid out, a few more than whole tiles; one chunk of columns and two."""
    for m, n, k in ((MANY, 70, 100), (MANY + 5, 33, panels_c.CHUNK + 77), (panels_c.ROWS + 7, 16, 7)):
        x, w, w2, given = inputs(spec, m, n, k)
        for isa in available():
            together = dense_linear(spec, isa, x, w, w2, given, 2)
            rows = range(0, m, 3)
            some = [{key: t[i : i + 1] if len(t) == m else t for key, t in given.items()} for i in rows]
            alone = [
                dense_linear(spec, isa, x[i : i + 1], w, w2, one, 1)
                for i, one in zip(rows, some, strict=True)
            ]
            assert torch.equal(torch.cat(alone), together[::3]), (isa, m, n, k)


def test_whole_numbers_give_exact_sums() -> None:
    """Every partial sum is a whole number that float32 holds, so that one wrong lane would show."""
    dice = torch.Generator().manual_seed(2)
    x, w = (torch.randint(-9, 10, shape, generator=dice).float() for shape in ((9, 211), (51, 211)))
    for isa in available():
        assert torch.equal(
            dense_linear(SPECS[0], isa, x, w, None, {}, 2), (x.double() @ w.double().T).float()
        )


@pytest.mark.claim
@pytest.mark.parametrize("weight", ["float32", "bfloat16"])
def test_one_row_takes_no_longer_than_torch(weight: Literal["float32", "bfloat16"]) -> None:
    """One thread, 24 matrices in turn, the least processor time of 60 calls; both are bound by memory."""
    spec, isa, n = DenseLinearSpec(weight=weight), available()[0], 2048
    matrices = [torch.randn(n, n).to(DTYPES[weight]) for _ in range(24)]
    x = torch.randn(1, n)
    put = x.to(DTYPES[weight])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, theirs = [], []
    for i in range(60):
        start = time.thread_time()
        dense_linear(spec, isa, x, matrices[i % 24], None, {}, 1)
        middle = time.thread_time()
        torch.nn.functional.linear(put, matrices[(i + 12) % 24])
        ours.append(middle - start)
        theirs.append(time.thread_time() - middle)
    torch.set_num_threads(before)
    assert min(theirs) / min(ours) > 0.9


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="no epilogue is called swish"):
        DenseLinearSpec(epilogue=("swish",))
    with pytest.raises(ValidationError, match="begins its epilogue with the activation"):
        DenseLinearSpec(paired=True, epilogue=("bias",))
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="contiguous tensors"):
        dense_linear(SPECS[0], available()[0], x, torch.zeros(8, 4).T, None, {}, 1)
