"""Advantages of answers within their group: mean first, then deviations.

Grid (blocks of groups,). A program holds BLOCK_G groups and reads them BLOCK_N rewards at a
time, three times: sum, squares, result. Sums are doubles, so equal rewards deviate by zero.
"""

import triton
import triton.language as tl

# of csrc/grouped.h, those that differ from the rest
LEAVE_ONE_OUT, NO_BASELINE = tl.constexpr(1), tl.constexpr(2)
STD, BATCH = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _counted(
    rewards, mask, start, size, first, HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rewards of a block, where they lie, which belong to a group, and which count."""
    i = first + tl.arange(0, BLOCK_N)[None, :]
    inside = i < size[:, None]
    at = start[:, None] + i
    counts = inside
    if HAS_MASK:
        counts = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    x = tl.load(rewards + at, mask=counts, other=0.0).to(tl.float64)
    return x, at, inside, counts


@triton.jit
def _grouped_fwd(
    rewards, mask, offsets, batch_std, advantages, group_size, G, eps,
    BASELINE: tl.constexpr, SCALE: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    real = g < G
    if HAS_OFFSETS:
        start = tl.load(offsets + g, mask=real, other=0)
        size = tl.load(offsets + g + 1, mask=real, other=0) - start
    else:
        start = g.to(tl.int64) * group_size
        size = tl.where(real, group_size, 0).to(tl.int64)
    longest = tl.max(size, 0)
    total = tl.zeros((BLOCK_G,), tl.float64)
    count = tl.zeros((BLOCK_G,), tl.float64)
    for first in range(0, longest, BLOCK_N):
        x, _, _, counts = _counted(rewards, mask, start, size, first, HAS_MASK, BLOCK_N)
        total += tl.sum(x, 1)
        count += tl.sum(counts.to(tl.float64), 1)
    mean = total / tl.maximum(count, 1.0)
    others = tl.maximum(count - 1.0, 1.0)
    divisor = tl.zeros((BLOCK_G,), tl.float64) + 1.0
    if SCALE == STD:
        squares = tl.zeros((BLOCK_G,), tl.float64)
        for first in range(0, longest, BLOCK_N):
            x, _, _, counts = _counted(rewards, mask, start, size, first, HAS_MASK, BLOCK_N)
            d = tl.where(counts, x - mean[:, None], 0.0)
            squares += tl.sum(d * d, 1)
        divisor = tl.sqrt(squares / others) + eps
    if SCALE == BATCH:
        divisor = tl.zeros((BLOCK_G,), tl.float64) + tl.load(batch_std) + eps
    divisor = tl.where(divisor == 0.0, 1.0, divisor)  # zeros stay zeros
    origin, slope = mean, 1.0 / divisor
    if BASELINE == LEAVE_ONE_OUT:
        slope = slope * count / others
    if BASELINE == NO_BASELINE:
        origin = mean * 0.0
    if BASELINE != NO_BASELINE or SCALE == STD:
        slope = tl.where(count > 1.0, slope, 0.0)
    for first in range(0, longest, BLOCK_N):
        x, at, inside, counts = _counted(rewards, mask, start, size, first, HAS_MASK, BLOCK_N)
        a = tl.where(counts, (x - origin[:, None]) * slope[:, None], 0.0)
        tl.store(advantages + at, a.to(tl.float32), mask=inside)


def grouped_advantage(
    rewards, mask, offsets, group_size, baseline, scale, batch_std, eps, advantages, G
):
    """Fill `advantages`, (N,). `baseline` and `scale` are the numbers of csrc/grouped.h."""
    if G == 0:
        return
    block_n = 64 if offsets is not None else min(64, triton.next_power_of_2(group_size))
    block_g = max(1, 256 // block_n)
    _grouped_fwd[(triton.cdiv(G, block_g),)](
        rewards, mask, offsets, batch_std, advantages, group_size, G, eps,
        BASELINE=baseline, SCALE=scale, HAS_OFFSETS=offsets is not None,
        HAS_MASK=mask is not None, BLOCK_G=block_g, BLOCK_N=block_n,
    )  # fmt: skip
