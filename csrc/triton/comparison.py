"""What each answer of a group scored against its opponents.

Grid (P,). A program holds both scores of every pair of its group: along rows those of the
answer shown first, along columns those of the answer shown second.
"""

import triton
import triton.language as tl


@triton.jit
def _grouped_comparison_fwd(
    scores, complete, answer_scores, judged, n, HAS_COMPLETE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    first, second = i[:, None], i[None, :]
    inside = (first < n) & (second < n) & (first != second)
    if HAS_COMPLETE:
        known = tl.load(complete + p * n + i, mask=i < n, other=0).to(tl.int32)
        inside = inside & (known[:, None] != 0) & (known[None, :] != 0)
    at = scores + 2 * ((p * n + first) * n + second)
    of_first = tl.load(at, mask=inside, other=float("nan")).to(tl.float64)
    of_second = tl.load(at + 1, mask=inside, other=float("nan")).to(tl.float64)
    asked_first, asked_second = of_first == of_first, of_second == of_second
    total = tl.sum(tl.where(asked_first, of_first, 0.0), 1)
    total += tl.sum(tl.where(asked_second, of_second, 0.0), 0)
    count = tl.sum(asked_first.to(tl.int32), 1) + tl.sum(asked_second.to(tl.int32), 0)
    mean = tl.where(count > 0, total / tl.maximum(count, 1), float("nan"))
    tl.store(answer_scores + p * n + i, mean.to(tl.float32), mask=i < n)
    tl.store(judged + p * n + i, count > 0, mask=i < n)


def grouped_comparison(scores, complete, answer_scores, judged):
    """Fill the last two, (P, n). Everything is contiguous."""
    P, n = answer_scores.shape
    if P == 0 or n == 0:
        return
    _grouped_comparison_fwd[(P,)](
        scores, complete, answer_scores, judged, n, HAS_COMPLETE=complete is not None,
        BLOCK_N=triton.next_power_of_2(n),
    )  # fmt: skip
