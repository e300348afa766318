"""Methods without a critic: their advantages and averages from the formulas, and real training."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from test_rl import World, random_rollout

from alignkit.models.language import Evaluation, LanguagePolicy
from alignkit.models.scores import Scores
from alignkit.rl.algorithms import (
    GRPO,
    PPO,
    RLOO,
    Batch,
    DrGRPO,
    ReinforcePlusPlus,
    Targets,
)
from alignkit.rl.train import train
from alignkit.storage import Checkpoints


def group_rewards(rollout, beta=0.0):
    """{group: [(row, reward)]}, the distance from the reference paid for."""
    found = {}
    for b, group in enumerate(rollout.group_ids.tolist()):
        paid = rollout.rewards[b] - beta * (rollout.logps[b] - rollout.ref_logps[b])
        found.setdefault(group, []).append((b, float(paid[rollout.mask[b]].sum())))
    return found


def test_grpo_compares_with_the_group():
    rollout = random_rollout()
    found = GRPO(eps=0.25).targets(rollout)
    plain = DrGRPO(max_tokens=6).targets(rollout)
    assert found.value_targets is None and torch.equal(found.mask, rollout.mask)
    for rows in group_rewards(rollout).values():
        rewards = [reward for _, reward in rows]
        for b, reward in rows:
            gain = reward - statistics.mean(rewards)
            expected = gain / (statistics.stdev(rewards) + 0.25)
            assert found.advantages[b].item() == pytest.approx(expected, abs=1e-5)
            assert plain.advantages[b].item() == pytest.approx(gain, abs=1e-5)


def test_rloo_pays_for_the_distance_and_compares_with_the_others():
    rollout = random_rollout()
    found = RLOO(beta=0.3).targets(rollout).advantages
    for rows in group_rewards(rollout, beta=0.3).values():
        for b, reward in rows:
            others = statistics.mean(r for other, r in rows if other != b)
            assert found[b].item() == pytest.approx(reward - others, abs=1e-5)


def test_reinforce_plus_plus_credits_what_follows():
    rollout, gamma = random_rollout(), 0.9
    returns = {}
    for b, t in rollout.mask.nonzero().tolist():
        steps = [s for s in rollout.mask[b].nonzero()[:, 0].tolist() if s >= t]
        paid = rollout.rewards[b] - 0.3 * (rollout.logps[b] - rollout.ref_logps[b])
        returns[b, t] = sum(gamma**i * float(paid[s]) for i, s in enumerate(steps))
    mean, deviation = (f(returns.values()) for f in (statistics.mean, statistics.stdev))
    found = ReinforcePlusPlus(beta=0.3, gamma=gamma).targets(rollout).advantages
    for (b, t), value in returns.items():
        assert found[b, t].item() == pytest.approx((value - mean) / deviation, abs=1e-4)


def surrogates(algorithm, rollout, logps, advantages):
    """The surrogate of each counted step, in a list for each row."""
    rows = [[] for _ in range(len(rollout))]
    for b, t in rollout.mask.nonzero().tolist():
        ratio, a = math.exp(logps[b, t] - rollout.logps[b, t]), float(advantages[b])
        within = min(max(ratio, 1 - algorithm.eps_low), 1 + algorithm.eps_high)
        d = float(rollout.ref_logps[b, t] - logps[b, t])
        rows[b].append(-min(a * ratio, a * within) + algorithm.beta * (math.exp(d) - d - 1))
    return rows


@pytest.mark.parametrize("algorithm, average", [
    (GRPO(beta=0.2), lambda rows: statistics.mean(map(statistics.mean, rows))),
    (GRPO(beta=0.2, average="token", eps_high=0.4), lambda rows: statistics.mean(sum(rows, []))),
    (DrGRPO(max_tokens=9, beta=0.2), lambda rows: sum(sum(rows, [])) / (9 * len(rows))),
])  # fmt: skip
def test_how_steps_are_averaged(algorithm, average):
    rollout, g = random_rollout(), torch.Generator().manual_seed(3)
    logps = rollout.logps + 0.3 * torch.randn(rollout.logps.shape, generator=g)
    targets = algorithm.targets(rollout)
    loss, figures = algorithm.loss(Batch(rollout, targets), Evaluation(logps, logps * 0))
    expected = average(surrogates(algorithm, rollout, logps, targets.advantages))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert 0 < figures["clip_ratio/region_mean"] < 1


def test_rloo_clips_whole_answers():
    rollout = replace(random_rollout(), mask=torch.ones(5, 6).bool())
    logps, advantages = rollout.logps + 0.1, torch.tensor([1.0, -1.0, 2.0, 0.0, -2.0])
    batch = Batch(rollout, Targets(advantages, None, rollout.mask))
    loss, figures = RLOO().loss(batch, Evaluation(logps, logps * 0))
    ratio = math.exp(0.6)  # six tokens; beyond 1.2, so good news is held back
    assert loss.item() == pytest.approx(-(1.2 - ratio + 2 * 1.2 - 2 * ratio) / 5, rel=1e-5)
    assert figures["clip_ratio/high_mean"].item() == pytest.approx(2 / 5)


def test_a_row_that_does_not_apply_has_no_say():
    rollout = random_rollout()
    rollout.mask[3] = False
    for algorithm in (GRPO(), RLOO(), DrGRPO(max_tokens=6)):
        advantages = algorithm.targets(rollout).advantages
        without = replace(rollout, rewards=rollout.rewards.index_fill(0, torch.tensor([3]), 99.0))
        assert advantages[3] == 0
        assert torch.equal(algorithm.targets(without).advantages, advantages)


@pytest.mark.parametrize("algorithm", [GRPO(), RLOO(), ReinforcePlusPlus(),
                                       DrGRPO(max_tokens=6)])  # fmt: skip
def test_training_without_a_critic_raises_the_reward(algorithm, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "every", 0.0)

    def scorer(rollout):
        threes = (rollout.inputs.completion_ids == 3).float()
        return Scores(threes.where(rollout.mask, 0.0).sum(1))

    def run(rounds, checkpoints=None):
        world = World()
        world.scorer = scorer
        return train(world.collector(group_size=4, batch_size=32), world.policy, None, algorithm,
                     rounds=rounds, lr=3e-3, seed=0, checkpoints=checkpoints)  # fmt: skip

    history = run(12)
    assert history[-1]["reward"] > history[0]["reward"] + 0.1
    assert "value_loss" not in history[0]
    run(5, Checkpoints(tmp_path))
    assert run(12, Checkpoints(tmp_path)) == history


def test_the_collector_says_which_rows_answer_the_same_prompt():
    world = World()
    rollout = world.collector(group_size=4)(0)
    assert rollout.group_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    prompts = rollout.inputs.prompt_ids
    assert torch.equal(prompts[:4], prompts[:1].expand(4, -1))
    assert world.collector()(0).group_ids is None


@pytest.mark.parametrize("dtype, bound", [(None, 1e-5), (torch.bfloat16, 0.05)])
def test_sampling_and_training_agree_on_log_probabilities(dtype, bound):
    world = World()
    world.policy = LanguagePolicy(world.policy.lm, compute_dtype=dtype)
    history = world.train()
    name = "sampling/sampling_logp_difference"
    assert all(0 <= line[f"{name}/mean"] <= line[f"{name}/max"] < bound for line in history)


def test_a_sampler_of_another_policy_shows():
    world, name = World(), "sampling/sampling_logp_difference"
    collect = world.collector()

    def off_policy(round_):
        rollout = collect(round_)
        return replace(rollout, logps=rollout.logps - 0.5)

    assert world.train(off_policy)[0][f"{name}/max"] == pytest.approx(0.5, abs=1e-4)


def test_the_figures_have_trls_names_and_say_what_the_rollout_says():
    world = World()
    collect, seen = world.collector(group_size=2), []

    def watched(round_):
        seen.append(collect(round_))
        return seen[-1]

    line, rollout = train(watched, world.policy, None, GRPO(), rounds=1, lr=1e-3, seed=0)[0], seen[0]
    rewards, lengths = rollout.rewards.sum(1), rollout.mask.sum(1)
    assert line["reward"] == pytest.approx(rewards.mean().item(), abs=1e-6)
    assert line["reward_std"] == pytest.approx(rewards.std().item(), abs=1e-6)
    assert line["completions/min_length"] == lengths.min()
    assert line["completions/max_length"] == lengths.max()
    assert line["num_tokens"] == lengths.sum()
    assert {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "entropy",
            "completions/mean_length", "frac_reward_zero_std"} <= set(line)  # fmt: skip


def test_what_is_missing_is_named():
    rollout = random_rollout()
    with pytest.raises(ValueError, match="^group_ids: expected which rows answer the same prompt"):
        GRPO().targets(replace(rollout, group_ids=None))
    with pytest.raises(ValueError, match="^ref_logps: expected .* because beta is 0.1"):
        RLOO(beta=0.1).targets(replace(rollout, ref_logps=None))
    with pytest.raises(ValueError, match="^average: expected one of sequence, token, got 'row'"):
        GRPO(average="row")
    batch = Batch(rollout, GRPO().targets(rollout))
    with pytest.raises(ValueError, match="^critic: expected one that values the states, got None"):
        PPO().loss(batch, Evaluation(rollout.logps, rollout.logps), None)
    with pytest.raises(ValueError, match="^ref_logps: expected .* because beta is 0.1"):
        GRPO(beta=0.1).loss(replace_reference(batch), Evaluation(rollout.logps, rollout.logps))


def replace_reference(batch):
    return Batch(replace(batch.rollout, ref_logps=None), batch.targets)
