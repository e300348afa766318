"J1: the world's traces, who writes what in a rollout, the two-number judge, and the jobs end to end."

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alignkit import runs
from alignkit.claims import evaluate, load_results
from alignkit.models.language import LanguagePolicy, tiny_causal_lm
from alignkit.papers import j1, j1_toy
from alignkit.worlds import evidence
from alignkit.worlds.evidence import (
    CLOSE,
    EOS,
    FILLER,
    IDS,
    NO_VERDICT,
    PAD,
    REPORT,
    SLOT,
    SLOTS,
    VERDICT,
    WAIT,
    Items,
    Teacher,
    read,
    sample_items,
    teach,
)


def ids(*lines):
    rows = [[IDS[token] for token in line.split()] for line in lines]
    width = max(map(len, rows))
    return np.array([row + [PAD] * (width - len(row)) for row in rows])


# The world


def test_a_trace_is_read_token_by_token():
    reading = read(ids("s3 a A? Wait s3 b s5 b B? </think> [[B]] <eos>"))
    assert reading.verdicts.tolist() == [1] and reading.thinking.tolist() == [9]
    assert reading.checks.tolist() == [3] and reading.new.sum() == 2
    assert reading.reports[0].tolist() == [-1, -1, 1, -1, 1, -1, -1]  # the latest report counts


@pytest.mark.parametrize("line, verdict", [
    ("s1 a A? </think> [[A]] <eos>", 0),
    ("[[A]] s1 b B? </think> [[B]] <eos>", 1),  # not the first verdict: the one that follows
    ("s1 a </think> [[A]] Wait </think> [[B]]", 1),  # not the first </think>: the last
    ("s1 a A? [[A]] <eos>", NO_VERDICT),
    ("s1 a A? </think> <eos>", NO_VERDICT),
    ("s1 a A? </think>", NO_VERDICT),
])
def test_only_what_follows_the_last_end_of_thinking_is_a_verdict(line, verdict):
    assert read(ids(line)).verdicts.tolist() == [verdict]


def test_the_teacher_is_as_biased_as_it_says():
    items = sample_items(20_000, seed=0)
    reading = read(teach(items, Teacher(), seed=0))
    after = (reading.waits > 0) & (reading.slots >= 0)
    assert abs(reading.new[after].mean() - 0.3) < 0.01
    assert abs((reading.waits[:, -1] > 0).mean() - 0.5) < 0.01
    uniform = read(teach(items, Teacher(p_new=None, reflections=3), seed=0))
    second = uniform.new[:, 4] & (uniform.slots[:, 4] >= 0)
    assert abs(second.sum() / (uniform.slots[:, 4] >= 0).sum() - 6 / 7) < 0.02


def test_reports_are_the_items_winners_but_for_misreadings():
    items = sample_items(5000, seed=1)
    reading = read(teach(items, Teacher(misread=0.05), seed=1))
    seen = reading.reports >= 0
    wrong = (reading.reports != items.winners)[seen].mean()
    assert abs(wrong - 0.05) < 0.01


# The judge of two numbers


@pytest.mark.parametrize("p_new, p_update", [(0.3, 0.3), (0.8, 0.1), (1.0, 1.0), (0.0, 0.5)])
def test_the_closed_form_is_what_the_simulation_does(p_new, p_update):
    played = j1_toy.simulate_toy(p_new, p_update, waits=5, n=60_000, seed=3)
    exact = [j1_toy.toy_accuracy(waits, p_new, p_update) for waits in range(6)]
    assert np.abs(played.accuracy - exact).max() < 4 * 0.5 / np.sqrt(60_000)


def test_imitation_of_all_traces_finds_the_teacher_even_where_updates_are_hidden():
    traces = j1_toy.simulate_toy(0.4, 0.6, waits=3, n=50_000, seed=0)
    assert np.allclose(j1_toy.toy_fit(traces), (0.4, 0.6), atol=0.01)
    assert abs(j1_toy.toy_hidden_fit(traces) - 0.6) < 0.02


# Who writes what


@pytest.fixture(scope="module")
def policy():
    lm = tiny_causal_lm(evidence.evidence_tokenizer(), seed=1, width=32, heads=2)
    with torch.no_grad():  # of a judge that often wants to stop, and sometimes decides
        lm.lm_head.weight[[CLOSE, SLOT, VERDICT]] *= 3
    return LanguagePolicy(lm)


@pytest.fixture(scope="module")
def traces(policy):
    items = sample_items(400, seed=2)
    waits = np.arange(400) % 4
    return items, waits, j1.judge(policy, items, waits, seed=0, misread=0.0)


def test_the_environment_answers_slots_truly_and_alone(traces):
    items, _, samples = traces
    text, sampled = j1.completions(samples), samples.sampled.numpy()
    row, place = np.nonzero((text[:, :-1] >= SLOT) & (text[:, :-1] < SLOT + SLOTS))
    answered = text[row, place + 1] != EOS  # a trace may be cut at its length
    row, place = row[answered], place[answered]
    assert len(row) > 100
    assert (text[row, place + 1] == REPORT + items.winners[row, text[row, place] - SLOT]).all()
    assert not sampled[row, place + 1].any()


def test_as_many_ends_of_thinking_as_asked_for_become_waits(traces):
    _, waits, samples = traces
    text, sampled = j1.completions(samples), samples.sampled.numpy()
    forced = ((text == WAIT) & ~sampled).sum(1)
    assert (forced <= waits).all() and (forced == waits)[waits > 0].any()
    closed = (text == CLOSE).any(1)
    assert closed.any() and (forced == waits)[closed].all()  # no end before all are spent


def test_a_trace_ends_after_its_verdict_and_at_its_length(traces):
    _, waits, samples = traces
    text = j1.completions(samples)
    lengths = (text != PAD).sum(1)
    assert (lengths <= evidence.longest(1) + evidence.REFLECTION * waits).all()
    assert (text == EOS).any(1).all() and not samples.sampled.numpy()[text == EOS].all()
    row, place = np.nonzero((text[:, :-1] == VERDICT) | (text[:, :-1] == VERDICT + 1))
    assert len(row) and (text[row, place + 1] == EOS).all()


def test_forcing_leaves_what_came_before_as_it_was(policy):
    items = sample_items(300, seed=2)
    free, forced = (j1.completions(j1.judge(policy, items, np.full(300, n), seed=0))
                    for n in (0, 1))
    stopped = (free == CLOSE).argmax(1)
    rows = np.flatnonzero((free == CLOSE).any(1))
    assert len(rows) > 20
    for row in rows:
        assert (free[row, :stopped[row]] == forced[row, :stopped[row]]).all()
        assert forced[row, stopped[row]] == WAIT


def test_filler_is_as_long_as_a_reflection_and_nobody_chose_it(policy):
    samples = j1.judge(policy, sample_items(300, seed=2), np.full(300, 1), seed=0,
                       continuation="filler")
    text = j1.completions(samples)
    written = (text == FILLER) & ~samples.sampled.numpy()
    closed = (text == CLOSE).any(1)
    assert closed.any() and (written.sum(1)[closed] == evidence.REFLECTION).all()


def test_rewards_are_right_verdicts_and_the_control_pays_for_coins(policy):
    config = j1.Config(traces=256)
    for random_labels in (False, True):
        collect = j1.JudgeCollector(policy, config, seed=0, forced=True,
                                    random_labels=random_labels)
        rollout = collect(3)
        verdicts = read(rollout.inputs.completion_ids.numpy()).verdicts
        labels = sample_items(256, runs.derive_seed(0, "items", 3)).labels
        agrees = rollout.rewards.sum(1).numpy() == (verdicts == labels)
        assert agrees.all() != random_labels and set(rollout.rewards.sum(1).tolist()) <= {0.0, 1.0}


# What is reported


def test_a_comparison_is_watched_wait_by_wait(policy):
    lines = j1.watch(policy, " abbabbb", waits=2, seed=0, config=j1.Config())
    assert [line[:8] for line in lines] == ["0 Waits:", "1 Waits:", "2 Waits:"]
    for wrong in ("ABB", "ABBABBX"):
        with pytest.raises(ValueError, match="^comparison: expected 7 letters A or B"):
            j1.watch(policy, wrong, waits=0, seed=0, config=j1.Config())


def test_a_wrong_continuation_is_refused(policy):
    with pytest.raises(ValueError, match="^continuation: expected one of wait, filler, got 'x'"):
        j1.judge(policy, sample_items(2, 0), np.zeros(2, int), seed=0, continuation="x")


def test_figures_of_levels_are_counted_by_hand():
    said = ids("s1 a A? </think> [[A]] <eos>", "s2 b B? </think> [[A]] <eos>",
               "s1 a A? </think> <eos>")
    later = ids("s1 a A? Wait s2 b s3 b B? </think> [[B]] <eos>",
                "s2 b B? Wait s2 b s2 b B? </think> [[B]] <eos>",
                "s1 a A? Wait s1 a s1 a A? </think> [[A]] <eos>")
    labels = np.array([0, 1, 0])
    levels = [j1.Sitting(labels, np.stack([read(x).verdicts] * 2, 1), (read(x), read(x)))
              for x in (said, later)]
    curves = j1.level_figures(levels)
    assert np.allclose(curves["accuracy"], [1 / 3, 2 / 3])
    assert np.allclose(curves["accuracy_unread_half"], [1 / 2, 2 / 3])
    assert np.allclose(curves["wrong_to_right"], [0, 2 / 3])
    assert np.allclose(curves["right_to_wrong"], [0, 1 / 3])
    assert np.allclose(curves["follows"], [1 / 3, 1])
    assert np.allclose(curves["thinking"], [3, 9]) and np.isclose(j1.slope(levels), 1 / 3)
    assert np.isclose(np.mean(j1.new_share(levels[1].readings[0])), 2 / 6)


def test_votes_are_bought_with_the_tokens_of_the_forced_trace(policy):
    config = j1.Config(held_out=40, votes=3, waits=1)
    levels = j1.sittings(policy, config, seed=5)
    accuracy = j1.majority_accuracy(policy, levels, config, seed=5)
    assert len(accuracy) == 2 and all(0 <= x <= 1 for x in accuracy)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    config = j1.Config(toy_items=500, demonstrations=400, sft_steps=3, updates=2, traces=16,
                       held_out=20, votes=2, looks=(1,), width=16, heads=2)
    folder = tmp_path_factory.mktemp("j1")
    jobs = j1.jobs(config, [0])
    return jobs, runs.run(jobs, folder, processes=1), folder


def test_every_arm_runs_and_every_claim_finds_its_figures(smoke):
    jobs, records, _ = smoke
    assert {record.arm for record in records} == {"toy", *j1.LABELS}
    results = evaluate(j1.claims(), records, "smoke")
    without = [r["key"] for r in results if r["value"] is None]
    assert set(without) <= {"8b.3-relative", "8b.4-matched", "8b.6"}  # of nothing, too few, all equal
    assert {r["key"].partition("-")[0] for r in results} == {
        "8a.1", "8a.2", "8a.3", *(f"8b.{i}" for i in range(1, 9)), "8b.greedy", "8b.control"}


def test_rl_s_lead_is_also_counted_where_no_verdict_is_worth_one_half():
    """What SFT loses by missing verdicts is no judgement that RL has gained."""
    slopes = {"rl_forced": (0.02, 0.03), "sft": (-0.04, -0.01)}
    records = [SimpleNamespace(arm=arm, seed=7, scalars={"slope": s, "slope_unread_half": half})
               for arm, (s, half) in slopes.items()]
    figures = {claim.key: claim.figure for claim in j1.claims()}
    assert figures["8b.3"](records)[7] == pytest.approx(0.06)
    assert figures["8b.3-half"](records)[7] == pytest.approx(0.04)


def test_committed_claims_are_what_is_claimed_today_of_the_committed_records():
    folder = Path(__file__).parent.parent / "results"
    committed = {claim["key"]: claim for claim in load_results(folder / "j1.json")["claims"]}
    today = evaluate(j1.claims(), runs.load_records(folder, "j1"))
    assert {claim["key"] for claim in today} == set(committed)
    for claim in today:
        held = committed[claim["key"]]
        for name in ("statement", "seeds", "accept", "verdict"):
            assert claim[name] == held[name], claim["key"]
        assert claim["per_seed"] == pytest.approx(held["per_seed"], abs=1e-12), claim["key"]


def test_records_hold_the_curves_that_the_notebook_draws(smoke):
    _, records, _ = smoke
    forced = next(r for r in records if r.arm == "rl_forced")
    assert forced.curves["look"] == [0, 1] and len(forced.curves["slope_at"]) == 2
    assert len(forced.curves["accuracy"]) == len(forced.curves["thinking"]) == 4
    assert [len(forced.texts[f"waits_{n}"]) for n in range(4)] == [j1.SHOWN_TRACES] * 4
    json.dumps(forced.curves, allow_nan=False)


def test_where_digits_are_visible_the_judge_writes_the_reports_itself(policy):
    items = sample_items(200, seed=4, visible=True)
    samples = j1.judge(policy, items, np.full(200, 2), seed=0)
    text, sampled = j1.completions(samples), samples.sampled.numpy()
    row, place = np.nonzero((text[:, :-1] >= SLOT) & (text[:, :-1] < SLOT + SLOTS))
    assert len(row) > 50 and (sampled | np.isin(text, (WAIT, EOS, PAD)))[row, place + 1].all()


def test_drills_teach_to_read():
    lm = tiny_causal_lm(evidence.evidence_tokenizer(), seed=0, width=32, heads=2)
    config = j1.Config(demonstrations=256, drill_steps=3, batch_size=32, visible=True)
    before = lm.lm_head.weight.detach().clone()
    j1.drill(lm, config, seed=0)
    moved = (lm.lm_head.weight.detach() - before).abs().sum(1) > 0
    assert moved[REPORT] and moved[REPORT + 1]


def test_the_attempt_at_the_second_world_has_jobs_of_its_own():
    jobs = j1.reading_jobs()
    assert [job.arm for job in jobs] == ["base", "sft", "rl_forced"]
    assert all(job.config["visible"] and job.seed in j1.BURNT_SEEDS for job in jobs)
    mini = j1.judge_jobs(j1.Config.mini(), 900)
    assert not {job.key for job in jobs} & {job.key for job in mini}
    assert "visible" not in mini[0].config  # its key is as it was before there was a choice


def test_items_show_the_same_evidence_in_both_orders():
    items = Items(np.array([[0, 0, 0, 0, 1, 1, 1]]))
    assert items.labels.tolist() == [0] and items.swapped().labels.tolist() == [1]
