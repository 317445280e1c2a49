"""cached_attention in C: torch in float64, the same bits for any sharing of rows among calls and threads."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from effc.kernels.cached_attention.call import cached_attention
from effc.kernels.cached_attention.layout import empty, plain
from effc.kernels.cached_attention.reference import attend, write
from effc.kernels.cached_attention.spec import CachedAttentionSpec, refuses
from effc.kernels.cpu.isa import available

ROOM = 192
SPECS = {
    "plain": CachedAttentionSpec(heads=3, kv_heads=3, head_dim=64, scale=0.125),
    "turned": CachedAttentionSpec(heads=4, kv_heads=2, head_dim=12, scale=0.3, rotated=4),
    "all": CachedAttentionSpec(
        heads=4,
        kv_heads=1,
        head_dim=80,
        scale=0.2,
        cap=5.0,
        rotated=32,
        norm=1e-6,
        norm_offset=1.0,
        window=16,
    ),
    "ring": CachedAttentionSpec(
        heads=2, kv_heads=1, head_dim=32, scale=0.2, rotated=32, window=40, ring=30, cell="bfloat16"
    ),
    "one": CachedAttentionSpec(heads=2, kv_heads=2, head_dim=16, scale=0.25, norm=1e-5, window=1),
}
each = pytest.mark.parametrize("name", list(SPECS))


class Case:
    """Sequences that grow in one cache, in C and, in float64, by the definition."""

    def __init__(self, spec: CachedAttentionSpec, seed: int = 0, slots: int = 3) -> None:
        self.spec, self.dice = spec, torch.Generator().manual_seed(seed)
        self.cache = empty(spec, slots, spec.keys(ROOM))
        self.cache.keys.fill_(float("nan"))  # what is not written must not be read
        self.cache.values.fill_(float("nan"))
        self.due = [t.double().contiguous() for t in plain(spec, self.cache)]
        self.given: dict[str, Tensor] = {}
        if spec.norm:
            self.given |= {name: self.draw(spec.head_dim) for name in ("q_gain", "k_gain")}
        if spec.rotated:
            angles = self.draw(ROOM, spec.rotated // 2) * 3
            self.given |= {"cosines": angles.cos(), "sines": angles.sin()}

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.dice)

    def rows(self, m: int) -> list[Tensor]:
        """q, k and v as slices of one fused row."""
        h = self.spec.head_dim
        sizes = [self.spec.heads * h, self.spec.kv_heads * h, self.spec.kv_heads * h]
        return list(self.draw(m, sum(sizes)).split(sizes, 1))

    def run(
        self, rows: list[Tensor], slot: Tensor, position: Tensor, isa: int = 0, threads: int = 1
    ) -> Tensor:
        return cached_attention(
            self.spec, available()[isa], *rows, slot, position, self.cache, self.given, threads
        )

    def expected(self, rows: list[Tensor], slot: Tensor, position: Tensor) -> Tensor:
        wide = [t.double() for t in rows]
        queries = write(self.spec, *wide, slot, position, *self.due, self.given)
        return attend(self.spec, queries, slot, position, *self.due)


def calls(spec: CachedAttentionSpec) -> list[tuple[Tensor, Tensor]]:
    """slot and position of each call: prompts of unequal lengths, single tokens, a mixture of both."""
    first = spec.ring or 70
    plans = [
        [(0, range(first)), (2, range(5))],
        [(1, range(1)), (2, range(5, 6)), (0, range(first, first + 3))],
        *([(0, range(first + 3 + i, first + 4 + i)), (1, range(1 + i, 2 + i))] for i in range(2)),
        # positions that go on from one sequence to another
        [(1, range(3, 6)), (2, range(6, 9)), (1, range(6, 20)), (0, range(first + 5, first + 5 + 29))],
    ]
    return [
        (torch.tensor([s for s, r in plan for _ in r]), torch.tensor([p for _, r in plan for p in r]))
        for plan in plans
    ]


@each
def test_equals_the_definition_on_every_set_and_number_of_threads(name: str) -> None:
    spec = SPECS[name]
    runs = list(itertools.product(range(len(available())), (1, 2)))
    cases = [Case(spec) for _ in runs]
    backwards = torch.zeros(4, dtype=torch.long), torch.tensor([3, 2, 1, 0])  # rows that do not go together
    for slot, position in [*calls(spec), backwards]:
        rows = cases[0].rows(len(slot))
        due = cases[0].expected(rows, slot, position)
        found = [case.run(rows, slot, position, *run) for case, run in zip(cases, runs, strict=True)]
        for y, run in zip(found, runs, strict=True):
            # a key just between two bfloat16 may be rounded the other way
            off = 2e-3 if spec.cell == "bfloat16" else 3e-6
            assert float((y - due).abs().max()) <= off * float(due.abs().max()), run
        for one, two in zip(found[::2], found[1::2], strict=True):
            assert torch.equal(one, two)


@each
def test_a_prompt_in_one_call_is_its_tokens_one_by_one_to_the_bit(name: str) -> None:
    spec = SPECS[name]
    whole, single = Case(spec), Case(spec)
    for slot, position in calls(spec):
        rows = whole.rows(len(slot))
        y = whole.run(rows, slot, position, threads=2)
        for m in range(len(slot)):
            alone = single.run([t[m : m + 1] for t in rows], slot[m : m + 1], position[m : m + 1])
            assert torch.equal(alone[0], y[m]), (m, int(position[m]))


def test_the_definition_is_what_torch_computes_on_a_whole_sequence() -> None:
    spec = CachedAttentionSpec(heads=6, kv_heads=2, head_dim=8, scale=8**-0.5, window=9)
    case = Case(spec)
    t = 30
    q, k, v = case.rows(t)
    y = case.expected([q, k, v], torch.zeros(t, dtype=torch.long), torch.arange(t))
    heads = [x.double().view(t, -1, 8).transpose(0, 1) for x in (q, k, v)]
    seen = torch.ones(t, t, dtype=torch.bool).tril().triu(-8)
    due = F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
    assert torch.allclose(y, due.transpose(0, 1).reshape(t, -1), atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_stays_with_those_who_see_it(bad: float) -> None:
    """Row 20 of sequence 0 is spoilt: not its past, not the other sequence, though they share one call."""
    spec = SPECS["plain"]
    clean, dirty = Case(spec), Case(spec)
    slot = torch.tensor([0] * 40 + [1] * 9)
    position = torch.cat((torch.arange(40), torch.arange(9)))
    rows = clean.rows(49)
    good = clean.run(rows, slot, position)
    spoilt = [t.clone() for t in rows]
    for t in spoilt:
        t[20] = bad
    for isa in range(len(available())):
        found = dirty.run(spoilt, slot, position, isa, 2)
        due = Case(spec).expected(spoilt, slot, position)
        assert torch.equal(found.isnan(), due.isnan())
        assert bool(found[20].isnan().all())
    kept = [m for m in range(49) if not 20 <= m < 40]
    found = dirty.run(spoilt, slot, position)
    assert torch.equal(found[kept], good[kept])


def test_scores_of_minus_infinity_weigh_nothing() -> None:
    """A whole step of keys that count for nothing, before any that does."""
    spec = CachedAttentionSpec(heads=1, kv_heads=1, head_dim=16, scale=1.0)
    t = 100
    q, k, v = torch.ones(t, 16), torch.zeros(t, 16), torch.randn(t, 16)
    k[:70, 3] = -float("inf")
    slot, position = torch.zeros(t, dtype=torch.long), torch.arange(t)
    for isa in available():
        y = cached_attention(spec, isa, q, k, v, slot, position, empty(spec, 1, 128), {}, 1)
        assert bool(y[:70].isnan().all())  # nothing to weigh, as torch says too
        assert torch.allclose(y[99], v[70:].mean(0), atol=1e-6)


def test_large_scores_of_both_signs() -> None:
    spec = CachedAttentionSpec(heads=2, kv_heads=1, head_dim=16, scale=30.0)
    case = Case(spec)
    slot, position = torch.zeros(150, dtype=torch.long), torch.arange(150)
    rows = case.rows(150)
    due = case.expected(rows, slot, position)
    for isa in range(len(available())):
        assert torch.allclose(case.run(rows, slot, position, isa).double(), due, atol=3e-4)


def test_a_ring_serves_positions_up_to_two_to_the_31() -> None:
    """Memory is that of the window; tables are indexed by `turn` where positions outgrow them."""
    spec = SPECS["ring"]
    assert spec.keys(2**31) == 128
    for start in (0, 2**31 - 200):
        case = Case(spec, slots=1)
        case.given["turn"] = torch.arange(20)
        slot = torch.zeros(20, dtype=torch.long)
        for at in range(start, start + 180, 20):
            rows, position = case.rows(20), torch.arange(at, at + 20)
            y, due = case.run(rows, slot, position), case.expected(rows, slot, position)
            if at >= start + 40:  # the window is full of what was written
                assert float((y - due).abs().max()) <= 2e-3 * float(due.abs().max())


def test_the_cache_holds_bfloat16_to_nearest_even() -> None:
    spec = CachedAttentionSpec(heads=1, kv_heads=1, head_dim=20, scale=1.0, cell="bfloat16")
    k, v = torch.randn(64, 20), torch.randn(64, 20)
    k[3, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("nan")])
    cache = empty(spec, 1, 64)
    for isa in available():
        cached_attention(
            spec, isa, k, k, v, torch.zeros(64, dtype=torch.long), torch.arange(64), cache, {}, 1
        )
        keys, values = plain(spec, cache)
        assert torch.equal(keys[0, 0].nan_to_num(7.0), k.bfloat16().nan_to_num(7.0))
        assert torch.equal(values[0, 0], v.bfloat16())
    assert sum(t.numel() * t.element_size() for t in cache) == spec.bytes(1, 64)


def test_what_cannot_be_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match="3 query heads do not divide over 2"):
        CachedAttentionSpec(heads=3, kv_heads=2, head_dim=8, scale=1.0)
    with pytest.raises(ValidationError, match="cannot turn in halves"):
        CachedAttentionSpec(heads=2, kv_heads=2, head_dim=8, scale=1.0, rotated=10)
    with pytest.raises(ValidationError, match="a ring keeps a window"):
        CachedAttentionSpec(heads=2, kv_heads=2, head_dim=8, scale=1.0, ring=4)
    seen = CachedAttentionSpec(heads=2, kv_heads=2, head_dim=8, scale=1.0, causal=False)
    assert "sees later ones" in str(refuses(seen))
    assert "multiple of 4" in str(refuses(seen.model_copy(update={"causal": True, "head_dim": 6})))
    assert refuses(SPECS["all"]) is None
    case, one = Case(SPECS["ring"]), torch.ones(1, dtype=torch.long)
    with pytest.raises(ValueError, match="outside the cache's 3"):
        case.run(case.rows(1), 3 * one, one)
    with pytest.raises(ValueError, match="outside the tables"):
        case.run(case.rows(1), one, 500 * one)
    case.given["turn"] = torch.zeros(31, dtype=torch.long)
    with pytest.raises(ValueError, match="31 tokens of one sequence"):
        case.run(case.rows(31), torch.zeros(31, dtype=torch.long), torch.arange(120, 151))
    whole = Case(SPECS["plain"])
    with pytest.raises(ValueError, match="outside a cache of 192 keys"):
        whole.run(whole.rows(1), one, 192 * one)
