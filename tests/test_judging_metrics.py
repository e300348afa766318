"""judging.metrics, agreement and calibration: against tables worked out by hand, and simulated judges."""

import numpy as np
import pytest

from alignkit.generate.text import Scripted
from alignkit.judging.judges import Judge, Task, pairwise
from alignkit.judging.metrics import (
    DEFAULT_PAIRS,
    FLAGGED,
    TIE,
    UNREAD,
    consistent,
    control,
    credit,
    estimate,
    flips,
    item_slopes,
    length_bias,
    majority_vote,
    mean_figure,
    position_bias,
    position_p,
    relative_gain,
    report,
    s1_scaling,
    vote_share,
    winners,
    within_budget,
)
from alignkit.judging.verdicts import Choice
from alignkit.stats import (
    calibration_error,
    cohen_kappa,
    mean_interval,
    risk_coverage,
    wilson_interval,
)

# Six pairs: the verdict as given, swapped, the label, and the lengths of the answers.
#                     given   swapped label  lengths  longer
TABLE = np.array([[0, 0, 0, 9, 1],       # 0
                  [0, 1, 0, 9, 1],       # 0: followed the first place
                  [1, 0, 1, 1, 9],       # 1: followed the second place
                  [TIE, 1, 1, 5, 5],     # equal
                  [UNREAD, 0, 1, 1, 9],  # 1
                  [UNREAD, UNREAD, 0, 1, 9]])
VERDICTS, LABELS, LENGTHS = TABLE[:, :2], TABLE[:, 2], TABLE[:, 3:]


def test_the_table_by_hand():
    found = report(VERDICTS, LABELS, LENGTHS)
    values = {name: figure.value for name, figure in found.items()}
    np.testing.assert_allclose(values.pop("accuracy as given"), (1 + 1 + 1 + 0.5 + 0 + 0) / 6)
    np.testing.assert_allclose(values.pop("accuracy swapped"), (1 + 0 + 0 + 1 + 0 + 0) / 6)
    np.testing.assert_allclose(values.pop("accuracy"), (3.5 + 2) / 12)
    np.testing.assert_allclose(values.pop("right in both orders"), 1 / 6)
    np.testing.assert_allclose(values.pop("consistency"), 1 / 6)
    # half more or less than 0 where the first place won or lost; swapped, answer 1 stands first
    np.testing.assert_allclose(values.pop("position bias"), np.mean([0, 0.5, -0.5, 0.5, -0.5]))
    np.testing.assert_allclose(values.pop("ties"), 1 / 12)
    np.testing.assert_allclose(values.pop("unread"), 3 / 12)
    # longer won minus longer is better: 1-1, 1/2-1, 1/2-1, (equal lengths: out), 0-1, (nothing read: out)
    np.testing.assert_allclose(values.pop("length bias"), np.mean([0, -0.5, -0.5, -1]))
    assert not values
    assert found["length bias"].n == 4 and found["position bias"].n == 5 and found["accuracy"].n == 6


def test_intervals_are_those_of_stats():
    rate = estimate([1, 1, 0, 1])
    assert (rate.low, rate.high) == wilson_interval(3, 4)
    mean = estimate([1, 0.5, 0, 1])
    assert (mean.low, mean.high) == mean_interval([1, 0.5, 0, 1])
    assert np.isnan(estimate([]).value) and estimate([]).n == 0 and np.isnan(estimate([0.5]).low)


def test_differences_of_0_and_1_are_no_shares():
    gains, items = np.array([1.0, 1, 0, 1]), np.array([0, 1, 2, 3])
    for found in (mean_figure(gains), mean_figure(gains, items)):
        assert (found.low, found.high) == mean_interval(gains) and found.high > 1
    assert mean_figure(gains, np.array([0, 0, 1, 1])).high > 1
    assert mean_figure([]).n == 0 and np.isnan(mean_figure([1.0]).low)


def test_a_figure_that_may_be_negative_is_not_bounded_by_0():
    "Five pairs favour the first place by half or not at all; a net change of a few rights."
    before, after, labels = np.array([1, 1, 1, 0]), np.array([0, 1, 1, 0]), np.zeros(4, int)
    assert flips(before, after, labels).net.low < 0
    favoured = np.array([[0, 1]] + [[0, 0]] * 4)
    assert position_bias(favoured).low < 0
    lengths = np.array([[9, 1]] * 5)
    assert length_bias(np.array([[0, 0]] + [[1, 1]] * 4), lengths, np.ones(5, int)).low < 0


def test_what_a_verdict_is_worth():
    assert credit(np.array([0, 1, TIE, UNREAD]), np.zeros(4, int)).tolist() == [1, 0, 0.5, 0]
    assert credit(np.array([UNREAD]), np.array([0]), unread=0.5).tolist() == [0.5]


def test_two_unreadable_verdicts_do_not_agree_and_two_ties_do():
    assert consistent(np.array([[UNREAD, UNREAD], [TIE, TIE], [TIE, 0]])).tolist() == [False, True, False]


def test_verdicts_of_judgements():
    said = ["[[A]]", "[[A]]", "[[C]]", "nothing", "[[x]]", "[[B]]"]
    judge = Judge(Scripted(said), Choice(tie="C"))
    both = pairwise(judge, [Task("?", ("x", "y"))] * 3)
    assert winners(both).tolist() == [[0, 1], [TIE, UNREAD], [UNREAD, 0]]
    assert winners([]).shape == (0, 2)


def test_a_judge_that_always_says_a_scores_half_and_is_flagged():
    judge = Judge(Scripted(lambda question: "[[A]]"), Choice())
    verdicts = winners(pairwise(judge, [Task(f"{i}?", ("x", "y")) for i in range(DEFAULT_PAIRS)]))
    labels = np.random.default_rng(0).integers(0, 2, DEFAULT_PAIRS)
    found = report(verdicts, labels)
    assert found["accuracy"].value == 0.5 and found["consistency"].value == 0
    assert found["position bias"].value == 0.5 and position_p(verdicts) <= FLAGGED


def coin(rng, first):
    "Every verdict falls on the first place with this probability."
    return np.where(rng.random((DEFAULT_PAIRS, 2)) < first, [0, 1], [1, 0])


def lured(rng, first):
    "Right in three of four, but sometimes taken in by the first place."
    own = np.where(rng.random((DEFAULT_PAIRS, 1)) < 0.75, 0, 1)
    return np.where(rng.random((DEFAULT_PAIRS, 2)) < 2 * (first - 0.5), [0, 1], own)


@pytest.mark.parametrize("judge", [coin, lured])
def test_ten_points_of_position_bias_are_found(judge):
    rng = np.random.default_rng(1)
    trials = [judge(rng, 0.6) for _ in range(200)]
    assert np.mean([position_bias(v).value for v in trials[:50]]) == pytest.approx(0.1, abs=0.012)
    assert np.mean([position_p(v) <= FLAGGED for v in trials]) >= 0.9


def test_no_position_bias_is_seldom_found():
    rng = np.random.default_rng(2)
    assert np.mean([position_p(coin(rng, 0.5)) <= FLAGGED for _ in range(1000)]) <= 0.055
    assert position_p(np.zeros((5, 2), int)) == 1


def test_position_p_by_hand():
    "Six pairs follow the first place, none the second: 2 / 2^6."
    assert position_p(np.array([[0, 1]] * 6 + [[0, 0]] * 9)) == pytest.approx(2 / 2**6)


def test_votes_by_hand():
    votes = np.array([[0, 0, 1], [0, 1, TIE], [UNREAD, UNREAD, 1], [UNREAD] * 3, [TIE, TIE, 1], [2, 2, 0]])
    assert majority_vote(votes).tolist() == [0, TIE, 1, UNREAD, TIE, 2]
    np.testing.assert_allclose(vote_share(votes), [2 / 3, 1 / 3, 1 / 3, 0, 2 / 3, 2 / 3])
    bought = within_budget(votes[:2], np.array([[5, 5, 5], [9, 9, 9]]), np.array([10, 8]))
    assert bought.tolist() == [[0, 0, UNREAD], [UNREAD] * 3]


def test_flips_by_hand():
    before = np.array([[0, 0], [0, 1], [1, 1], [1, UNREAD], [TIE, 0]])
    after = np.array([[0, 1], [0, 0], [0, 1], [1, 0], [0, TIE]])
    found = flips(before, after, np.zeros(5, int))
    assert found.counts.tolist() == [[2, 1, 1], [2, 2, 0], [2, 0, 0]]
    assert found.wrong_to_right.value == 2 / 10 and found.right_to_wrong.value == 1 / 10
    assert found.net.value == pytest.approx((6 - 4) / 10)
    share = found.counts / found.counts.sum()
    assert found.net.value == pytest.approx(share[:, 0].sum() - share[0].sum())


def test_scaling_by_hand():
    right = np.array([[0, 1, 1], [1, 1, 0], [0, 0, 1]])
    x = np.array([0, 1, 4])
    expected = [np.polyfit(x, row, 1)[0] for row in right]
    np.testing.assert_allclose(item_slopes(x, right), expected)
    np.testing.assert_allclose(item_slopes(x, right).mean(), np.polyfit(x, right.mean(0), 1)[0])
    np.testing.assert_allclose(s1_scaling([0, 10, 30], [0.5, 0.6, 0.5]), (0.1 / 10 + 0 - 0.1 / 20) / 3)
    assert control(np.array([1, 2, 3, 4]), 2, 3).value == 0.5


def test_the_interval_of_a_relative_gain_covers():
    rng, hits = np.random.default_rng(3), 0
    for _ in range(100):
        before = rng.random(150) < 0.6
        after = np.where(rng.random(150) < 0.25, rng.random(150) < 0.8, before)
        gain = relative_gain(before.astype(float), after.astype(float))
        hits += gain.low <= (0.75 * 0.6 + 0.25 * 0.8) / 0.6 - 1 <= gain.high
    assert hits >= 90


def test_kappa_by_hand():
    # 2 x 2 table 20 5 / 10 15: observed .7, chance .5
    a, b = [0] * 25 + [1] * 25, [0] * 20 + [1] * 5 + [0] * 10 + [1] * 15
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa([0, 1], [1, 0]) == -1


def test_calibration_by_hand():
    assert calibration_error([1, 1, 0.55, 0.55], [1, 0, 1, 0]) == pytest.approx((1 + 0.1) / 4)
    assert calibration_error([0.8] * 5, [1, 1, 1, 1, 0]) == pytest.approx(0)
    coverage, risk = risk_coverage([0.9, 0.8, 0.8, 0.6], [1, 0, 1, 0])
    assert coverage.tolist() == [0.25, 0.75, 1] and risk == pytest.approx([0, 1 / 3, 0.5])


@pytest.mark.parametrize("call, message", [
    (lambda: credit(np.zeros((3, 2), int), np.zeros(2, int)), r"labels: expected shape \(3,\)"),
    (lambda: credit(np.zeros(2, int), np.array([0, -1])), "labels: expected indices of answers, got -1"),
    (lambda: length_bias(np.zeros((3, 2), int), np.zeros(3)), "lengths: expected shape"),
    (lambda: flips(np.zeros(3), np.zeros((3, 1)), np.zeros(3)), "after: expected shape"),
    (lambda: item_slopes([0, 1], np.zeros((3, 3))), r"right: expected shape \(n, 2\)"),
    (lambda: item_slopes([1, 1], np.zeros((3, 2))), "levels: expected two different"),
    (lambda: relative_gain(np.zeros(3), np.ones(3)), "bottom: a share of nothing"),
    (lambda: cohen_kappa([1], [1, 2]), "second: expected 1"),
    (lambda: calibration_error([1.2], [1]), r"confidence: expected \[0, 1\]"),
    (lambda: risk_coverage([0.5, 0.5], [1]), "correct: expected 2"),
])
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
