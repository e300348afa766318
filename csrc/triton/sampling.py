"""A token drawn by inverse CDF, and its log-probability.

Grid (N,). The first pass finds the largest logit and the sum of exponentials; the second walks
the running sum until it exceeds the caller's uniform number times the total.
"""

import triton
import triton.language as tl

from .logprobs import block_size, rebased


@triton.jit
def _sample_tokens_fwd(
    logits, uniforms, ids, logps, stride, V, inverse_temperature, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, BLOCK_V)
    infinity = float("inf")
    top = -infinity
    exps = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        j = start + lane
        x = tl.load(logits + j, mask=j < V, other=-infinity).to(tl.float32)
        higher, base, shift = rebased(x, top, inverse_temperature)
        exps = tl.exp(shift) * exps + tl.exp((x - base) * inverse_temperature)
        top = higher
    total = tl.sum(exps, 0)
    target = tl.load(uniforms + row) * total
    before = total * 0.0
    drawn = V
    last = 0  # that can be drawn at all: rounding may leave the target past the end
    for start in range(0, V, BLOCK_V):
        j = start + lane
        x = tl.load(logits + j, mask=j < V, other=-infinity).to(tl.float32)
        e = tl.exp((x - top) * inverse_temperature)
        past = (before + tl.cumsum(e, 0) > target) & (e > 0.0)
        drawn = tl.minimum(drawn, tl.min(tl.where(past, j, V), 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0.0, j, 0), 0))
        before += tl.sum(e, 0)
    drawn = tl.where(drawn == V, last, drawn)
    x = tl.load(logits + drawn).to(tl.float32)
    tl.store(ids + row, drawn)
    tl.store(logps + row, (x - top) * inverse_temperature - tl.log(total))


def sample_tokens(logits, uniforms, temperature, ids, logps):
    """Fill `ids` and `logps`, (N,) each. The tokens of a row of `logits` are side by side."""
    N, V = logits.shape
    if N == 0:
        return
    _sample_tokens_fwd[(N,)](
        logits, uniforms, ids, logps, logits.stride(0), V, 1 / temperature,
        BLOCK_V=block_size(V), num_warps=8,
    )  # fmt: skip
