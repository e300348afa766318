"""`grouped_comparison`: both orders, unasked pairs, incomplete answers, every backend."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import BACKENDS, assert_as_good_as_torch, poisoned, require

from alignkit import ops

NAN = float("nan")
BACKENDS_HERE = [b for b in BACKENDS if b in ("reference", "cpu", "triton")]
SIZES = [(0, 3), (2, 0), (1, 1), (3, 2), (4, 3), (2, 5), (1, 16), (1, 17)]


def case(P, n, seed, asked=0.8, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    scores = 1 + 9 * torch.rand(P, n, n, 2, generator=g)
    scores[torch.rand(P, n, n, 2, generator=g) > asked] = NAN
    return scores.to(dtype), torch.rand(P, n, generator=g) < 0.8


def by_definition(scores, complete):
    """Every score that an answer was given, from a table as nested lists."""
    n, means = len(complete), []
    for i in range(n):
        others = [j for j in range(n) if j != i and complete[i] and complete[j]]
        given_ = [s for j in others for s in (scores[i][j][0], scores[j][i][1])]
        given_ = [s for s in given_ if not math.isnan(s)]
        means.append(math.fsum(given_) / len(given_) if given_ else NAN)
    return means


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_reference_is_the_definition(data):
    n = data.draw(st.integers(1, 5))
    score = st.integers(1, 10).map(float) | st.just(NAN)
    row = st.lists(st.lists(score, min_size=2, max_size=2), min_size=n, max_size=n)
    scores = data.draw(st.lists(row, min_size=n, max_size=n))
    complete = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    expected = torch.tensor([by_definition(scores, complete)]).double()
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
        require(backend)
        found, judged = ops.grouped_comparison(
            torch.tensor([scores], dtype=dtype), complete=torch.tensor([complete]),
            backend=backend)  # fmt: skip
        torch.testing.assert_close(found.double(), expected, equal_nan=True)
        assert torch.equal(judged, ~expected.isnan())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "incomplete"])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_agrees_with_float64(backend, masked):
    device, cases = require(backend), []
    for seed, (P, n) in enumerate(SIZES):
        for dtype in (torch.float32, torch.bfloat16):
            scores, complete = case(P, n, seed, dtype=dtype)
            complete = complete if masked else None
            with poisoned():
                found, judged = ops.grouped_comparison(
                    scores.to(device), complete=None if complete is None else complete.to(device),
                    backend=backend)  # fmt: skip
            assert found.shape == judged.shape == (P, n)
            assert found.dtype == torch.float32 and judged.dtype == torch.bool
            torchs, _ = ops.grouped_comparison_reference(scores, complete=complete)
            exact, known = ops.grouped_comparison_reference(scores.double(), complete=complete)
            assert torch.equal(judged.cpu(), known)
            cases.append((found, torchs, exact))
    assert_as_good_as_torch(cases)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_who_is_not_judged_has_no_score(backend):
    device = require(backend)
    scores, _ = case(1, 3, 0, asked=1.0)
    one_left = torch.tensor([[1.0, 0.0, 0.0]], device=device)
    found, judged = ops.grouped_comparison(scores.to(device), complete=one_left, backend=backend)
    assert found.isnan().all() and not judged.any()
    itself = torch.full((1, 2, 2, 2), NAN)
    itself[0, 0, 0] = 5.0  # an answer beside itself says nothing
    assert not ops.grouped_comparison(itself.to(device), backend=backend)[1].any()


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_a_favour_for_the_first_place_falls_out_of_both_orders(backend):
    device = require(backend)
    quality, bonus = torch.tensor([3.0, 7.0, 5.0]), 2.0
    table = torch.stack([quality[:, None].expand(3, 3) + bonus, quality.expand(3, 3)], -1)[None]
    found, _ = ops.grouped_comparison(table.to(device), backend=backend)
    torch.testing.assert_close(found.cpu()[0], quality + bonus / 2)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_views_are_read_as_they_look_and_bits_repeat(backend):
    device = require(backend)
    scores, complete = (x.to(device) for x in case(3, 4, 0))
    run = partial(ops.grouped_comparison, backend=backend)
    expected = run(scores, complete=complete)
    views = (scores.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), (-scores)._neg_view(),
             scores)  # fmt: skip
    for view in views:
        for ours, theirs in zip(run(view, complete=complete.float()), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("change, error, message", [
    ({"scores": torch.zeros(2, 3, 3)}, ValueError, r"scores: expected shape \(P, n, n, 2\)"),
    ({"scores": torch.zeros(2, 3, 4, 2)}, ValueError, r"scores: expected shape \(2, 3, 3, 2\)"),
    ({"scores": torch.zeros(2, 3, 3, 2).long()}, TypeError, "scores: expected float32"),
    ({"complete": torch.ones(3)}, ValueError, r"complete: expected shape \(2, 3\)"),
    ({"complete": torch.full((2, 3), 2.0)}, ValueError, "complete: expected only 0 and 1"),
    ({"backend": "cuda"}, ValueError, "backend: expected None or one of"),
])  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ops.grouped_comparison(**({"scores": torch.zeros(2, 3, 3, 2)} | change))
