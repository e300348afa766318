"""Solutions of the notebooks' exercises, one function each, named in the exercise's text. Look only afterwards."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from alignkit.models.language import Tokens
from alignkit.models.scores import Scores, tiny_scorelm
from alignkit.papers import bspo, j1_toy
from alignkit.rl.algorithms import BSPO, until_unsupported
from alignkit.rl.rollout import Rollout, whiten
from alignkit.worlds import evidence
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


# ---- 05_j1 ---------------------------------------------------------------------------


def test_j1_1_the_second_look_helps_nobody():
    "With an even number of looks, the last one either changes nothing or makes a tie for a coin."
    for slots, p in ((7, 0.5), (9, 0.35), (5, 0.2)):
        for k in range(2, slots, 2):
            assert np.isclose(evidence.ceiling(k, slots, p), evidence.ceiling(k - 1, slots, p))
    # so a judge that always sees something new gains from every other Wait only
    gains = np.diff([j1_toy.toy_accuracy(waits, 1.0, 1.0) for waits in range(7)])
    assert (gains[1::2] < 1e-12).all() and (gains[0::2] > 0.02).all()


def test_j1_2_selecting_how_and_not_only_what_moves_the_habits():
    traces = j1_toy.simulate_toy(0.3, 0.3, waits=2, n=100_000, seed=0)
    right = traces.verdicts[:, -1] == traces.labels
    careful = right & traces.updated.any(1) & (traces.new.sum(1) >= 2)
    by_outcome, by_process = (j1_toy.toy_fit(traces[rows]) for rows in (right, careful))
    assert max(abs(np.subtract(by_outcome, 0.3))) < 0.02
    assert min(np.subtract(by_process, 0.3)) > 0.2
    gain = [j1_toy.toy_accuracy(4, *judge) - j1_toy.toy_accuracy(0, *judge)
            for judge in (by_outcome, by_process)]
    assert gain[1] > 2 * gain[0]


def first_leaning(ids):  # (n, T) -> (n,)
    leans = (ids >= evidence.LEANING) & (ids <= evidence.LEANING + evidence.B)
    first = ids[np.arange(len(ids)), leans.argmax(1)] - evidence.LEANING
    return np.where(leans.any(1), first, evidence.NO_VERDICT)


def test_j1_3_a_parser_that_stops_at_the_first_opinion_sees_no_scaling():
    items = evidence.sample_items(4000, seed=0)
    teacher = evidence.Teacher(p_new=1.0, p_update=1.0, p_reflect=1.0)
    traces = {n: evidence.teach(items, replace(teacher, reflections=n), seed=0) for n in (0, 2)}
    last = [(evidence.read(ids).verdicts == items.labels).mean() for ids in traces.values()]
    first = [(first_leaning(ids) == items.labels).mean() for ids in traces.values()]
    assert last[1] - last[0] > 0.1
    assert abs(first[1] - first[0]) < 0.03
