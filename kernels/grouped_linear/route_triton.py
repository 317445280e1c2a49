"""Routing in Triton: the best experts of each row, slots in the order of experts, tiles to find by place."""

from __future__ import annotations

ROUTE = '''@triton.jit
def choose_kernel(scores, weights, chosen, EXPERTS: tl.constexpr, POWER: tl.constexpr, ACTIVE: tl.constexpr,
                  SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr):
    row = tl.program_id(0)
    e, slot = tl.arange(0, POWER), tl.arange(0, SLOTS)
    s = tl.load(scores + row * EXPERTS + e, mask=e < EXPERTS, other=-float("inf")).to(tl.float32)
    p = tl.exp2((s - tl.max(s, 0)) * 1.4426950408889634)
    p = p / tl.sum(p, 0)
    kept = tl.zeros((SLOTS,), tl.float32)
    taken = tl.zeros((SLOTS,), tl.int32)
    for j in tl.static_range(ACTIVE):
        best = tl.max(p, 0)
        at = tl.min(tl.where(p == best, e, POWER), 0)  # of equal ones the lower number
        kept = tl.where(slot == j, best, kept)
        taken = tl.where(slot == j, at, taken)
        p = tl.where(e == at, -1.0, p)
    if RENORMALIZE:
        kept = kept / tl.sum(kept, 0)
    to = row * ACTIVE + slot
    tl.store(weights + to, kept.to(weights.dtype.element_ty), mask=slot < ACTIVE)
    tl.store(chosen + to, taken, mask=slot < ACTIVE)


def choose(scores, weights, chosen, renormalize=RENORMALIZE):
    """scores [M, E] -> weights [M, k] and chosen [M, k] int32, which are written"""
    choose_kernel[(scores.shape[0],)](
        scores, weights, chosen, EXPERTS=EXPERTS, POWER=POWER, ACTIVE=ACTIVE,
        SLOTS=triton.next_power_of_2(ACTIVE), RENORMALIZE=renormalize, num_warps=1,
    )


@triton.jit
def sort_kernel(chosen, order, first, S, blocks, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """by counting: a slot's place is the number of slots that come before it"""
    block = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    if block < blocks:
        i = block * BLOCK + j
        mine = tl.load(chosen + i, mask=i < S, other=EXPERTS + 1)
        place = tl.zeros((BLOCK,), tl.int32)
        for j0 in range(0, S, BLOCK):
            other = tl.load(chosen + j0 + j, mask=j0 + j < S, other=EXPERTS + 1)
            equal = (other[None, :] == mine[:, None]) & ((j0 + j)[None, :] < i[:, None])
            place += tl.sum(((other[None, :] < mine[:, None]) | equal).to(tl.int32), 1)
        tl.store(order + place, i, mask=i < S)
    else:
        e = (block - blocks) * BLOCK + j
        before = tl.zeros((BLOCK,), tl.int32)
        for j0 in range(0, S, BLOCK):
            other = tl.load(chosen + j0 + j, mask=j0 + j < S, other=EXPERTS + 1)
            before += tl.sum((other[None, :] < e[:, None]).to(tl.int32), 1)
        tl.store(first + e, before, mask=e <= EXPERTS)


def sort(chosen, order, first):
    """chosen [M, k] -> order [S] and first [E + 1] int32, which are written"""
    S = chosen.numel()
    block = min(64, max(16, triton.next_power_of_2(S)))
    blocks = triton.cdiv(S, block)
    sort_kernel[(blocks + triton.cdiv(EXPERTS + 1, block),)](
        chosen, order, first, S, blocks, EXPERTS=EXPERTS, BLOCK=block, num_warps=4
    )


@triton.jit
def find(first, tile, BM: tl.constexpr, POWER: tl.constexpr, EXPERTS: tl.constexpr):
    """expert, first place and rows of a tile; no rows behind the last"""
    e = tl.arange(0, POWER)
    begin = tl.load(first + e, mask=e < EXPERTS, other=0)
    end = tl.load(first + e + 1, mask=e < EXPERTS, other=0)
    each = (end - begin + BM - 1) // BM
    last = tl.cumsum(each, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    at = begin + (tile - (last - each)) * BM
    count = tl.sum(tl.where(e == expert, tl.minimum(end - at, BM), 0), 0)
    return expert, tl.sum(tl.where(e == expert, at, 0), 0), count


@triton.jit
def spread(program, tiles, columns, GROUP: tl.constexpr):
    """tile and column of a program: GROUP tiles together go over the columns; both stay in the cache"""
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % size, inside // size
'''
