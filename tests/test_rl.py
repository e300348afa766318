"""PPO and BSPO against loops written from the formulas, and the pitfalls of each."""

import math
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from alignkit.generate.local import Samples
from alignkit.models.language import (
    Evaluation,
    LanguagePolicy,
    Tokens,
    tiny_causal_lm,
    tiny_critic,
)
from alignkit.models.scores import ScoreLMScorer, Scores, tiny_scorelm
from alignkit.rl.algorithms import (
    BSPO,
    GRPO,
    PPO,
    RLOO,
    Batch,
    DrGRPO,
    ReinforcePlusPlus,
    Targets,
    health,
    penalised_rewards,
)
from alignkit.rl.language import LanguageCollector, score_samples
from alignkit.rl.rollout import Rollout, masked_mean, whiten
from alignkit.rl.train import train, zero_std_share
from alignkit.training import NotFinite, load_dump
from alignkit.worlds.grammar import grammar_tokenizer


def random_rollout():
    B, T, g = 5, 6, torch.Generator().manual_seed(0)
    mask = torch.ones(B, T).bool()
    mask[0, 4:] = False
    ends = torch.zeros(B, T).bool()
    ends[:, -1], ends[0, -1], ends[0, 3] = True, False, True
    return Rollout(
        inputs=torch.arange(B), logps=-torch.rand(B, T, generator=g),
        rewards=torch.randn(B, T, generator=g) * mask, terminated=ends,
        truncated=torch.zeros_like(ends), mask=mask, values=torch.randn(B, T + 1, generator=g),
        supported=torch.rand(B, T, generator=g) > 0.2, ref_logps=-torch.rand(B, T, generator=g),
        group_ids=torch.tensor([3, 3, 0, 0, 0]))


def slow_gae(rewards, values, ends, mask, gamma, lam):
    "Row by row, over the unmasked steps only."
    out = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        steps = mask[b].nonzero()[:, 0].tolist()
        carry = 0.0
        for i in reversed(range(len(steps))):
            t = steps[i]
            following = steps[i + 1] if i + 1 < len(steps) else rewards.shape[1]
            alive = 0.0 if ends[b, t] else 1.0
            delta = rewards[b, t] + gamma * alive * values[b, following] - values[b, t]
            carry = delta + gamma * lam * alive * carry
            out[b, t] = carry
    return out


def test_ppo_targets_are_gae_whitened_over_what_counts():
    rollout = random_rollout()
    found = PPO(gamma=0.9, lam=0.8).targets(rollout)
    expected = slow_gae(rollout.rewards, rollout.values, rollout.terminated, rollout.mask, .9, .8)
    assert torch.allclose(found.value_targets[rollout.mask],
                          (expected + rollout.values[:, :-1])[rollout.mask], atol=1e-5)
    counted = found.advantages[rollout.mask]
    assert counted.mean().abs() < 1e-5 and counted.std().item() == pytest.approx(1, abs=1e-4)


def test_the_kl_penalty_is_paid_step_by_step():
    rollout = random_rollout()
    paid = rollout.rewards - penalised_rewards(rollout, 0.1)
    assert torch.allclose(paid, 0.1 * (rollout.logps - rollout.ref_logps), atol=1e-6)
    rollout.ref_logps = None
    with pytest.raises(ValueError, match="^ref_logps: expected"):
        PPO(beta=0.1).targets(rollout)


def test_bspo_on_supported_rollouts_is_ppo():
    rollout = random_rollout()
    rollout.supported = torch.ones_like(rollout.mask)
    bspo, ppo = BSPO(v_min=-9).targets(rollout), PPO().targets(rollout)
    assert torch.equal(bspo.mask, ppo.mask)
    assert torch.allclose(bspo.advantages[bspo.mask], ppo.advantages[ppo.mask], atol=1e-6)


def test_nothing_after_an_unsupported_step_counts():
    rollout = random_rollout()
    rollout.supported[1] = torch.tensor([True, False, True, True, True, True])
    mask = BSPO(v_min=-9).targets(rollout).mask
    assert mask[1].tolist() == [True, True, False, False, False, False]


def test_padding_counts_as_supported_whatever_the_scorer_says():
    rollout = random_rollout()
    rollout.supported = torch.ones_like(rollout.mask)
    clean = BSPO(v_min=-9).targets(rollout)
    rollout.supported = rollout.mask.clone()  # False at padding
    assert torch.equal(BSPO(v_min=-9).targets(rollout).advantages[rollout.mask],
                       clean.advantages[rollout.mask])


def test_whitening_over_everything_would_flatten_supported_advantages():
    rollout = random_rollout()
    rollout.supported = torch.ones_like(rollout.mask)
    rollout.supported[2, 3] = False
    targets = BSPO(v_min=-15.0, lam=0.0).targets(rollout)  # the floor stays with its token
    inside = targets.mask & rollout.supported
    assert targets.advantages[inside].std().item() == pytest.approx(1, abs=1e-4)
    assert whiten(targets.advantages, targets.mask)[inside].std() < 0.6
    assert targets.advantages[2, 3] < -5


def test_loss_adds_up_by_hand():
    rollout = random_rollout()
    shape = rollout.mask.shape
    targets = Targets(torch.ones(shape), torch.zeros(shape), rollout.mask)
    evaluation = Evaluation(rollout.logps.clone(), torch.full(shape, 0.7))
    values = torch.full(shape, 2.0)
    loss, figures = PPO(entropy_coef=0.1, value_coef=0.25).loss(
        Batch(rollout, targets), evaluation, values)
    assert loss.item() == pytest.approx(-1 + 0.25 * 2 - 0.1 * 0.7, abs=1e-6)
    assert figures["approx_kl"].item() == pytest.approx(0, abs=1e-6)


def test_missing_columns_are_refused_by_name():
    rollout = random_rollout()
    rollout.values = None
    with pytest.raises(ValueError, match="^values: expected"):
        PPO().targets(rollout)
    rollout = random_rollout()
    rollout.supported = None
    with pytest.raises(ValueError, match="^supported: expected"):
        BSPO(v_min=-9).targets(rollout)


def test_masked_mean_ignores_nan_outside_the_mask():
    x = torch.tensor([1.0, float("nan"), 3.0])
    assert masked_mean(x, torch.tensor([True, False, True])) == 2.0
    assert masked_mean(x, torch.zeros(3).bool()) == 0.0


def test_health_speaks_up_and_stays_silent():
    fine = {"grad_norm": 0.3, "entropy": 1.0, "clip_ratio/region_mean": 0.2, "supported": 0.9}
    assert health([]) == [] and health([fine | {"gold": 1.0}] + [fine] * 9) == []
    for name, value, word in (("grad_norm", 0.0, "dead"), ("entropy", 0.01, "collapsed"),
                              ("clip_ratio/region_mean", 0.8, "clipped"),
                              ("supported", 0.2, "support")):
        findings = health([fine] + [fine | {name: value}] * 5)
        assert len(findings) == 1 and word in findings[0]


def finished_samples():
    ids = torch.tensor([[1, 2, 3, 16], [4, 5, 6, 7], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    sampled = mask[:, 1:].clone()
    sampled[1, 0] = sampled[2, 2] = False  # written by somebody else
    return Samples(Tokens(ids, mask, 1), torch.zeros(3, 3), sampled, mask[:, 3].logical_not())


def test_the_score_arrives_at_the_last_token_that_the_policy_chose():
    rollout = score_samples(finished_samples(), lambda r: Scores(torch.tensor([5.0, 7.0, 9.0])))
    assert rollout.rewards.tolist() == [[0, 5, 0], [0, 0, 7], [0, 9, 0]]
    assert torch.equal(rollout.terminated, rollout.rewards > 0)
    assert (rollout.mask & rollout.terminated).any(1).all()


def test_a_row_without_a_sampled_token_is_refused():
    samples = finished_samples()
    samples.sampled[1] = False
    with pytest.raises(ValueError, match="^sampled: expected .* row 1"):
        score_samples(samples, lambda r: Scores(torch.zeros(3)))


@pytest.mark.parametrize("rewards", [torch.zeros(2), torch.tensor([1.0, 0.0, float("nan")])])
def test_a_scorer_that_returns_nonsense_is_named(rewards):
    with pytest.raises(ValueError, match="^scorer: expected"):
        score_samples(finished_samples(), lambda r: Scores(rewards))


class World:
    "A tiny language policy, critic and scorer with a place for a fault in each."

    def __init__(self):
        self.tokenizer = grammar_tokenizer()
        self.policy = LanguagePolicy(tiny_causal_lm(self.tokenizer, seed=0))
        self.critic = tiny_critic(self.tokenizer, seed=1)
        self.algorithm, self.round, self.loss_coef = PPO(), -1, 1.0
        self.prompts = torch.arange(12)[:, None]

    def scorer(self, rollout):
        return Scores(rollout.inputs.completion_ids.float().mean(1))

    def collector(self, **options):
        collect = LanguageCollector(
            self.policy, self.prompts, torch.ones_like(self.prompts).bool(),
            lambda rollout: self.scorer(rollout), max_new_tokens=4, seed=0,
            **{"batch_size": 8} | options)

        def counted(round_):
            self.round = round_
            return collect(round_)

        return counted

    def weights(self):
        return [p.detach().clone() for part in (self.policy, self.critic)
                for p in part.parameters()]

    def train(self, collect=None, **options):
        return train(collect or self.collector(), self.policy, self.critic, self.algorithm,
                     **{"rounds": 3, "lr": 1e-3, "seed": 0} | options)


def in_round_1(world, function, spoil):
    "The function, its result spoiled from round 1 on."
    def wrapped(*arguments):
        result = function(*arguments)
        return spoil(result) if world.round >= 1 else result
    return wrapped


def put(value, *where):
    "Writes a value into one place of a tensor; a gradient still flows."
    def spoil(tensor):
        mask = torch.zeros_like(tensor, dtype=torch.bool)
        mask[where] = True
        return tensor.masked_fill(mask, value)
    return spoil


def spoil_scorer(world, value):
    world.scorer = in_round_1(
        world, world.scorer, lambda scores: Scores(put(value, 5)(scores.rewards)))


def spoil_collector(world, value):
    def spoil(rollout):
        rollout.logps[5, 2] = value  # behind the back of the checks of `Rollout`
        return rollout
    return in_round_1(world, world.collector(), spoil)


def spoil_critic_values(world, value):
    world.critic.values = in_round_1(world, world.critic.values, lambda values: (
        put(value, 5, 1)(values) if len(values) == 8 else values))


def spoil_critic_update(world, value):
    world.critic.values = in_round_1(world, world.critic.values, lambda values: (
        put(value, 1, 1)(values) if len(values) == 2 else values))  # a minibatch


def spoil_policy_logps(world, value):
    world.policy.evaluate = in_round_1(world, world.policy.evaluate, lambda evaluation: (
        Evaluation(put(value, 1, 2)(evaluation.logps), evaluation.entropy)))


def spoil_advantages(world, value):
    class Spoiled(PPO):
        def targets(self, rollout):
            targets = super().targets(rollout)
            return targets if world.round < 1 else Targets(
                put(value, 5, 0)(targets.advantages), targets.value_targets, targets.mask)
    world.algorithm = Spoiled()


def spoil_loss(world, value):
    class Spoiled(PPO):
        def loss(self, batch, evaluation, values):
            loss, figures = super().loss(batch, evaluation, values)
            return loss * (value if world.round >= 1 else 1.0), figures
    world.algorithm = Spoiled()


def spoil_gradient(world, value):
    parameter = next(world.critic.parameters())
    parameter.register_hook(in_round_1(world, lambda gradient: gradient, put(value, 0, 0)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoil, quantity, row", [
    (spoil_scorer, "scorer", 5), (spoil_collector, "logps", 5),
    (spoil_critic_values, "values", 5), (spoil_critic_update, "critic.values", 1),
    (spoil_policy_logps, "policy.logps", 1), (spoil_advantages, "advantages", 5),
    (spoil_loss, "loss, gradient of policy", 0), (spoil_gradient, "gradient of critic", 0)])
def test_every_fault_stops_the_run_before_the_step(
        tmp_path, monkeypatch, spoil, quantity, row, value):
    "Round, quantity and row are named, the dump holds the numbers, the weights are round 0's."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    clean, world = World(), World()
    clean.train(rounds=1)
    before = clean.weights()
    collect = spoil(world, value)
    with pytest.raises(NotFinite, match=f"^round 1: {quantity}.* in row {row}") as caught:
        world.train(collect)
    assert all(map(torch.equal, world.weights(), before))
    info, tensors = load_dump(caught.value.dump)
    assert info["round"] == 1 and f"row {row}" in info["message"]
    if quantity in tensors:
        assert not torch.isfinite(tensors[quantity][row]).all()
    else:
        assert quantity.startswith(("loss", "gradient"))
    assert any(name.endswith("input_ids") for name in tensors)


def policy_loss_of_logits(algorithm, rollout, padding):
    "Loss and gradient in the logits and values of a policy whose padding says anything."
    B, T, V = *rollout.mask.shape, 5
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(B, T, V, generator=g)
    values = torch.randn(B, T + 1, generator=g)
    outside = ~rollout.mask
    logits[outside] = padding * torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    values[:, :-1][outside] = padding
    rollout = replace(rollout, logps=rollout.logps.masked_fill(outside, -padding),
                      ref_logps=rollout.ref_logps.masked_fill(outside, padding),
                      values=rollout.values.clone())
    rollout.values[:, :-1][outside] = padding
    logits.requires_grad_(), values.requires_grad_()
    logps = logits.log_softmax(-1)
    evaluation = Evaluation(logps[..., 0], -(logps.exp() * logps).sum(-1))
    targets = algorithm.targets(rollout)
    loss, figures = algorithm.loss(Batch(rollout, targets), evaluation, values[:, :-1])
    loss.backward()
    gradients = [x.grad for x in (values, logits) if x.grad is not None]
    return [loss.detach(), *figures.values(), *gradients]


WITH_CRITIC = PPO(entropy_coef=0.1, beta=0.1), BSPO(v_min=-9.0, entropy_coef=0.1, beta=0.1)
ALONE = [kind(entropy_coef=0.1, beta=0.1) for kind in (GRPO, RLOO, ReinforcePlusPlus)] + [
    GRPO(average="token", kl="k2", beta=0.1), DrGRPO(max_tokens=9, kl="k1", beta=0.1)]


@pytest.mark.parametrize("padding", [1e4, -1e4])
@pytest.mark.parametrize("algorithm", [*WITH_CRITIC, *ALONE])
def test_what_padding_says_changes_neither_loss_nor_gradient(algorithm, padding):
    rollout = random_rollout()
    rollout.mask[3, 2:4] = False  # in the middle, as text that somebody else wrote
    expected = policy_loss_of_logits(algorithm, rollout, 0.0)
    found = policy_loss_of_logits(algorithm, rollout, padding)
    assert expected[-1][rollout.mask].abs().max() > 0 and not expected[-1][~rollout.mask].any()
    for clean, overflowing in zip(expected, found, strict=True):
        assert torch.equal(clean, overflowing)


def test_groups_without_variance_are_counted():
    rewards = torch.tensor([2.0, 2.0, 1.0, 2.0, 5.0, 5.0])
    groups = torch.tensor([4, 4, 9, 9, 0, 0])
    assert zero_std_share(rewards, groups).item() == pytest.approx(2 / 3)
    assert zero_std_share(rewards, torch.tensor([0, 4, 4, 9, 9, 0])) == 0
    assert zero_std_share(rewards) == 0 and zero_std_share(torch.full((3,), 0.1)) == 1
    assert zero_std_share(rewards[:1], groups[:1]) == 1


@pytest.mark.parametrize("algorithm", [PPO(), BSPO(v_min=-3.0)])
def test_equal_rewards_leave_finite_advantages_and_are_logged(algorithm):
    world = World()
    world.algorithm = algorithm
    world.scorer = lambda rollout: Scores(torch.full((8,), 0.1), rollout.mask)
    history = world.train()
    assert [line["frac_reward_zero_std"] for line in history] == [1.0, 1.0, 1.0]
    assert all(math.isfinite(x) for line in history for x in line.values())


def test_zero_variance_is_counted_over_the_groups_of_the_rollout():
    world = World()
    collect = world.collector(group_size=2)
    by_group = torch.tensor([1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 4.0, 4.0])
    world.scorer = lambda rollout: Scores(by_group)

    def grouped(round_):
        return replace(collect(round_), group_ids=torch.arange(8) // 2)

    history = world.train(grouped, minibatches=3)
    assert history[0]["frac_reward_zero_std"] == pytest.approx(0.75)
    assert world.train()[0]["frac_reward_zero_std"] == 0.0


def test_a_rollout_of_no_variance_at_all_whitens_to_almost_nothing():
    targets = PPO().targets(replace(random_rollout(), rewards=torch.zeros(5, 6),
                                    values=torch.zeros(5, 7)))
    assert targets.advantages.abs().max() < 1e-3


def three_updates(device):
    tokenizer = grammar_tokenizer()
    policy = LanguagePolicy(tiny_causal_lm(tokenizer, seed=0)).to(device)
    critic = tiny_critic(tokenizer, seed=1).to(device)
    scorelm = tiny_scorelm(tokenizer, seed=2).to(device)
    with torch.no_grad():
        scorelm.score_head.weight.copy_(torch.linspace(-1, 1, 32, device=device)[None])
    prompts = torch.arange(16, device=device)[:, None]
    collect = LanguageCollector(policy, prompts, torch.ones_like(prompts).bool(),
                                ScoreLMScorer(scorelm, 0.02), batch_size=32, max_new_tokens=6,
                                seed=0)
    history = train(collect, policy, critic, BSPO(v_min=-3.0), rounds=3, lr=1e-3, seed=0)
    return history, [p.detach().cpu() for p in policy.parameters()]


@pytest.mark.cuda
def test_three_updates_on_the_gpu_equal_three_on_the_cpu():
    (cpu_history, cpu), (gpu_history, gpu) = three_updates("cpu"), three_updates("cuda")
    for line, other in zip(cpu_history, gpu_history, strict=True):
        assert line["reward"] == pytest.approx(other["reward"], abs=1e-2)
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-2)
    for a, b in zip(cpu, gpu, strict=True):
        assert torch.allclose(a, b, atol=3e-3)


def test_three_updates_repeat_to_the_bit():
    (history, one), (again, other) = three_updates("cpu"), three_updates("cpu")
    assert history == again and all(map(torch.equal, one, other))
    assert SimpleNamespace(**history[-1]).grad_norm > 0
