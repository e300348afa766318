"""Log-probability of a chosen token and entropy in one pass over the logits; their gradient.

    d_j = (x_j - top) / temperature,    log p_j = d_j - log sum e^d
    entropy = log sum e^d - sum d e^d / sum e^d

Forward: grid (N,), a program keeps the running maximum and both sums, one exponential an
element. Backward: grid (N, blocks of V), every element once.
"""

import triton
import triton.language as tl

IGNORE = tl.constexpr(-100)


@triton.jit
def rebased(x, top, inverse_temperature):
    """The largest logit so far, what differences are taken from, and the shift of older ones."""
    higher = tl.maximum(top, tl.max(x, 0))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    shift = tl.where(top == -float("inf"), 0.0, (top - base) * inverse_temperature)
    return higher, base, tl.maximum(shift, -200.0)  # e^-200 is 0, and 0 * -inf would be NaN


@triton.jit
def _token_logps_fwd(
    logits, ids, logps, entropy, tops, log_sums, stride, V, inverse_temperature,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, BLOCK_V)
    infinity = float("inf")
    top = -infinity
    exps = tl.zeros((BLOCK_V,), tl.float32)
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        j = start + lane
        x = tl.load(logits + j, mask=j < V, other=-infinity).to(tl.float32)
        higher, base, shift = rebased(x, top, inverse_temperature)
        scale = tl.exp(shift)
        d = (x - base) * inverse_temperature
        e = tl.exp(d)
        finite = tl.where(e > 0.0, d, 0.0)
        weighted = scale * (weighted + shift * exps) + e * finite
        exps = scale * exps + e
        top = higher
    total = tl.sum(exps, 0)
    log_sum = tl.log(total)
    id = tl.load(ids + row)
    counts = id != IGNORE
    chosen = tl.load(logits + tl.where(counts, id, 0)).to(tl.float32)
    logp = (chosen - top) * inverse_temperature - log_sum
    tl.store(logps + row, tl.where(counts, logp, 0.0))
    tl.store(entropy + row, tl.where(counts, log_sum - tl.sum(weighted, 0) / total, 0.0))
    tl.store(tops + row, top)
    tl.store(log_sums + row, log_sum)


@triton.jit
def _token_logps_bwd(
    grad_logps, grad_entropy, logits, ids, entropy, tops, log_sums, grad, stride, V,
    inverse_temperature, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(logits + row * stride + j, mask=j < V, other=0.0).to(tl.float32)
    id = tl.load(ids + row)
    logp = (x - tl.load(tops + row)) * inverse_temperature - tl.load(log_sums + row)
    p = tl.exp(logp)
    surprise = tl.where(p > 0.0, logp, 0.0) + tl.load(entropy + row)
    onehot = tl.where(j == id, 1.0, 0.0)
    g = tl.load(grad_logps + row) * (onehot - p) - tl.load(grad_entropy + row) * p * surprise
    g = tl.where(id != IGNORE, g * inverse_temperature, 0.0)
    tl.store(grad + row * V + j, g.to(grad.dtype.element_ty), mask=j < V)


def block_size(V: int) -> int:
    """Logits a program holds at once."""
    return min(4096, triton.next_power_of_2(V))


def token_logps(logits, ids, temperature, logps, entropy, top, log_sum):
    """Fill the last four, (N,) each. The tokens of a row of `logits` are side by side."""
    N, V = logits.shape
    if N == 0:
        return
    _token_logps_fwd[(N,)](
        logits, ids, logps, entropy, top, log_sum, logits.stride(0), V, 1 / temperature,
        BLOCK_V=block_size(V), num_warps=8,
    )  # fmt: skip


def token_logps_backward(
    grad_logps, grad_entropy, logits, ids, entropy, top, log_sum, temperature, grad
):
    """Fill `grad`, (N, V) contiguous."""
    N, V = logits.shape
    if N == 0:
        return
    _token_logps_bwd[(N, triton.cdiv(V, block_size(V)))](
        grad_logps, grad_entropy, logits, ids, entropy, top, log_sum, grad,
        logits.stride(0), V, 1 / temperature, BLOCK_V=block_size(V), num_warps=8,
    )  # fmt: skip
