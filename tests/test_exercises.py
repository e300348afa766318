"""Solutions of the notebooks' exercises, one function each, named in the exercise's text. Look only afterwards."""

from types import SimpleNamespace

import numpy as np
import torch

from alignkit.models.language import Tokens
from alignkit.models.scores import Scores, tiny_scorelm
from alignkit.papers import bspo
from alignkit.rl.algorithms import BSPO, until_unsupported
from alignkit.rl.rollout import Rollout, whiten
from alignkit.worlds.grammar import TokenGrammar, grammar_tokenizer, sample_sentences
from alignkit.worlds.mdp import q_values, random_mdp

# ---- 01_bspo -------------------------------------------------------------------------


def penalised_iteration(mdp, weight, beta_outside=1e-4, steps=30):
    "Policy iteration on the proxy less a fine of weight × −log β, instead of the floor."
    fine = weight * -np.log(np.where(mdp.supported, 1.0, beta_outside))
    policy = np.full(mdp.proxy.shape, 1 / mdp.proxy.shape[1])
    for _ in range(steps):
        policy = bspo.greedy(q_values(mdp, policy, mdp.proxy - fine))
    return policy.astype(bool)


def test_bspo_1_a_penalty_has_a_price_and_the_floor_has_none():
    left = [(penalised_iteration(mdp, 0.02) & ~mdp.supported).any()
            for mdp in map(random_mdp, range(20))]
    assert any(left)  # a reward that is high enough pays any finite fine
    # What the floor has and a fine has not: no return lies below it, whatever the reward is.
    for seed in range(20):
        mdp = random_mdp(seed)
        last = bspo.supported_policy_iteration(mdp)[-1].astype(bool)
        assert not (last & ~mdp.supported).any()


def test_bspo_2_a_deep_floor_drowns_the_rest_if_it_is_whitened_with_it():
    torch.manual_seed(0)
    T, supported = 8, torch.rand(64, 8) > 0.05
    rollout = Rollout(
        inputs=None, logps=torch.zeros(64, T), rewards=torch.randn(64, T) * 0.1,
        terminated=torch.arange(T).expand(64, T) == T - 1,
        truncated=torch.zeros(64, T).bool(), mask=torch.ones(64, T).bool(),
        values=torch.zeros(64, T + 1), supported=supported)
    sizes = {}
    for v_min in (-1.0, -100.0):
        kept = until_unsupported(supported) & supported
        algorithm = BSPO(v_min=v_min, lam=0.0)
        ours = algorithm.targets(rollout).advantages[kept]
        raw, _ = bspo_gae(rollout, v_min)
        everywhere = whiten(raw, torch.ones_like(supported))[kept]
        sizes[v_min] = (float(ours.std()), float(everywhere.std()))
    assert abs(sizes[-100.0][0] - sizes[-1.0][0]) < 0.2  # over supported steps: as before
    assert sizes[-100.0][1] < sizes[-1.0][1] / 10  # over all: an ID action learns nothing


def bspo_gae(rollout, v_min):
    from alignkit import ops

    return ops.supported_gae(rollout.rewards, rollout.values, rollout.supported, v_min, 1.0,
                             0.0, terminated=rollout.terminated, mask=rollout.mask)


class LogFine:
    "The score less weight × −log β for every unsupported token."

    def __init__(self, scorelm, eps_beta, weight):
        self.scorelm, self.eps_beta, self.weight = scorelm, eps_beta, weight

    @torch.no_grad()
    def __call__(self, rollout):
        scored = self.scorelm(rollout.inputs, self.eps_beta)
        surprise = -scored.behaviour.logps.masked_fill(scored.behaviour.supported, 0.0)
        return Scores(scored.scores - self.weight * surprise.sum(1))


def test_bspo_3_a_fine_that_grows_with_surprise():
    ids = torch.from_numpy(sample_sentences(TokenGrammar(0), 6, seed=0))
    rollout = SimpleNamespace(inputs=Tokens(ids, torch.ones_like(ids).bool(), 1))
    scorelm = tiny_scorelm(grammar_tokenizer(), seed=0)
    with torch.no_grad():
        logps = scorelm(rollout.inputs).behaviour.logps
        scores = scorelm.scores(rollout.inputs)
    eps_beta = float(logps.exp().median())
    expected = scores + 0.5 * torch.where(logps.exp() > eps_beta, 0.0, logps).sum(1)
    assert torch.allclose(LogFine(scorelm, eps_beta, 0.5)(rollout).rewards, expected)
    assert torch.equal(LogFine(scorelm, 0.0, 0.5)(rollout).rewards, scores)
