"""Supervised and preference losses against transformers and against the written formula."""

import pytest
import torch

from alignkit.models.language import encode, encode_prompts, tiny_causal_lm
from alignkit.models.scores import tiny_scorelm
from alignkit.preferences import (
    Demonstrations,
    PreferencePairs,
    ScoreLMObjective,
    SFTObjective,
    encode_pairs,
    fit_scorelm,
    fit_sft,
)
from alignkit.worlds.grammar import TokenGrammar, grammar_tokenizer, preference_dataset


@pytest.fixture(scope="module")
def tokenizer():
    return grammar_tokenizer()


def ragged_rows():
    return {"prompt": ["a", "b c d"], "chosen": ["e f", "g"], "rejected": ["h", "i j k"]}


def test_sft_loss_is_transformers_loss_on_the_completion(tokenizer):
    lm, rows = tiny_causal_lm(tokenizer, seed=0), ragged_rows()
    tokens = encode(tokenizer, rows["prompt"], rows["chosen"])
    labels = tokens.input_ids.masked_fill(~tokens.attention_mask, -100)
    labels[:, : tokens.prompt_length] = -100
    positions = (tokens.attention_mask.long().cumsum(1) - 1).clamp(min=0)
    theirs = lm(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask.long(),
                position_ids=positions, labels=labels).loss
    ours, _ = SFTObjective(lm)(Demonstrations(tokens, tokens.completion_mask))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_sft_learns_nothing_from_tokens_outside_the_mask(tokenizer):
    rows = {"prompt": ["a", "b"], "chosen": ["e f g", "h i j"]}
    tokens = encode(tokenizer, rows["prompt"], rows["chosen"])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    labels = tokens.input_ids.clone()
    labels[:, 1:][~mask] = labels[:, 0] = -100
    lm = tiny_causal_lm(tokenizer, seed=0)
    theirs = lm(input_ids=tokens.input_ids, labels=labels).loss
    ours, _ = SFTObjective(lm)(Demonstrations(tokens, mask))
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("mask", [torch.ones(2, 1).bool(), torch.ones(2, 2), torch.ones(2, 2).bool()])
def test_masks_of_demonstrations_are_checked(tokenizer, mask):
    tokens = encode(tokenizer, ["a", "b"], ["e f", "g"])
    with pytest.raises(ValueError, match="^mask: expected"):
        fit_sft(tiny_causal_lm(tokenizer, seed=0), tokens, mask=mask, steps=1, batch_size=2,
                lr=1e-3, seed=0)


def test_scorelm_loss_is_the_formula_row_by_row(tokenizer):
    scorelm, pairs = tiny_scorelm(tokenizer, seed=0), encode_pairs(tokenizer, ragged_rows())
    torch.nn.init.normal_(scorelm.score_head.weight)
    loss, _ = ScoreLMObjective(scorelm, lm_coef=0.3)(pairs)
    preference, log_beta, count = 0.0, 0.0, 0
    for row in range(2):
        scores = []
        for side in (pairs.chosen, pairs.rejected):
            real = side.attention_mask[row]
            ids = side.input_ids[row][real][None]
            prompt = int(real[: side.prompt_length].sum())
            out = scorelm.lm(input_ids=ids, output_hidden_states=True)
            scores.append(scorelm.score_head(out.hidden_states[-1][0, -1]))
            logp = out.logits[0].log_softmax(-1)[prompt - 1 : -1]
            log_beta += logp.gather(1, ids[0, prompt:, None]).sum()
            count += ids.shape[1] - prompt
        preference -= torch.sigmoid(scores[0] - scores[1]).log().squeeze() / 2
    assert torch.allclose(loss, preference - 0.3 * log_beta / count, atol=1e-5)


def test_a_fitted_scorelm_is_centred_on_its_answers(tokenizer):
    pairs = encode_pairs(tokenizer, preference_dataset(TokenGrammar(0), 128, seed=0))
    scorelm = tiny_scorelm(tokenizer, seed=0)
    fit_scorelm(scorelm, pairs, steps=5, batch_size=32, lr=1e-2, lm_coef=0.1, seed=0)
    with torch.no_grad():
        assert abs(scorelm(pairs.answers).scores.mean()) < 1e-5


def test_rows_of_pairs_stay_together(tokenizer):
    pairs = encode_pairs(tokenizer, ragged_rows())
    swapped = pairs[torch.tensor([1, 0])]
    assert torch.equal(swapped.chosen.input_ids, pairs.chosen.input_ids.flip(0))
    assert torch.equal(swapped.rejected.input_ids, pairs.rejected.input_ids.flip(0))


@pytest.mark.parametrize("prompts, completions, name", [
    (["a"], ["b", "c"], "completions"), (["a"], [""], "completions"), ([""], ["a"], "prompts"),
])
def test_wrong_rows_are_refused_by_name(tokenizer, prompts, completions, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        encode(tokenizer, prompts, completions)


def test_completions_end_with_the_end_of_text_token_if_there_is_one(tokenizer):
    ending = grammar_tokenizer()
    ending.eos_token = "p"
    tokens = encode(ending, ["a", "b"], ["c", "d e"])
    assert tokens.completion_ids.tolist() == [[2, 15, 16], [3, 4, 15]]
    ids, mask = encode_prompts(tokenizer, ["a b", "c"])
    assert ids.tolist() == [[0, 1], [16, 2]] and mask.tolist() == [[True, True], [False, True]]


def test_half_a_pair_and_a_negative_coefficient_are_refused(tokenizer):
    three = encode(tokenizer, ["a"] * 3, ["b"] * 3)
    with pytest.raises(ValueError, match="^answers: expected"):
        PreferencePairs(three)
    with pytest.raises(ValueError, match="^lm_coef: expected"):
        ScoreLMObjective(tiny_scorelm(tokenizer, seed=0), lm_coef=-1.0)
