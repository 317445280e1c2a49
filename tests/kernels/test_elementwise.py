"""elementwise in C, and the C form of every epilogue, against torch in double precision."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from effc.compiler.blocks.mlp import ACTIVATIONS as MODEL_ACTIVATIONS
from effc.kernels import elementwise as module
from effc.kernels.cpu.build import build, load
from effc.kernels.cpu.check import wrong
from effc.kernels.cpu.isa import available
from effc.kernels.cpu.vectors import VECTORS
from effc.kernels.elementwise import ElementwiseSpec, elementwise, reference
from effc.kernels.epilogue import ACTIVATIONS, EPILOGUES

M, N = 3, 100
SHAPES = {"N": (N,), "M": (M,), "MN": (M, N)}


def numbers() -> Tensor:
    """[M, N] float32: the whole range in which activations bend, both far ends, both zeros."""
    x = torch.linspace(-30, 30, M * N).view(M, N)[:, torch.randperm(N)].contiguous()
    x[1, :7] = torch.tensor([0.0, -0.0, 1e-20, -1e4, 1e4, 3e-3, -3e-3])
    return x


def every_epilogue() -> str:
    """One C file with a function for each entry of the registry: y = step(x), rows of N columns."""
    text = [VECTORS]
    for name, step in EPILOGUES.items():
        operand = f"const float *{step.operand}" if step.operand else "const float *none"
        text.append(f"""
void step_{name}(const float *x, {operand}, float *y, long M, long N) {{
  for (long m = 0; m < M; m++)
    for (long n = 0; n < N; n += 16) {{
      const long count = N - n;
      f32x16 a = take(x + m * N + n, count);
      a = {step.c};
      give(y + m * N + n, a, count);
    }}
}}""")
    return "\n".join(text)


def test_every_epilogue_in_c_is_its_definition() -> None:
    x = numbers()
    spoiled = x.clone()
    spoiled[2, 5] = float("nan")
    for isa in available():
        library = load(build(every_epilogue(), isa))
        for name, step in EPILOGUES.items():
            given = torch.randn(SHAPES[step.shape]) if step.operand else torch.zeros(1)
            entry = getattr(library, f"step_{name}")
            for put in (x, spoiled):
                due = step.torch(put.double(), given.double()) if step.operand else step.torch(put.double())
                y = torch.empty(M, N)
                entry(
                    *(ctypes.c_void_p(t.data_ptr()) for t in (put, given, y)),
                    ctypes.c_long(M), ctypes.c_long(N),
                )  # fmt: skip
                torch.testing.assert_close(
                    y.double(), due.double(), rtol=2e-6, atol=4e-7, equal_nan=True, msg=f"{name} {isa}"
                )


def test_models_have_no_activation_that_kernels_lack() -> None:
    assert frozenset(MODEL_ACTIVATIONS) == ACTIVATIONS
    x = numbers().double()
    for name, definition in MODEL_ACTIVATIONS.items():
        assert torch.equal(EPILOGUES[name].torch(x), definition(x)), name


@pytest.mark.parametrize(
    "spec",
    [ElementwiseSpec(form="add"), ElementwiseSpec(form="softcap", factor=30.0)],
    ids=lambda s: s.form,
)
def test_equals_the_reference_on_every_set_and_number_of_threads(spec: ElementwiseSpec) -> None:
    x, z = numbers() * 5, torch.randn(M, N)
    due = reference(spec, x.double(), z.double())
    for isa in available():
        one, two = (elementwise(spec, isa, x, z, threads) for threads in (1, 2))
        torch.testing.assert_close(one.double(), due, rtol=1e-6, atol=1e-6)
        assert torch.equal(one, two), isa


def test_scale_product_and_activation_on_the_fastest_set() -> None:
    x, z = numbers(), torch.randn(M, N)
    for spec in (
        ElementwiseSpec(form="scale", factor=0.125),
        ElementwiseSpec(form="mul"),
        ElementwiseSpec(form="relu2"),
    ):
        assert torch.equal(elementwise(spec, available()[0], x, z, 2), reference(spec, x, z)), spec.form


def test_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="two tensors of one shape"):
        elementwise(ElementwiseSpec(form="add"), available()[0], torch.zeros(4), torch.zeros(5), 1)


@pytest.mark.parametrize("each", [0, 3, 16, 40])
def test_numbers_of_the_second_tensor_may_be_shared(each: int) -> None:
    for form in ("mul", "add"):
        spec = ElementwiseSpec.model_validate({"form": form, "each": each})
        found = {isa: wrong(module, spec, None, isa) for isa in available()}
        assert found == dict.fromkeys(found, "")
    with pytest.raises(ValueError, match="silu has one operand"):
        ElementwiseSpec(form="silu", each=2)


def test_a_sigmoid_is_its_definition() -> None:
    assert wrong(module, ElementwiseSpec(form="sigmoid"), None, available()[0]) == ""
