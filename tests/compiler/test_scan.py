"""The gated linear recurrence: its three forms agree, also where gates forget all or nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effc.compiler.scan import Over, chunked, parallel, recurrent, scan

FORMS = {"parallel": parallel, "chunked": chunked}
GATES = {
    "mild": lambda x: torch.nn.functional.logsigmoid(x) / 16,
    "strong": lambda x: -80 * x.abs(),
    "uneven": lambda x: torch.where(x > 1, -3e4 * x, -0.01 * x.abs()),
    "none": torch.zeros_like,
    "resets": lambda x: torch.where(x > 0.8, -torch.inf, -0.1 * x.abs()),
}


def case(
    length: int,
    gates: str = "mild",
    over: Over = "key",
    wide: bool = True,
    heads: int = 4,
    dtype: torch.dtype = torch.float64,
    past: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, g and a state of 2 rows, 2 key heads, 6 keys and 5 values."""
    dice = torch.Generator().manual_seed(length)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    channels = {"key": 6, "value": 5}[over] if wide else 1
    q, k, v = drawn(2, heads, length, 6), drawn(2, 2, length, 6), drawn(2, 2, length, 5)
    g, state = GATES[gates](drawn(2, 2, length, channels)), drawn(2, 2, 6, 5)
    q, k, v, g, state = (t.to(dtype) for t in (q, k, v, g, state))
    return q, k, v, g, state if past else None


@pytest.mark.parametrize("over", ["key", "value"])
@pytest.mark.parametrize("wide", [True, False], ids=["vector", "scalar"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [7, 100])
def test_forms_agree(length: int, form: str, gates: str, wide: bool, over: Over) -> None:
    more = {"chunk": 16, "sub": 4} if form == "chunked" else {}
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        given = case(length, gates, over, wide, dtype=dtype)
        want, after = recurrent(*given, over=over)
        got, state = FORMS[form](*given, over=over, **more)  # type: ignore[operator]
        for left, right in ((got, want), (state, after)):
            assert float((left - right).abs().max() / right.abs().max()) < near


def test_the_recurrence_is_its_definition() -> None:
    q, k, v, g, state = case(3, past=True)
    assert state is not None
    y, _ = recurrent(q, k, v, g, state)
    s = state[1, 1]
    for t in range(3):
        s = torch.diag(g[1, 1, t].exp()) @ s + torch.outer(k[1, 1, t], v[1, 1, t])
    torch.testing.assert_close(y[1, 3, 2], q[1, 3, 2] @ s)  # heads 2 and 3 share the second key head


def test_a_gate_that_forgets_all_starts_anew() -> None:
    q, k, v, g, state = case(40)
    g[:, :, 21] = -torch.inf
    y, after = chunked(q, k, v, g, state, chunk=16, sub=4)
    late, alone = chunked(*(t[:, :, 21:] for t in (q, k, v, g)), chunk=16, sub=4)
    torch.testing.assert_close(y[:, :, 21:], late)
    torch.testing.assert_close(after, alone)


@pytest.mark.parametrize("over", ["key", "value"])
def test_pieces_with_the_state_between_them_are_the_whole(over: Over) -> None:
    q, k, v, g, _ = case(90, over=over)
    whole, after = scan(q, k, v, g, over=over, scale=0.5)
    state, parts = None, []
    for start, end in ((0, 33), (33, 34), (34, 90)):
        y, state = scan(*(t[:, :, start:end] for t in (q, k, v, g)), state, over=over, scale=0.5)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state, after)


@pytest.mark.parametrize("over", ["key", "value"])
@pytest.mark.parametrize("wide", [True, False], ids=["vector", "scalar"])
def test_gradients_of_the_chunk_form_are_those_of_finite_differences(over: Over, wide: bool) -> None:
    given = [t[:1] for t in case(9, over=over, wide=wide, heads=2) if t is not None]
    for tensor in given:
        tensor.requires_grad_()

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(*given, over=over, chunk=4, sub=2)

    assert torch.autograd.gradcheck(run, given)


def test_the_gradient_of_gates_needs_no_state() -> None:
    """dg_t = sum over later tokens of q dq - k dk: what a backward kernel may use."""
    q, k, v, g, _ = case(50, heads=2)
    for tensor in (q, k, v, g):
        tensor.requires_grad_()
    y, _ = chunked(q, k, v, g, chunk=16, sub=4)
    y.square().sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    terms = (q * q.grad - k * k.grad).detach()
    torch.testing.assert_close(g.grad, terms.flip(-2).cumsum(-2).flip(-2))


def test_gradients_stay_finite_where_gates_forget_all() -> None:
    q, k, v, g, _ = case(40, "resets", dtype=torch.float32)
    logits = torch.zeros_like(g).requires_grad_()
    k.requires_grad_()
    y, state = chunked(q, k, v, g - logits.exp(), chunk=16, sub=4)
    (y.sum() + state.sum()).backward()
    assert bool(logits.grad is not None and logits.grad.isfinite().all())
    assert bool(k.grad is not None and k.grad.isfinite().all())


def test_half_precision_is_computed_in_single() -> None:
    q, k, v, g, _ = case(40, "strong", dtype=torch.bfloat16)
    y, state = scan(q, k, v, g)
    want, _ = scan(q.float(), k.float(), v.float(), g.float())
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, want.bfloat16())


def test_a_chunk_is_made_of_whole_sub_blocks() -> None:
    with pytest.raises(ValueError, match="chunk is a multiple of sub, not 20 of 16"):
        scan(*case(8)[:4], chunk=20)
