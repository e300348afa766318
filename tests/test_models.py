"""Policies, critics and ScoreLMs over transformers classes that nobody here wrote."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from alignkit.models.language import (
    LanguageCritic,
    LanguagePolicy,
    Tokens,
    completion_hidden,
    quiet_transformers,
)
from alignkit.models.scores import (
    ScoreEnsemble,
    ScoreLM,
    ScoreLMScorer,
    UncertaintyWeighted,
    WorstCase,
)

TINY = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
CONFIGS = [
    transformers.LlamaConfig(**TINY),
    transformers.Qwen2Config(**TINY),
    transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32,
                            bos_token_id=0, eos_token_id=0),
    transformers.GPTNeoXConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"}),
]


def padded_tokens():
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9).bool()
    mask[0, :2] = False  # left of a short prompt
    mask[1, 7:] = False  # right of a short completion
    return Tokens(ids, mask, prompt_length=4)


@pytest.fixture(params=CONFIGS, ids=lambda config: config.model_type)
def folder(request, tmp_path):
    torch.manual_seed(0)
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_config(request.param)
        model.save_pretrained(tmp_path)
        yield tmp_path


def test_any_causal_lm_is_a_policy(folder):
    policy, tokens = LanguagePolicy.from_pretrained(folder, temperature=0.5).eval(), padded_tokens()
    with torch.no_grad():
        found = policy.evaluate(SimpleNamespace(inputs=tokens))
        for row in range(3):
            real = tokens.attention_mask[row]
            ids = tokens.input_ids[row][real][None]
            logp = (policy.lm(input_ids=ids).logits[0] / 0.5).log_softmax(-1)
            prompt = int(real[:4].sum())
            expected = logp[prompt - 1 : -1].gather(1, ids[0, prompt:, None])[:, 0]
            shown = found.logps[row][tokens.completion_mask[row]]
            assert torch.allclose(shown, expected, atol=1e-5)


def test_any_causal_lm_starts_a_scorelm_and_a_critic(folder):
    tokens = padded_tokens()
    scorelm = ScoreLM.from_pretrained(folder)
    critic = LanguageCritic.from_pretrained(folder).eval()
    with torch.no_grad():
        assert (scorelm(tokens).scores == 0).all()  # a fresh head
        assert critic.values(SimpleNamespace(inputs=tokens)).shape == (3, 6)


def test_scores_do_not_depend_on_the_rest_of_the_batch(folder):
    scorelm, tokens = ScoreLM.from_pretrained(folder), padded_tokens()
    torch.nn.init.normal_(scorelm.score_head.weight)
    with torch.no_grad():
        together = scorelm(tokens).scores
        alone = torch.cat([scorelm(tokens[[row]]).scores for row in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_ensembles_combine_by_hand():
    def ensemble(tokens):
        return torch.tensor([[1.0, 4.0], [3.0, 4.0]])

    rollout = SimpleNamespace(inputs=None)
    assert WorstCase(ensemble)(rollout).rewards.tolist() == [1.0, 4.0]
    # means 2 and 4, sample variances 2 and 0
    assert UncertaintyWeighted(ensemble, 0.5)(rollout).rewards.tolist() == [1.0, 4.0]


def test_an_ensemble_of_one_has_no_variance_and_is_refused(folder):
    with pytest.raises(ValueError, match="^members: expected"):
        ScoreEnsemble([ScoreLM.from_pretrained(folder)])


def test_support_is_strictly_above_the_threshold(folder):
    scorelm, tokens = ScoreLM.from_pretrained(folder), padded_tokens()
    rollout = SimpleNamespace(inputs=tokens)
    hidden = completion_hidden(scorelm.lm, tokens)
    logits = scorelm.lm.get_output_embeddings()(hidden).detach()
    beta = logits.softmax(-1).gather(2, tokens.completion_ids[..., None])[..., 0]
    found = ScoreLMScorer(scorelm, eps_beta=float(beta.median()))(rollout).supported
    real = tokens.completion_mask
    clear = (beta - beta.median()).abs() > 1e-5
    assert torch.equal(found[real & clear], (beta > beta.median())[real & clear])
    assert found[~real].all()  # padding is never outside the support


@pytest.mark.parametrize("change, name", [
    ({"attention_mask": torch.ones(3, 8).bool()}, "attention_mask"),
    ({"prompt_length": 0}, "prompt_length"),
    ({"prompt_length": 10}, "prompt_length"),
])
def test_wrong_tokens_are_refused_by_name(change, name):
    parts = {"input_ids": torch.zeros(3, 9).long(), "attention_mask": torch.ones(3, 9).bool(),
             "prompt_length": 4}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        Tokens(**(parts | change))
