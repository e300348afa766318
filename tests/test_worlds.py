"""The worlds say what their notebooks promise: frequencies, labels, optimum, determinism."""

import itertools

import numpy as np
import pytest

from alignkit.worlds.grammar import (
    PAD,
    UNSUPPORTED_GOLD,
    TokenGrammar,
    demonstration_dataset,
    gold,
    preference_dataset,
    prompt_dataset,
    sample_preferences,
    sample_sentences,
    supported_optimum,
    unsupported,
)
from alignkit.worlds.mdp import q_values, random_mdp, random_tree


def test_a_world_is_a_function_of_its_seed():
    one, same, other = TokenGrammar(3), TokenGrammar(3), TokenGrammar(4)
    assert np.array_equal(one.gold_table, same.gold_table)
    assert not np.array_equal(one.gold_table, other.gold_table)


def test_worlds_share_the_grammar_and_differ_in_gold():
    shared, independent = TokenGrammar(0, "S"), TokenGrammar(0, "I")
    assert np.array_equal(shared.supported, independent.supported)
    assert (independent.gold_table[~independent.supported] == UNSUPPORTED_GOLD).all()


def test_in_world_s_the_next_word_explains_gold_and_in_world_i_it_does_not():
    def explained(world):
        table = np.where(world.supported, world.gold_table, np.nan)[:PAD, :PAD]
        table = table[:, world.supported[:, :PAD].any(0)]
        return np.nanvar(np.nanmean(table, axis=0)) / np.nanvar(table)

    shared = np.mean([explained(TokenGrammar(seed, "S")) for seed in range(20)])
    independent = np.mean([explained(TokenGrammar(seed, "I")) for seed in range(20)])
    assert shared > 0.7 > 0.45 > independent


def test_sentences_follow_the_transition_table():
    world = TokenGrammar(1)
    ids = sample_sentences(world, 40_000, seed=0)
    counts = np.zeros_like(world.transitions)
    np.add.at(counts, (ids[:, :-1].ravel(), ids[:, 1:].ravel()), 1)
    seen = counts[:PAD] / counts[:PAD].sum(1, keepdims=True)
    assert abs(seen - world.transitions[:PAD]).max() < 0.02


def test_labels_are_bradley_terry():
    world = TokenGrammar(2)
    chosen, rejected = sample_preferences(world, 20_000, seed=0)
    margin = gold(world, chosen) - gold(world, rejected)
    expected = 1 / (1 + np.exp(-abs(margin)))
    wins = margin > 0
    assert abs(wins.mean() - expected.mean()) < 0.01
    close = abs(margin) < 0.3
    assert abs(wins[close].mean() - expected[close].mean()) < 0.03


def test_supported_optimum_equals_exhaustive_search():
    world = TokenGrammar(5, length=4)
    best = []
    for prompt in range(PAD):
        paths = np.array([(prompt, *rest) for rest in itertools.product(range(PAD), repeat=4)])
        inside = ~unsupported(world, paths).any(1)
        best.append(gold(world, paths[inside]).max())
    assert supported_optimum(world) == pytest.approx(np.mean(best))


def test_datasets_have_trl_columns():
    world = TokenGrammar(0)
    assert preference_dataset(world, 4, 0).column_names == ["prompt", "chosen", "rejected"]
    assert demonstration_dataset(world, 4, 0).column_names == ["prompt", "completion"]
    assert prompt_dataset(world, 4, 0).column_names == ["prompt"]


@pytest.mark.parametrize("ids", [np.zeros((2, 1), int), np.zeros(3, int), np.zeros((2, 3)),
                                 np.array([[0, 17]]), np.array([[-1, 0]])])
def test_wrong_ids_are_refused_by_name(ids):
    with pytest.raises(ValueError, match="^ids: expected"):
        gold(TokenGrammar(0), ids)


@pytest.mark.parametrize("wrong", [{"world": "X"}, {"successors": 0}, {"successors": 16}])
def test_wrong_worlds_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
        TokenGrammar(0, **wrong)


def test_the_proxy_is_optimistic_exactly_where_there_is_no_data():
    excess = np.concatenate([(m.proxy - m.gold)[~m.supported] for m in map(random_mdp, range(20))])
    # gold is −0.5 there and the proxy a uniform reward plus 0.6 on average
    assert excess.mean() == pytest.approx(0.5 + 0.5 + 0.6, abs=0.05)


def test_q_values_are_discounted_returns():
    mdp = random_mdp(0, states=4, actions=2)
    policy = np.full((4, 2), 0.5)
    state_step = np.einsum("sa,sax->sx", policy, mdp.transitions)
    returns = np.zeros(4)
    for _ in range(500):
        returns = (policy * mdp.gold).sum(1) + mdp.gamma * state_step @ returns
    q = q_values(mdp, policy, mdp.gold)
    assert np.allclose((policy * q).sum(1), returns)


def test_every_inner_tree_state_has_one_predecessor():
    tree = random_tree(0, depth=3, actions=3)
    following = tree.transitions.argmax(-1)
    entered = np.bincount(following.ravel(), minlength=len(following))
    assert entered[0] == 0 and (entered[1:-1] == 1).all()
