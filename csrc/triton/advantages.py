"""GAE and BSPO's floored GAE as a scan, one program a row.

    A_t = a_t + c_t A_{t+1},    a_t = r_t + gamma v_t - V_t,    c_t = gamma lam, or 0

where v_t is the value of the state after the step. A step that does not count is the pair
(0, 1), and v passes through it as well: masked rows are a scan of (a, c, v).

Grid (B,). A row is read from its end in blocks, so that scans run forward over reversed data;
the advantage and the value to the right of a block stay in registers.
"""

import triton
import triton.language as tl


@triton.jit
def _join(a, c, a_next, c_next):
    # c = 0 stops the trace: what lies behind is not seen, NaN included
    return a_next + tl.where(c_next == 0.0, 0.0, c_next * a), c_next * c


@triton.jit
def _latest(x, known, x_next, known_next):
    return tl.where(known_next != 0, x_next, x), known | known_next


@triton.jit
def _at_left(x, lane, BLOCK_T: tl.constexpr):
    return tl.sum(tl.where(lane == BLOCK_T - 1, x, 0.0), 0)


@triton.jit
def _block(
    rewards, values, terminated, truncated, bootstrap, mask, supported, start, start_values,
    t, lane, next_value, T, v_min, gamma, decay,
    HAS_END: tl.constexpr, HAS_CUT: tl.constexpr, HAS_BOOTSTRAP: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A block of a row, scanned: a and c of its steps, their values, which count, and the
    value of the first step that does."""
    real = t >= 0
    reward = tl.load(rewards + start + t, mask=real, other=0.0).to(tl.float32)
    value = tl.load(values + start_values + t, mask=real, other=0.0).to(tl.float32)
    behind = tl.load(values + start_values + t + 1, mask=real, other=0.0).to(tl.float32)
    after = tl.where(lane == 0, next_value, behind)
    counts = real
    trace = real
    if HAS_MASK:
        counts = tl.load(mask + start + t, mask=real, other=0) != 0
        right = tl.load(mask + start + t + 1, mask=real & (t + 1 < T), other=0)
        known = tl.where(lane == 0, 1, right.to(tl.int32))
        after, _ = tl.associative_scan((after, known), 0, _latest)
    next_value = _at_left(tl.where(counts, value, after), lane, BLOCK_T)
    if HAS_CUT:
        cut = tl.load(truncated + start + t, mask=real, other=0) != 0
        if HAS_BOOTSTRAP:
            behind = tl.load(bootstrap + start + t, mask=real, other=0.0).to(tl.float32)
        after = tl.where(cut, behind, after)
        trace = trace & (cut == 0)
    if HAS_END:
        end = tl.load(terminated + start + t, mask=real, other=0) != 0
        after = tl.where(end, 0.0, after)
        trace = trace & (end == 0)
    if HAS_FLOOR:
        within = tl.load(supported + start + t, mask=real, other=0) != 0
        after = tl.where(within, after, v_min)
        reward = tl.where(within, reward, 0.0)
        trace = trace & within
    a = tl.where(counts, reward + gamma * after - value, 0.0)
    c = tl.where(counts, tl.where(trace, decay, 0.0), 1.0)
    a, c = tl.associative_scan((a, c), 0, _join)
    return a, c, value, counts, next_value


@triton.jit
def _gae_fwd(
    rewards, values, terminated, truncated, bootstrap, mask, supported, floored,
    advantages, targets, T, v_min, gamma, decay,
    HAS_END: tl.constexpr, HAS_CUT: tl.constexpr, HAS_BOOTSTRAP: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start, start_values = row * T, row * (T + 1)
    lane = tl.arange(0, BLOCK_T)
    advantage, next_value = 0.0, 0.0
    if HAS_END:
        next_value = tl.load(values + start_values + T).to(tl.float32)
    for block in range(0, tl.cdiv(T, BLOCK_T)):
        t = T - 1 - block * BLOCK_T - lane
        a, c, value, counts, next_value = _block(
            rewards, values, terminated, truncated, bootstrap, mask, supported, start,
            start_values, t, lane, next_value, T, v_min, gamma, decay, HAS_END, HAS_CUT,
            HAS_BOOTSTRAP, HAS_MASK, HAS_FLOOR, BLOCK_T,
        )  # fmt: skip
        out = a + tl.where(c == 0.0, 0.0, c * advantage)
        advantage = _at_left(out, lane, BLOCK_T)
        tl.store(advantages + start + t, tl.where(counts, out, 0.0), mask=t >= 0)
        if HAS_FLOOR:
            low = tl.load(floored + start + t, mask=t >= 0, other=0) != 0
            target = tl.where(low, v_min, out + value)
            tl.store(targets + start + t, tl.where(counts, target, 0.0), mask=t >= 0)


@triton.jit
def _dual_gae_fwd(
    rewards, costs, values, cost_values, terminated, truncated, mask, advantages,
    cost_advantages, combined, T, gamma, decay, multiplier,
    HAS_CUT: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start, start_values = row * T, row * (T + 1)
    lane = tl.arange(0, BLOCK_T)
    gain, price = 0.0, 0.0
    next_value = tl.load(values + start_values + T).to(tl.float32)
    next_cost = tl.load(cost_values + start_values + T).to(tl.float32)
    for block in range(0, tl.cdiv(T, BLOCK_T)):
        t = T - 1 - block * BLOCK_T - lane
        a, c, _, counts, next_value = _block(
            rewards, values, terminated, truncated, values, mask, mask, start, start_values, t,
            lane, next_value, T, 0.0, gamma, decay, True, HAS_CUT, False, HAS_MASK, False,
            BLOCK_T,
        )  # fmt: skip
        b, _, _, _, next_cost = _block(
            costs, cost_values, terminated, truncated, values, mask, mask, start, start_values,
            t, lane, next_cost, T, 0.0, gamma, decay, True, HAS_CUT, False, HAS_MASK, False,
            BLOCK_T,
        )  # fmt: skip
        a += tl.where(c == 0.0, 0.0, c * gain)
        b += tl.where(c == 0.0, 0.0, c * price)
        gain, price = _at_left(a, lane, BLOCK_T), _at_left(b, lane, BLOCK_T)
        both = (a - multiplier * b) / (1.0 + multiplier)
        tl.store(advantages + start + t, tl.where(counts, a, 0.0), mask=t >= 0)
        tl.store(cost_advantages + start + t, tl.where(counts, b, 0.0), mask=t >= 0)
        tl.store(combined + start + t, tl.where(counts, both, 0.0), mask=t >= 0)


def block_size(T: int) -> int:
    """Steps a program scans at once: a row where it is short, 1024 where it is long."""
    return min(1024, triton.next_power_of_2(T))


def gae(
    rewards, values, terminated, truncated, bootstrap, mask, supported, floored, v_min,
    gamma, lam, advantages, targets,
):  # fmt: skip
    """Fill `advantages`, and `targets` if `supported` is given. Everything is contiguous."""
    B, T = rewards.shape
    if B == 0 or T == 0:
        return
    _gae_fwd[(B,)](
        rewards, values, terminated, truncated, bootstrap, mask, supported, floored,
        advantages, targets, T, v_min, gamma, gamma * lam,
        HAS_END=terminated is not None, HAS_CUT=truncated is not None,
        HAS_BOOTSTRAP=bootstrap is not None, HAS_MASK=mask is not None,
        HAS_FLOOR=supported is not None, BLOCK_T=block_size(T),
    )  # fmt: skip


def dual_gae(
    rewards, costs, values, cost_values, terminated, truncated, mask, gamma, lam, multiplier,
    advantages, cost_advantages, combined,
):  # fmt: skip
    """Fill the last three. Everything is contiguous."""
    B, T = rewards.shape
    if B == 0 or T == 0:
        return
    _dual_gae_fwd[(B,)](
        rewards, costs, values, cost_values, terminated, truncated, mask, advantages,
        cost_advantages, combined, T, gamma, gamma * lam, multiplier,
        HAS_CUT=truncated is not None, HAS_MASK=mask is not None, BLOCK_T=block_size(T),
    )  # fmt: skip
