"""judging.scaling: what is sent and counted at each forced step, curves that are known, and the same over a local model."""

import re
from dataclasses import replace

import numpy as np
import pytest
from test_generate_text import ask, letter_tokenizer

from alignkit.generate import llama
from alignkit.generate.cache import Cache, Cached
from alignkit.generate.model import LocalModel, prompt_text
from alignkit.generate.text import Completion, NotAble, Request, Scripted, Token
from alignkit.judging.judges import Judge, Task, pairwise
from alignkit.judging.metrics import TIE, UNREAD, estimate
from alignkit.judging.scaling import (
    BudgetForcing,
    Curve,
    Votes,
    ask_votes,
    certainty,
    confidence,
    filler_curve,
    flip_matrices,
    majority_at,
    majority_curve,
    n_curve,
    probabilities,
    slope,
    slope_difference,
    trend,
    verdict_entropy,
    verdict_probability,
    vote_probability,
)
from alignkit.judging.verdicts import Choice
from alignkit.models.language import tiny_causal_lm
from alignkit.stats import mean_interval, risk_coverage

TASK = Task("2+2?", ("four", "4"))


class Recording:
    "A script that remembers its requests."
    can = ("continues", "images", "logprobs")

    def __init__(self, script):
        self.script, self.requests = script, []

    def generate(self, requests):
        self.requests += requests
        return Scripted(self.script).generate([replace(r, top_logprobs=None) for r in requests])


def said(script, length=60, **forcing):
    "What a judge makes of written answers, which come in this order."
    judge = Judge(BudgetForcing(Scripted(script), answer_tokens=10, **forcing), Choice(), max_new_tokens=length)
    return judge([TASK])[0]


def test_what_is_sent_is_s1s_procedure():
    recording = Recording(lambda request: "a b c")
    request = Request("Judge.", 30, seed=7, prefix="So: ", stop=("!",), top_logprobs=5)
    [got] = BudgetForcing(recording, waits=2, answer_tokens=10).generate([request])
    assert [(r.prefix, r.max_new_tokens, r.stop, r.top_logprobs) for r in recording.requests] == [
        ("So: <think>", 20, ("</think>",), None),
        ("So: <think>a b cWait", 17, ("</think>",), None),
        ("So: <think>a b cWaita b cWait", 14, ("</think>",), None),
        ("So: <think>a b cWaita b cWaita b c</think>", 10, ("!",), 5)]
    assert got.text == "<think>a b cWaita b cWaita b c</think>a b c"
    assert got.thoughts == ("a b c",) * 3 and not got.truncated
    # words: "So:", "<think>a", b, "cWaita", b, "cWaita", b, "c</think>a", b, c, less what the first call read
    assert (got.prompt_tokens, got.completion_tokens, got.thinking_tokens) == (3, 9, 6)


def test_the_first_part_is_the_same_for_every_n_and_each_part_draws_for_itself():
    asked = {}
    for waits in (0, 2):
        recording = Recording(lambda request: "a")
        BudgetForcing(recording, waits).generate([Request("Judge.", 100, seed=7)])
        asked[waits] = recording.requests
    assert asked[0][0] == asked[2][0] and asked[0][0].seed == 7
    assert len({request.seed for request in asked[2]}) == 4


def test_unforced_it_writes_what_the_generator_writes():
    whole = "<think>A is longer. [[A]] No.</think>Verdict: [[B]]"

    def script(request):
        return whole.removeprefix(request.prefix)

    plain = Judge(Scripted(script), Choice())([TASK])[0]
    forced = Judge(BudgetForcing(Scripted(script)), Choice())([TASK])[0]
    assert forced.completion.text == plain.completion.text == whole
    assert (forced.winner, forced.reasoning, forced.outcome) == (plain.winner, plain.reasoning, "decided")


@pytest.mark.parametrize("where, script, outcome, winner", [
    # only what follows the last </think> counts, whatever stands in the thinking
    ("thinking", ["[[A]]", " [[A]]", "[[B]]"], "decided", 1),
    ("thinking", ["[[B]]", " [[B]]", "Hm."], "missing", None),
    ("thinking", ["[[B]]</think>[[B]]", " hm", "[[A]] Wait [[B]]"], "decided", 1),
    ("thinking", ["", "", "[[A]]"], "decided", 0),  # nothing to add
    ("thinking", ["hm", "hm", "[[A]] <think>Or"], "unfinished", None),
    # after a printed verdict: the last one counts, a broken one is not replaced by the first
    ("verdict", ["hm", "[[A]]", ", no: [[B]]"], "decided", 1),
    ("verdict", ["hm", "[[A]]", ", I stay."], "decided", 0),
    ("verdict", ["hm", "[[A]]", ", [[A or B]]"], "malformed", None),
    ("verdict", ["hm", "[[A]]", " <think>B?</think>[[B]]"], "decided", 1)])
def test_which_verdict_counts(where, script, outcome, winner):
    got = said(script, waits=1, where=where)
    assert (got.outcome, got.winner) == (outcome, winner)
    assert got.completion.text.count("Wait") >= 1 and not got.completion.truncated


@pytest.mark.parametrize("length, waits, parts, truncated", [
    (31, 0, 1, False), (30, 0, 1, False), (29, 0, 1, True),  # 20 words, 10 kept for the answer
    (50, 1, 2, False), (49, 1, 2, True), (31, 1, 2, True), (30, 1, 1, True), (49, 9, 2, True), (11, 3, 1, True)])
def test_the_budget_ends_the_thinking(length, waits, parts, truncated):
    recording = Recording(lambda request: "w " * 20 if "</think>" in request.stop else "[[B]]")
    judge = Judge(BudgetForcing(recording, waits, answer_tokens=10), Choice(), max_new_tokens=length)
    [got] = judge([TASK])
    assert (len(got.completion.thoughts), got.completion.truncated, got.winner) == (parts, truncated, 1)
    assert sum(len(thought.split()) for thought in got.completion.thoughts) <= length - 10
    assert got.completion.text.endswith("</think>[[B]]") and all(r.max_new_tokens > 0 for r in recording.requests)


def test_each_request_of_a_batch_goes_its_own_way():
    def script(request):
        return "w " * (3 if "short" in request.prompt else 30)
    short, long = BudgetForcing(Scripted(script), waits=2, answer_tokens=10).generate(
        [Request("short", 40), Request("long", 40)])
    assert len(short.thoughts) == 3 and not short.truncated and len(long.thoughts) == 1 and long.truncated


def test_a_verdict_doubted_counts_its_tokens_as_thinking_and_may_use_the_whole_budget():
    recording = Recording(lambda request: "[[A]]" if len(recording.requests) == 2 else "w w w")
    [got] = BudgetForcing(recording, waits=2, where="verdict", answer_tokens=10).generate([Request("x", 40)])
    assert [r.max_new_tokens for r in recording.requests] == [30, 10, 26 + 10, 23 + 10]
    assert got.text == "<think>w w w</think>[[A]]Waitw w wWaitw w w"
    assert got.completion_tokens - got.thinking_tokens == 1  # [[A]]


@pytest.mark.parametrize("change, message", [
    ({"waits": -1}, "waits"), ({"answer_tokens": 0}, "answer_tokens"), ({"where": "after"}, "where"),
    ({"where": "verdict", "resume": False}, "resume"), ({"closing": "Final Answer:"}, "closing")])
def test_wrong_forcing_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        BudgetForcing(Scripted([]), **change)


def test_what_cannot_be_forced_is_refused():
    class Chat(Scripted):
        can = ("images",)

    with pytest.raises(NotAble, match=r"generator: Chat cannot go on from a prefix \('continues'\).*\['images'\]"):
        BudgetForcing(Chat([]))
    with pytest.raises(NotAble, match="logprobs"):
        BudgetForcing(Scripted([])).generate([Request("x", 100, top_logprobs=2)])
    with pytest.raises(ValueError, match=r"requests\[1\]: expected max_new_tokens above the 64"):
        BudgetForcing(Scripted([])).generate([Request("x", 65), Request("x", 64)])
    with pytest.raises(TypeError, match="around a Scripted"):
        n_curve(Judge(Scripted([]), Choice()), [TASK], np.array([0]))


def test_thinking_that_a_server_sets_apart_is_not_lost_silently():
    class Apart(Scripted):
        def generate(self, requests):
            return [Completion("", "stop", 1, 1, reasoning="hm") for _ in requests]

    with pytest.raises(ValueError, match="switch off what parses reasoning"):
        BudgetForcing(Apart([])).generate([Request("x", 100)])


# --- curves ---

SHARES = (0.4, 0.5, 0.7, 0.6)
PAIRS = 40
LABELS = np.arange(PAIRS) % 2
TASKS = [Task(f"pair {i}, better {'xy'[label]}", ("x", "y")) for i, label in enumerate(LABELS)]


def known(request):
    "Right on the pairs below its share at this level; thinks ten words a time."
    if "</think>" in request.stop:
        return "w " * 10 + "</think>"
    number, better = re.search(r"pair (\d+), better (\w)", request.text).groups()
    place = re.search(r"<answer ([AB]) \w+>\n" + better, request.text)[1]
    right = int(number) < PAIRS * SHARES[request.prefix.count("Wait")]
    return f"[[{place if right else 'BA'['AB'.index(place)]}]]"


def known_judge(**forcing):
    return Judge(BudgetForcing(Scripted(known), **forcing), Choice(), max_new_tokens=500)


def test_a_known_curve_is_found():
    curve = n_curve(known_judge(), TASKS, LABELS)
    np.testing.assert_allclose([a.value for a in curve.accuracy], SHARES)
    np.testing.assert_allclose(curve.mean_thinking, [10, 20, 30, 40], atol=1)  # a glued "Wait" is part of a word
    x = np.arange(4) - 1.5
    np.testing.assert_allclose(slope(curve).value, x @ SHARES / (x @ x))
    np.testing.assert_allclose(slope(curve, "token").value, slope(curve).value / 10, rtol=0.05)
    figures = trend(curve)
    np.testing.assert_allclose(figures["gain"].value, 0.2)
    np.testing.assert_allclose(figures["relative gain"].value, 0.5)
    np.testing.assert_allclose(figures["s1 performance"], 0.7)
    turned = flip_matrices(curve)
    assert [f.wrong_to_right.value for f in turned] == pytest.approx([0.1, 0.3, 0.2])
    assert [f.right_to_wrong.value for f in turned] == [0, 0, 0]
    assert turned[1].counts.tolist() == [[32, 0, 0], [24, 24, 0], [0, 0, 0]]


def test_two_judges_are_compared_pair_by_pair():
    "Both rise; the second only by what it answers wrongly at first."
    curve = n_curve(known_judge(), TASKS, LABELS, waits=(0, 2))
    same = slope_difference(curve, curve)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    worse = replace(curve, verdicts=np.where(LABELS[:, None, None] == 0, curve.verdicts, 1 - curve.verdicts))
    found = slope_difference(curve, worse)
    np.testing.assert_allclose(found.value, slope(curve).value - slope(worse).value)
    with pytest.raises(ValueError, match="other: expected the same 40 pairs"):
        slope_difference(curve, n_curve(known_judge(), TASKS[:9], LABELS[:9]))
    with pytest.raises(ValueError, match="per: expected 'wait' or 'token'"):
        slope(curve, "second")


@pytest.mark.parametrize("items", [None, np.array([0, 0, 1, 1])])
def test_slopes_and_gains_of_0_and_1_are_no_shares(items):
    "Of four pairs three are righted by the only Wait: each slope and gain is 0 or 1."
    verdicts = np.array([[[1, 0]] * 2] * 3 + [[[0, 0]] * 2])
    counts = np.ones(verdicts.shape, int)
    curve = Curve((0, 1), np.zeros(4, int), verdicts, counts, counts, counts < 0, items)
    still = replace(curve, verdicts=verdicts * 0)
    sums = np.array([1, 1, 1, 0]) if items is None else np.array([1, 0.5])
    surely = certainty(np.array([[0.1]] * 3 + [[0.9]]), np.full((4, 1), 0.9), np.zeros(4, int), items)
    for found in (slope(curve), slope_difference(curve, still), trend(curve)["gain"],
                  flip_matrices(curve)[0].net, surely.accuracy):
        assert (found.value, found.low, found.high) == pytest.approx((0.75, *mean_interval(sums)))
    assert found.high > 1


def test_pairs_that_share_a_prompt_widen_the_interval():
    curve = n_curve(known_judge(), TASKS, LABELS)
    shared = replace(curve, items=np.arange(PAIRS) // 8)
    for one, other in ((slope(curve), slope(shared)), (curve.accuracy[1], shared.accuracy[1]), (trend(curve)["gain"], trend(shared)["gain"]),
                       (trend(curve)["relative gain"], trend(shared)["relative gain"]),
                       (flip_matrices(curve)[1].net, flip_matrices(shared)[1].net)):
        assert one.value == pytest.approx(other.value) and other.high - other.low > one.high - one.low


def test_truncation_is_counted_by_level_and_where_a_level_adds_nothing_s1_has_no_figure():
    curve = n_curve(replace(known_judge(), max_new_tokens=64 + 20), TASKS, LABELS)
    assert curve.truncated.mean((0, 1)).tolist() == [0, 0, 1, 1]
    assert curve.mean_thinking[2] == curve.mean_thinking[3]
    figures = trend(curve)
    assert "s1 scaling per 100 tokens" not in figures and "slope per 100 tokens" in figures
    assert figures["truncated at the last"].value == 1 and figures["gain"].value == pytest.approx(0.1)
    still = n_curve(replace(known_judge(), max_new_tokens=64 + 5), TASKS, LABELS)
    assert "slope per 100 tokens" not in trend(still) and trend(still)["gain"].value == 0


def test_an_interrupted_curve_repeats_no_finished_call(tmp_path):
    class Failing(Scripted):
        def generate(self, requests):
            if self.asked >= 50:
                raise KeyboardInterrupt
            return super().generate(requests)

    def judge(script):
        return Judge(BudgetForcing(Cached(script, Cache(tmp_path / "calls.sqlite"), "known", batch_size=16)),
                     Choice(), max_new_tokens=500)

    first, second = Failing(known), Scripted(known)
    tasks, labels = TASKS[10:20], LABELS[10:20]
    with pytest.raises(KeyboardInterrupt):
        n_curve(judge(first), tasks, labels)
    curve = n_curve(judge(second), tasks, labels)
    assert [a.value for a in curve.accuracy] == [0.6, 1, 1, 1]
    # four thoughts and four answers a question: the levels share their first thoughts
    assert first.asked + second.asked == 10 * 2 * (4 + 4) and first.asked >= 50


# --- what else the tokens buy ---

def test_a_majority_at_equal_tokens_by_hand():
    votes = Votes(np.array([[[0, 1, 1], [1, 0, 0]], [[0, 1, UNREAD], [1, 1, 1]]]),
                  np.array([[[5, 5, 5], [5, 5, 5]], [[9, 1, 1], [1, 1, 1]]]))
    verdicts, spent = majority_at(votes, np.array([[15, 14], [4, 2]]))
    assert verdicts.tolist() == [[1, TIE], [0, 1]]  # the first always counts, also where it costs more
    assert spent.tolist() == [[15, 10], [9, 2]]


def test_votes_are_drawn_and_bought_with_what_the_forced_judge_spent():
    def drawn(request):
        return "w " * 6 + ("[[A]]" if request.seed % 3 else "[[B]]")

    judge = Judge(Scripted(drawn), Choice(), temperature=1.0)
    votes = ask_votes(judge, TASKS, 5)
    assert votes.verdicts.shape == (PAIRS, 2, 5) and (votes.tokens == 7).all()
    assert (votes.verdicts != votes.verdicts[:, :, :1]).mean() > 0.2  # each draws for itself
    assert 0.5 < ((votes.verdicts == 0).mean((0, 2)))[0] < 0.8  # the first shown, two times in three
    curve = n_curve(known_judge(), TASKS, LABELS)
    bought = majority_curve(votes, curve)
    assert (bought.tokens <= curve.tokens).all() and (curve.tokens - bought.tokens < 7)[:, :, :3].all()  # five votes, 35
    assert (bought.thinking == bought.tokens).all() and bought.tokens.max() == 35
    expected, _ = majority_at(votes, curve.tokens[:, :, 3])
    assert (bought.verdicts[:, :, 3] == expected).all() and not bought.truncated.any()
    assert slope_difference(curve, bought).n == PAIRS
    with pytest.raises(ValueError, match="temperature above 0"):
        ask_votes(replace(judge, temperature=0.0), TASKS, 5)


def test_filler_is_as_long_and_thinks_nothing():
    recording = Recording(known)
    judge = Judge(BudgetForcing(recording), Choice(), max_new_tokens=500)
    curve = n_curve(known_judge(), TASKS[:4], LABELS[:4])
    filler = filler_curve(judge, TASKS[:4], curve)
    np.testing.assert_allclose(filler.mean_thinking, curve.mean_thinking, atol=1)
    last = recording.requests[-1].prefix
    assert last.count(" .") == round(curve.mean_thinking[3] - curve.mean_thinking[0]) and "Wait" not in last
    assert len(recording.requests) == 4 * 2 * 4 * 2  # a thought and an answer each


# --- certainty ---

def judged(tokens, form, text=None, task=TASK):
    class Said(Scripted):
        can = ("continues", "logprobs")

        def generate(self, requests):
            return [Completion(text or "".join(t.text for t in tokens), "stop", 1, 1, tokens=tokens) for _ in requests]
    return pairwise(Judge(Said([]), form, top_logprobs=3), [task])[0]


def token(text, **top):
    "The first of `top` was chosen."
    return Token(text, np.log(next(iter(top.values()))), {k.replace("_", ""): np.log(p) for k, p in top.items()})


def test_the_probability_of_a_verdict_by_hand():
    form = Choice()
    stale = [token(" [[", a=1.0), Token("A", np.log(0.9), {"A": np.log(0.9), "B": np.log(0.1)}), token("]]", a=1.0)]
    last = [token(" [[", a=1.0), Token("A", np.log(0.6), {"A": np.log(0.6), "B": np.log(0.2)}), token("]]", a=1.0)]
    as_given, swapped = judged((*stale, *last), form)
    assert verdict_probability(as_given, form) == pytest.approx(0.6 / 0.8)
    assert verdict_probability(swapped, form) == pytest.approx(0.2 / 0.8)  # of the first as given
    whole = Token(" [[B]]", np.log(0.5), {" [[B]]": np.log(0.5), " [[A]]": np.log(0.5)})
    assert verdict_probability(judged((whole,), form)[0], form) == pytest.approx(0.5)
    opened = (Token("A", np.log(0.8), {"A": np.log(0.8), "B": np.log(0.2)}), token("]]", a=1.0))
    assert verdict_probability(judged(opened, form, "hm</think>[[A]]")[0], form) == pytest.approx(0.8)
    unlisted = Token(" [[B]]", np.log(0.5), {" [[B]]": np.log(0.5)})
    assert np.isnan(verdict_probability(judged((unlisted,), form)[0], form))
    assert np.isnan(verdict_probability(judged((token("Hm", a=1.0),), form)[0], form))  # missing
    yes = Choice(("yes", "no"))
    split = (token("[[", a=1.0), token("y", y=1.0), token("es", e=1.0), token("]]", a=1.0))
    assert np.isnan(verdict_probability(judged(split, yes)[0], yes))
    with pytest.raises(ValueError, match="top_logprobs"):
        verdict_probability(Judge(Scripted(["[[A]]"]), form)([TASK])[0], form)


def test_probabilities_of_a_curve_and_what_forcing_did_to_them():
    "Forced, this judge says the same with more confidence."
    class Sure(Scripted):
        can = ("continues", "logprobs")

        def generate(self, requests):
            return [self._one(request) for request in requests]

        def _one(self, request):
            p = 0.95 if "Wait" in request.prefix else 0.55
            tokens = (token("[[", a=1.0), Token("A", np.log(p), {"A": np.log(p), "B": np.log(1 - p)}), token("]]", a=1.0))
            return Completion("[[A]]", "stop", 5, 3, tokens=tokens if request.top_logprobs else None)

    judge = Judge(BudgetForcing(Sure([])), Choice(), top_logprobs=5)
    curve = n_curve(judge, TASKS, LABELS, waits=(0, 1))
    p = probabilities(curve, Choice())
    np.testing.assert_allclose(p[0], [[0.55, 0.95], [0.45, 0.05]])
    found = certainty(p[:, :, 0], p[:, :, 1], LABELS)
    assert found.artificial and found.accuracy.value == 0
    np.testing.assert_allclose(found.calibration, [0.05, 0.45])  # right half of the time: it always says A
    assert curve.outcomes == [{"decided": 80, "tie": 0, "missing": 0, "malformed": 0, "unfinished": 0}] * 2


def test_the_probability_of_a_tagged_verdict():
    task = Task("2+2?", ("[[B]]", "4"))
    tag = pairwise(Judge(Scripted(lambda q: ""), Choice()), [task])[0][0].question.tag
    tokens = (token(f"[[{tag}", a=1.0), token(":", a=1.0), Token("A", np.log(0.7), {"A": np.log(0.7), "B": np.log(0.3)}),
              token("]] not [[B]]", a=1.0))
    assert verdict_probability(judged(tokens, Choice(), task=task)[0], Choice()) == pytest.approx(0.7)


def test_certainty_by_hand():
    before = np.array([[0.6, 0.6], [0.4, np.nan], [0.5, 0.5]])
    after = np.array([[0.9, 0.9], [0.1, 0.1], [0.2, np.nan]])
    labels = np.array([0, 0, 1])
    found = certainty(before, after, labels)
    h = verdict_entropy
    np.testing.assert_allclose(found.entropy.value, np.mean([h(0.9) - h(0.6), h(0.1) - h(0.4), h(0.2) - h(0.5)]))
    np.testing.assert_allclose(found.accuracy.value, (0 + 0 + 0.5) / 3)  # of 0.5 a coin made 1
    # confidences .6 .6 .6 .5 right 1 1 0 .5, and .9 .9 .9 .8 right 1 1 0 1
    np.testing.assert_allclose(found.calibration, [(3 * 0.6 - 2) / 4 * -1, (abs(2.7 - 2) + 0.2) / 4])
    assert found.artificial == (found.entropy.high < 0)
    assert np.isnan(vote_probability(np.array([UNREAD]))) and vote_probability(np.array([0, TIE])) == 0.75
    coverage, risk = risk_coverage(*confidence(np.array([0.9, 0.6, 0.2]), np.array([0, 1, 1])))
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1]) and risk.tolist() == pytest.approx([0, 0, 1 / 3])
    with pytest.raises(ValueError, match="read both times, got none"):
        certainty(before, np.full((3, 2), np.nan), labels)
    with pytest.raises(ValueError, match="after, labels: expected shapes"):
        certainty(before, after[:2], labels)


# --- over the local sampler ---

@pytest.fixture(scope="module")
def model():
    tokenizer = letter_tokenizer()
    return LocalModel(tiny_causal_lm(tokenizer, seed=0, positions=512), tokenizer)


def test_over_a_local_model_it_is_the_loop_by_hand(model):
    "Letters are tokens: what is counted is what is written. This model never closes its thinking."
    requests = [ask("which", 40, temperature=1.0, seed=3), ask("a longer question", 40, seed=4)]
    forced = BudgetForcing(model, waits=0, answer_tokens=10, continuation=" wait").generate(requests)
    for request, got in zip(requests, forced, strict=True):
        [thought] = model.generate([replace(request, prefix="<think>", max_new_tokens=30, stop=("</think>",))])
        closed = "<think>" + thought.text + "</think>"
        assert got.text.startswith(closed) and got.thoughts == (thought.text,)
        assert got.thinking_tokens == len(thought.text + "</think>")
        assert got.completion_tokens == len(got.text) - len("<think>")
        assert got.truncated == (thought.finish_reason == "length")
        assert got.prompt_tokens == len(prompt_text(model.tokenizer, request) + "<think>")


def test_a_local_model_that_ends_early_is_made_to_go_on(model):
    "Where the end of text is likely, thoughts end by themselves; the others are cut."
    requests = ask("which", 120, temperature=3.0).times(12)
    forced = BudgetForcing(model, waits=2, answer_tokens=10, continuation=" wait").generate(requests)
    whole = [got for got in forced if not got.truncated]
    assert 0 < len(whole) and all(got.text.count(" wait") == 2 == len(got.thoughts) - 1 for got in whole)
    for got in forced:
        thinking = got.text.removeprefix("<think>").rpartition("</think>")[0]
        assert thinking == " wait".join(got.thoughts) and sum(map(len, got.thoughts)) <= 110
    assert forced == BudgetForcing(model, waits=2, answer_tokens=10, continuation=" wait").generate(requests)


def test_a_curve_of_a_local_model_counts_every_outcome(model):
    judge = Judge(BudgetForcing(model, answer_tokens=4, continuation=" wait"), Choice(), max_new_tokens=24)
    curve = n_curve(judge, TASKS[:3], LABELS[:3], waits=(0, 1))
    assert [o["missing"] for o in curve.outcomes] == [6, 6]
    assert set(trend(curve)) == {"slope per wait", "gain", "truncated at the last", "s1 performance"}
    assert isinstance(curve, Curve) and curve.verdicts.shape == (3, 2, 2) and (curve.verdicts == UNREAD).all()
    assert estimate(curve.right[:, 0]).value == 0 and (curve.thinking < curve.tokens).all()


def test_rounds_do_not_read_again_what_a_local_model_wrote(model, monkeypatch):
    "Each round by a new model, which remembers nothing, says the same after more reading."
    class Forgetful:
        can = model.can

        def generate(self, requests):
            return LocalModel(model.lm, model.tokenizer).generate(requests)

    tokens, forward = [], llama.LlamaReader.__call__

    def counting(self, new, mask):
        tokens[-1] += new.numel()
        return forward(self, new, mask)

    monkeypatch.setattr(llama.LlamaReader, "__call__", counting)
    said = []
    for generator in (model, Forgetful()):
        tokens.append(0)
        forcing = BudgetForcing(generator, waits=2, answer_tokens=10, continuation=" wait")
        said.append(forcing.generate(ask("which", 120, temperature=3.0).times(12)))
    assert said[0] == said[1] and tokens[0] < 0.8 * tokens[1]
