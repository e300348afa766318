"""Statistics against scipy, brute force, and their own promises (reliability list, promise 20)."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as oracle

from alignkit.stats import (
    at_most_p,
    bootstrap_interval,
    holm,
    mean_interval,
    sign_flip_p,
    student_interval,
    wilson_interval,
    within_p,
)

# A tenth in `make test`, the full counts in `make soak`.
TRIALS = [4_000, pytest.param(40_000, marks=pytest.mark.soak)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_sign_flip_counts_all_patterns(differences):
    """Integers: ties are frequent and sums exact, so the count has no rounding to hide behind."""
    patterns = product((-1, 1), repeat=len(differences))
    sums = [sum(s * d for s, d in zip(p, differences, strict=True)) for p in patterns]
    expected = sum(total >= sum(differences) for total in sums) / len(sums)
    assert sign_flip_p(differences) == expected


@pytest.mark.parametrize("n", [5, 10, 13])
def test_sign_flip_agrees_with_scipy(n):
    x = np.random.default_rng(n).normal(0.4, 1, n)
    theirs = oracle.permutation_test((x,), np.mean, permutation_type="samples",
                                     alternative="greater", n_resamples=np.inf)
    assert sign_flip_p(x) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_sampled_sign_flips_come_close_to_the_exact_test():
    x = np.random.default_rng(2).normal(0.4, 1, 20)
    exact = sign_flip_p(x)
    padded = sign_flip_p([*x, 0.0])  # a zero changes no sum, and makes it 21 seeds: sampled
    assert padded == pytest.approx(exact, abs=5 * np.sqrt(exact / 100_000))
    assert padded == sign_flip_p([*x, 0.0])
    assert 0 < sign_flip_p(np.ones(40)) < 1e-4


def test_ties_in_floating_point_count():
    assert sign_flip_p([0.1] * 10) == 1 / 1024
    assert sign_flip_p([0.1, 0.2, -0.3, 1e-9, -1e-9]) > 0.5
    assert sign_flip_p([1e200, -1e200, 1e200]) == 0.5


def test_bounds_are_claims_of_their_own():
    x = np.random.default_rng(1).normal(0, 0.1, 10)
    assert at_most_p(x, 1.0) == within_p(x, 1.0) == 1 / 1024
    assert at_most_p(x, 0.0) > 0.05 and within_p(x + 2, 1.0) == 1.0


@pytest.mark.parametrize("n", [2, 5, 19])
def test_student_agrees_with_scipy(n):
    x = np.random.default_rng(n).normal(3, 2, n)
    theirs = oracle.t.interval(0.95, n - 1, loc=x.mean(), scale=oracle.sem(x))
    assert student_interval(x) == pytest.approx(theirs)
    assert mean_interval(x) == student_interval(x)


@pytest.mark.parametrize("successes, trials", [(0, 1), (1, 1), (0, 50), (7, 9), (500, 1000)])
def test_wilson_agrees_with_scipy(successes, trials):
    theirs = oracle.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_only_raises_p_and_keeps_their_order(p_values):
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    assert max(adjusted) <= 1
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    assert min(adjusted) == min(1, len(p_values) * min(p_values))


def test_holm_of_nothing():
    assert holm([]) == []


@pytest.mark.parametrize("call, message", [
    (lambda: sign_flip_p([]), "differences: expected a non-empty list"),
    (lambda: sign_flip_p([[1.0], [2.0]]), "differences: .*shape"),
    (lambda: sign_flip_p([1.0, np.inf]), "differences: .*inf at position 1"),
    (lambda: student_interval([1.0]), "figures: .*at least 2"),
    (lambda: bootstrap_interval([np.nan] * 20), "figures: .*nan at position 0"),
    (lambda: wilson_interval(3, 2), "successes: expected 0 to 2, got 3"),
    (lambda: wilson_interval(0, 0), "trials: expected at least 1"),
    (lambda: holm([0.5, 1.5]), "p_values: expected"),
    (lambda: holm([float("nan")]), "p_values: .*nan"),
])
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize("n", [5, 10])
def test_intervals_cover(n, trials):
    experiments = np.random.default_rng(n).normal(size=(trials, n))
    covered = [low <= 0 <= high for low, high in map(mean_interval, experiments)]
    assert np.mean(covered) >= 0.94


@pytest.mark.parametrize("trials", [400, pytest.param(4_000, marks=pytest.mark.soak)])
def test_bootstrap_covers_skewed_figures(trials):
    """Three failed seeds in ten, on average: where the studentised interval beats Student's."""
    rng = np.random.default_rng(5)
    figures = rng.normal(size=(trials, 20)) - 6 * (rng.uniform(size=(trials, 20)) < 0.3)
    covered = [low <= -1.8 <= high for low, high in map(mean_interval, figures)]
    assert np.mean(covered) >= 0.94


@pytest.mark.parametrize("trials", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_ten_null_claims_rarely_give_a_false_one(trials):
    """Family-wise error after Holm at most 5.5 %; without it, two papers in five are wrong."""
    figures = np.random.default_rng(6).normal(size=(trials, 10, 10))
    p = [[sign_flip_p(claim) for claim in paper] for paper in figures]
    assert np.mean([min(holm(paper)) <= 0.05 for paper in p]) <= 0.055
    assert np.mean(np.min(p, axis=1) <= 0.05) > 0.3
