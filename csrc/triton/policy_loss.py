"""PPO's clipped surrogate with a KL penalty, its gradient, and what is logged of it.

Grid (B, blocks of T). A program adds up its steps; the caller adds up the programs.
"""

import triton
import triton.language as tl

SUMS = 6  # loss, clipped below, clipped above, kl, old - new, steps
K1, K2 = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _policy_loss_fwd(
    logps, old_logps, advantages, mask, ref_logps, weights, sums, grad, T, eps_low, eps_high,
    beta, KL: tl.constexpr, PER_ROW: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_GRAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    at = row * T + t
    real = t < T
    counts = real
    if HAS_MASK:
        counts = real & (tl.load(mask + at, mask=real, other=0) != 0)
    new = tl.load(logps + at, mask=counts, other=0.0)
    log_ratio = new - tl.load(old_logps + at, mask=counts, other=0.0)
    if PER_ROW:
        a = tl.where(counts, tl.load(advantages + row), 0.0)
    else:
        a = tl.load(advantages + at, mask=counts, other=0.0)
    ratio = tl.exp(log_ratio)
    within = tl.minimum(tl.maximum(ratio, 1.0 - eps_low), 1.0 + eps_high)
    free, held = -a * ratio, -a * within
    loss = tl.where(free < held, held, free)
    slope = tl.where(free < held, 0.0, free)
    kl = tl.zeros((BLOCK_T,), tl.float32)
    if HAS_REF:
        d = tl.load(ref_logps + at, mask=counts, other=0.0) - new
        if KL == K1:
            kl, kl_slope = -d, d * 0.0 + 1.0
        elif KL == K2:
            kl, kl_slope = 0.5 * d * d, -d
        else:
            # e^d - d - 1 of a small d is lost between numbers of size 1
            near = d * d * (0.5 + d * (1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120))))
            small = tl.abs(d) < 0.1
            e = tl.exp(d)
            kl = tl.where(small, near, e - d - 1.0)
            kl_slope = tl.where(small, -(d + near), 1.0 - e)
        loss += beta * kl
        slope += beta * kl_slope
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights + row)
    if HAS_GRAD:
        tl.store(grad + at, tl.where(counts, weight * slope, 0.0), mask=real)
    sums += (row * tl.num_programs(1) + block) * 6
    low = (a < 0.0) & (ratio < 1.0 - eps_low)
    high = (a > 0.0) & (ratio > 1.0 + eps_high)
    tl.store(sums, weight * tl.sum(loss, 0))  # beyond the mask: -0 * e^0
    tl.store(sums + 1, tl.sum(low.to(tl.float32), 0))
    tl.store(sums + 2, tl.sum(high.to(tl.float32), 0))
    tl.store(sums + 3, tl.sum(kl, 0))
    tl.store(sums + 4, -tl.sum(log_ratio, 0))
    tl.store(sums + 5, tl.sum(counts.to(tl.float32), 0))


def block_size(T: int) -> int:
    """Steps a program adds up."""
    return min(1024, triton.next_power_of_2(T))


def clipped_policy_loss(
    logps, old_logps, advantages, mask, ref_logps, weights, eps_low, eps_high, beta, kl, grad
):
    """The sums, (SUMS,) float64; fills `grad` if it is given. Everything is contiguous."""
    B, T = logps.shape
    blocks = triton.cdiv(T, block_size(max(1, T)))
    sums = logps.new_empty(B, blocks, SUMS)
    if sums.numel():
        _policy_loss_fwd[(B, blocks)](
            logps, old_logps, advantages, mask, ref_logps, weights, sums, grad, T, eps_low,
            eps_high, beta, KL=kl, PER_ROW=advantages.dim() == 1, HAS_MASK=mask is not None,
            HAS_REF=ref_logps is not None, HAS_WEIGHTS=weights is not None,
            HAS_GRAD=grad is not None, BLOCK_T=block_size(T),
        )  # fmt: skip
    return sums.double().sum((0, 1))
