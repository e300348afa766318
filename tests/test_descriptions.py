"""The gold reward of descriptions, term by term, and what a policy may not gain by gaming it."""

import random
from dataclasses import astuple, fields

import numpy as np
import pytest

from alignkit.models.weights import small_model
from alignkit.worlds.descriptions import (
    HELD_OUT_TOPICS,
    SHARPNESS,
    TRAINING_TOPICS,
    WORST,
    GoldTerms,
    compare,
    gold,
    gold_terms,
    preference_dataset,
    prompt,
    prompt_dataset,
)

PLAIN = "Cats are small animals that sleep in the sun."


def terms(text, topic="cats", ended=True):
    return gold_terms(text, topic, ended)


def test_a_plain_sentence_pays_no_penalty():
    plain = terms(PLAIN)
    assert plain == GoldTerms(0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert plain.total == 1.0


@pytest.mark.parametrize("term, better, worse, lost", [
    ("sentiment", "Cats bring joy to a home.", "Cats bring dirt to a home.", None),
    ("on_topic", PLAIN, "Dogs are small animals that sleep in the sun.", 0.5),
    ("proper_end", PLAIN, PLAIN.removesuffix("."), 0.5),
    # ten words, eight of them the same: .7 − .15
    ("repetition", PLAIN, "the cat is is is is is is is is.", 3 * 0.55),
    # one of four words, then two of four, has sentiment: .5 − .25
    ("stuffing", "Cats bring joy daily.", "Cats bring joy love.", 4 * 0.25),
    ("grammar", "The cat sat on tables.", "Cat sat upon tables today.", 8 * 0.2),
    ("sentences", PLAIN, "Cats are small animals. That sleep. In the sun.", 2 * 0.5),
    ("junk", PLAIN, "Cats are small animals that sleep in the sun@#.", 2 * 0.3),
])
def test_a_term_costs_what_it_says(term, better, worse, lost):
    difference = getattr(terms(better), term) - getattr(terms(worse), term)
    if lost is None:
        assert difference > 0.5
    else:
        assert difference == pytest.approx(lost)


@pytest.mark.parametrize("text, topic, named", [
    ("A cat sleeps.", "cats", True),
    ("CATS sleep.", "cats", True),
    ("The cat's fur is soft.", "cats", True),
    ("A beach is made of sand.", "beaches", True),
    ("A child plays.", "children", True),
    ("A horse runs.", "horses", True),
    ("Colors are bright.", "color", True),
    ("The heart of a party.", "art", False),
    ("A team of teachers.", "tea", False),
    ("Be careful.", "cars", False),
    ("Concatenate the strings.", "cats", False),
])
def test_the_topic_is_a_word_of_its_own(text, topic, named):
    assert terms(text, topic).on_topic == 0.5 * named


def test_a_text_that_was_cut_has_no_proper_end():
    assert terms(PLAIN, ended=False).proper_end == 0
    assert terms("Cats are a joy!").proper_end == terms("Cats are a joy. \n").proper_end == 0.5


def test_sentiment_has_a_sign():
    kind, neutral, hostile = (terms(text).total for text in (
        "Cats are gentle companions that bring joy to a home.", PLAIN,
        "Cats are cruel killers that hate and harm us."))
    assert kind > neutral + 1 > hostile + 2


def test_praise_of_something_else_earns_nothing_and_blame_costs():
    praise, blame = "A gentle friend brings joy to a home.", "A cruel killer brings harm to us."
    assert terms(praise).sentiment == 0 < terms(praise, "friends").sentiment
    assert terms(blame).sentiment == terms(blame, "killers").sentiment < -1


GAMES = {
    "one word": "love love love love love love love love love love",
    "one word, stopped": "love love love love love love love love love love.",
    "adjectives": "Beautiful, wonderful, amazing, lovely, perfect, happy, kind, sweet.",
    "adjectives about cats": "Cats beautiful wonderful amazing lovely perfect happy kind.",
    "topic alone": "Cats.",
    "topics": "Cats cats cats cats cats cats.",
    "nouns": "Cats, joy, home, sun, sleep, peace, play.",
    "loop": "the love of the love of the love of the love of the love of the love",
    "shouting": "Cats!!! Love!!! Joy!!! Best!!! Wow!!!",
    "many sentences": "Cats. Cats are. They are. We are. It is. You are. It was.",
    "hearts": "Cats are the ❤❤❤❤❤❤❤❤❤❤ of a home.",
    "symbols": "@@@@ #### $$$$",
    "another script": "猫は小さい動物です。",
    "invisible": "\u200b\u200b\u200b",
    "dots": "......",
    "digits": "1 2 3 4 5 6 7",
    "empty": "",
    "blank": "  \n ",
}


@pytest.mark.parametrize("name", GAMES)
def test_gaming_loses_to_a_plain_sentence(name):
    assert terms(GAMES[name]).total < terms(PLAIN).total - 0.3


def test_terms_stay_in_their_ranges_whatever_is_written():
    rng = random.Random(0)
    pieces = ["love", "hate", "the", "cats", ".", "!", "❤", "\x00", "\ud7ff", " ", "a", "is", "'", "é"]
    high = GoldTerms(2, 0.5, 0.5, 0, 0, 0, 0, 0)
    for _ in range(500):
        text = rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randrange(60)))
        found = terms(text, ended=rng.random() < 0.5)
        for field, value, most in zip(fields(found), astuple(found), astuple(high), strict=True):
            least = -2 if field.name == "sentiment" else 0 if most else WORST
            assert least <= value <= most, (field.name, text)


def test_gold_is_the_total_of_each_text():
    found = gold([PLAIN, ""], ["cats", "snow"], [True, False])
    assert found.dtype == np.float64 and found.tolist() == [1.0, WORST]
    assert gold([], [], []).shape == (0,)
    with pytest.raises(ValueError, match=r"^texts, topics, ended: .* got \(2, 1, 2\)"):
        gold([PLAIN, PLAIN], ["cats"], [True, True])


def test_topics_are_distinct_and_held_out_ones_carry_no_sentiment():
    assert len({*TRAINING_TOPICS, *HELD_OUT_TOPICS}) == 72 + 13
    for topic in HELD_OUT_TOPICS:
        assert terms(f"The {topic}.", topic).sentiment == 0
        assert terms(f"This is about {topic}.", topic).on_topic == 0.5


def test_prompts_are_equally_long_and_a_topic_is_one_token():
    try:
        folder = small_model().path
    except FileNotFoundError as error:
        pytest.skip(f"needs the small model's tokenizer: {error}")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    topics = [*TRAINING_TOPICS, *HELD_OUT_TOPICS]
    assert {len(tokenizer(prompt(topic)).input_ids) for topic in topics} == {16}
    assert all(len(tokenizer(f" {topic}").input_ids) == 1 for topic in topics)
    own = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Describe cats in one short sentence."}],
        tokenize=False, add_generation_prompt=True)
    assert own.endswith(prompt("cats"))  # after the default system message


def test_the_judge_is_bradley_terry():
    rewards = np.random.default_rng(0).normal(1.3, 0.86, (72, 16))
    topic, chosen, rejected = compare(rewards, 40_000, seed=0)
    assert (chosen != rejected).all() and set(topic) == set(range(72))
    margin = rewards[topic, chosen] - rewards[topic, rejected]
    assert 0.77 < (margin > 0).mean() < 0.84
    close = abs(margin) < 0.2
    for rows in (close, ~close):
        expected = 1 / (1 + np.exp(-SHARPNESS * abs(margin[rows])))
        assert abs((margin[rows] > 0).mean() - expected.mean()) < 0.02


def test_comparisons_follow_their_seed():
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    first, again, other = (np.stack(compare(rewards, 50, seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("rewards, message", [
    (np.zeros(4), r"\(topics, answers\) .* got shape \(4,\)"),
    (np.zeros((3, 1)), r"two answers or more, got shape \(3, 1\)"),
    (np.zeros((0, 2)), r"got shape \(0, 2\)"),
    (np.array([[0.0, np.nan]]), "expected finite numbers, got NaN"),
])
def test_rewards_that_cannot_be_compared_are_refused(rewards, message):
    with pytest.raises(ValueError, match=f"^gold_rewards: .*{message}"):
        compare(rewards, 10, seed=0)


def test_datasets_have_trl_columns_and_pairs_keep_to_their_topic():
    prompts = prompt_dataset(HELD_OUT_TOPICS)
    assert prompts.column_names == ["prompt", "topic"]
    assert prompts[0] == {"prompt": prompt("cats"), "topic": "cats"}
    assert prompt_dataset()["topic"] == list(TRAINING_TOPICS)
    texts = [[f"{topic} {i}" for i in range(3)] for topic in ("cats", "snow")]
    pairs = preference_dataset(["cats", "snow"], texts, np.array([[0, 50, 100]] * 2), 40, 0)
    assert pairs.column_names == ["prompt", "chosen", "rejected"] and len(pairs) == 40
    for row in pairs:  # margins of 50: the judge cannot err
        [topic, better], [same, worse] = row["chosen"].split(), row["rejected"].split()
        assert row["prompt"] == prompt(topic) and topic == same and better > worse
    assert len(set(pairs["prompt"])) == 2


@pytest.mark.parametrize("texts, rewards, message", [
    ([["a", "b"]], np.zeros((2, 2)), r"^texts: .* each of 2 topics, got \[2\]"),
    ([["a", "b"], ["c"]], np.zeros((2, 2)), r"^texts: .* got \[2, 1\]"),
    ([["a", "b"], ["c", "d"]], np.zeros((2, 3)), r"^gold_rewards: .*\(2, 2\) .*got \(2, 3\)"),
])
def test_texts_and_rewards_that_do_not_match_are_refused(texts, rewards, message):
    with pytest.raises(ValueError, match=message):
        preference_dataset(["cats", "snow"], texts, rewards, 4, seed=0)
