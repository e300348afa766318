"""Attention of a few queries over visual and tactile tokens, each token read once.

Grid (B,): a program holds the queries of all heads and takes tiles of tokens, visual ones first.
The heads fill up to 16 rows, the least that `tl.dot` takes. Products are those of float32.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(visual, tactile, visual_mask, tactile_mask, row, start, NV, NT, D,
            HAS_VISUAL_MASK: tl.constexpr, HAS_TACTILE_MASK: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Tokens from `start` on as float32, which are visual, which tactile, which count."""
    n, d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    seen, felt = n < NV, (n >= NV) & (n < NV + NT)
    seen_counts, felt_counts = seen, felt
    if HAS_VISUAL_MASK:
        seen_counts = seen & (tl.load(visual_mask + row * NV + n, mask=seen, other=0) != 0)
    if HAS_TACTILE_MASK:
        felt_counts = felt & (tl.load(tactile_mask + row * NT + n - NV, mask=felt, other=0) != 0)
    column = (d < D)[None, :]
    at_seen = (row * NV + n)[:, None] * D + d[None, :]
    at_felt = (row * NT + n - NV)[:, None] * D + d[None, :]
    x = tl.load(visual + at_seen, mask=seen_counts[:, None] & column, other=0.0).to(tl.float32)
    x += tl.load(tactile + at_felt, mask=felt_counts[:, None] & column, other=0.0).to(tl.float32)
    return x, seen, felt, seen_counts | felt_counts, at_seen, at_felt


@triton.jit
def _attention_fusion_fwd(
    queries, visual, tactile, visual_mask, tactile_mask, context, weights, log_sum, H, D, NV, NT,
    HAS_VISUAL_MASK: tl.constexpr, HAS_TACTILE_MASK: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    heads = row * H + h
    at = heads[:, None] * D + d[None, :]
    real = (h < H)[:, None] & (d < D)[None, :]
    q = tl.load(queries + at, mask=real, other=0.0)
    total = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    mass_seen = tl.zeros((BLOCK_H,), tl.float32)
    mass_felt = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, NV + NT, BLOCK_N):
        x, seen, felt, counts, _, _ = tile_of(
            visual, tactile, visual_mask, tactile_mask, row, start, NV, NT, D, HAS_VISUAL_MASK,
            HAS_TACTILE_MASK, BLOCK_N, BLOCK_D)  # fmt: skip
        scores = tl.dot(q, tl.trans(x), input_precision="ieee")
        scores = tl.where(counts[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        scale = tl.where(top == -float("inf"), 0.0, tl.exp(top - base))
        p = tl.exp(scores - base[:, None])
        total = total * scale[:, None] + tl.dot(p, x, input_precision="ieee")
        mass_seen = mass_seen * scale + tl.sum(tl.where(seen[None, :], p, 0.0), 1)
        mass_felt = mass_felt * scale + tl.sum(tl.where(felt[None, :], p, 0.0), 1)
        top = higher
    mass = mass_seen + mass_felt
    share = tl.where(mass == 0.0, 0.0, 1.0 / tl.where(mass == 0.0, 1.0, mass))
    tl.store(context + at, total * share[:, None], mask=real)
    tl.store(weights + 2 * heads, mass_seen * share, mask=h < H)
    tl.store(weights + 2 * heads + 1, mass_felt * share, mask=h < H)
    tl.store(log_sum + heads, top + tl.log(mass), mask=h < H)


@triton.jit
def _attention_fusion_bwd(
    queries, visual, tactile, visual_mask, tactile_mask, log_sum, grad_context, grad_weights,
    mean_grad, grad_queries, grad_visual, grad_tactile, H, D, NV, NT,
    HAS_VISUAL_MASK: tl.constexpr, HAS_TACTILE_MASK: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    heads = row * H + h
    at = heads[:, None] * D + d[None, :]
    real = (h < H)[:, None] & (d < D)[None, :]
    q = tl.load(queries + at, mask=real, other=0.0)
    g = tl.load(grad_context + at, mask=real, other=0.0)
    lse = tl.load(log_sum + heads, mask=h < H, other=float("inf"))  # e^-inf: no such head
    mean = tl.load(mean_grad + heads, mask=h < H, other=0.0)
    by_seen = tl.load(grad_weights + 2 * heads, mask=h < H, other=0.0) - mean
    by_felt = tl.load(grad_weights + 2 * heads + 1, mask=h < H, other=0.0) - mean
    out = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for start in range(0, NV + NT, BLOCK_N):
        x, seen, felt, counts, at_seen, at_felt = tile_of(
            visual, tactile, visual_mask, tactile_mask, row, start, NV, NT, D, HAS_VISUAL_MASK,
            HAS_TACTILE_MASK, BLOCK_N, BLOCK_D)  # fmt: skip
        scores = tl.dot(q, tl.trans(x), input_precision="ieee")
        slopes = tl.dot(g, tl.trans(x), input_precision="ieee")
        slopes += tl.where(seen[None, :], by_seen[:, None], by_felt[:, None])
        p = tl.where(counts[None, :], tl.exp(scores - lse[:, None]), 0.0)
        s = tl.where(counts[None, :], p * slopes, 0.0)  # a mask hides even infinities
        out += tl.dot(s, x, input_precision="ieee")
        grad = tl.dot(tl.trans(p), g, input_precision="ieee")
        grad += tl.dot(tl.trans(s), q, input_precision="ieee")
        column = (d < D)[None, :]
        tl.store(grad_visual + at_seen, grad.to(grad_visual.dtype.element_ty),
                 mask=seen[:, None] & column)  # fmt: skip
        tl.store(grad_tactile + at_felt, grad.to(grad_tactile.dtype.element_ty),
                 mask=felt[:, None] & column)  # fmt: skip
    tl.store(grad_queries + at, out, mask=real)


LAUNCH = {"num_warps": 8, "num_stages": 1}  # with tokens fetched ahead, registers spill


def blocks(H: int, D: int) -> dict[str, int]:
    """Heads, tokens and columns a program holds at once: 8192 numbers of a tile, or 16 tokens."""
    columns = max(16, triton.next_power_of_2(D))
    tokens = max(16, min(64, 8192 // columns))
    return {"BLOCK_H": max(16, triton.next_power_of_2(H)), "BLOCK_N": tokens, "BLOCK_D": columns}


def _launch(kernel, tokens, arrays):
    queries, visual, tactile, visual_mask, tactile_mask = tokens
    B, H, D = queries.shape
    if B:
        kernel[(B,)](
            *tokens, *arrays, H, D, visual.shape[1], tactile.shape[1],
            HAS_VISUAL_MASK=visual_mask is not None, HAS_TACTILE_MASK=tactile_mask is not None,
            **blocks(H, D), **LAUNCH,
        )  # fmt: skip


def attention_fusion(tokens, context, weights, log_sum):
    """Fill the last three. `tokens`: queries, visual, tactile and a mask of either, contiguous."""
    _launch(_attention_fusion_fwd, tokens, (context, weights, log_sum))


def attention_fusion_backward(tokens, log_sum, grad_context, grad_weights, mean_grad,
                              grad_queries, grad_visual, grad_tactile):  # fmt: skip
    """Fill the last three."""
    _launch(_attention_fusion_bwd, tokens, (log_sum, grad_context, grad_weights, mean_grad,
                                            grad_queries, grad_visual, grad_tactile))  # fmt: skip
