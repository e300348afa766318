"""The local sampler against transformers' own, and its distribution against the model's."""

import pytest
import torch
import transformers

from alignkit.generate.local import sample
from alignkit.models.language import tiny_causal_lm
from alignkit.training import generator
from alignkit.worlds.grammar import grammar_tokenizer


@pytest.fixture(scope="module")
def lm():
    return tiny_causal_lm(grammar_tokenizer(), seed=0)


def padded_prompts():
    ids = torch.tensor([[16, 16, 3], [16, 5, 6], [1, 2, 4]])
    return ids, ids != 16


def test_at_temperature_zero_it_writes_what_transformers_writes(lm):
    ids, mask = padded_prompts()
    free = lm.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False,
                       max_new_tokens=12, pad_token_id=16)
    eos = int(free[0, 5])  # so that row 0, at least, ends early
    theirs = lm.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False,
                         max_new_tokens=12, pad_token_id=16, eos_token_id=eos)
    ours = sample(lm, ids, mask, max_new_tokens=12, generator=generator(0, "t"),
                  temperature=1e-4, eos_token_id=eos, pad_token_id=16)
    assert torch.equal(ours.tokens.input_ids, theirs)
    assert ours.terminated[0]


def test_frequencies_are_the_models_probabilities(lm):
    prompts = torch.full((50_000, 1), 3)
    drawn = sample(lm, prompts, max_new_tokens=1, generator=generator(0, "f"), temperature=0.7)
    with torch.no_grad():
        p = (lm(input_ids=prompts[:1]).logits[0, -1] / 0.7).softmax(-1)
    seen = torch.bincount(drawn.tokens.completion_ids[:, 0], minlength=17) / 50_000
    assert (seen - p).abs().max() < 0.01


def test_the_generator_alone_decides(lm):
    ids, mask = padded_prompts()
    options = {"max_new_tokens": 5, "attention_mask": mask}
    one = sample(lm, ids, generator=generator(1, "x"), **options)
    torch.manual_seed(99)
    same = sample(lm, ids, generator=generator(1, "x"), **options)
    other = sample(lm, ids, generator=generator(2, "x"), **options)
    assert torch.equal(one.tokens.input_ids, same.tokens.input_ids)
    assert not torch.equal(one.tokens.input_ids, other.tokens.input_ids)


def test_written_tokens_are_scored_and_not_sampled(lm):
    ids, mask = padded_prompts()

    def second_is_seven(so_far):
        return torch.full((3,), 7 if so_far.shape[1] == 1 else -1)

    out = sample(lm, ids, mask, max_new_tokens=3, generator=generator(0, "w"),
                 writer=second_is_seven)
    assert (out.tokens.completion_ids[:, 1] == 7).all()
    assert out.sampled.tolist() == [[True, False, True]] * 3
    assert (out.logps[:, 1] < 0).all()


def test_a_full_forward_pass_gives_the_kept_log_probabilities_of_another_architecture():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2,
                                     n_positions=32, bos_token_id=0, eos_token_id=0)
    lm = transformers.GPT2LMHeadModel(config).eval()
    prompts = torch.tensor([[3, 4], [5, 6]])
    out = sample(lm, prompts, max_new_tokens=6, generator=generator(0, "g"))
    with torch.no_grad():
        logp = lm(input_ids=out.tokens.input_ids).logits[:, 1:-1].log_softmax(-1)
    expected = logp.gather(2, out.tokens.completion_ids[..., None])[..., 0]
    assert torch.allclose(out.logps, expected, atol=1e-5)


@pytest.mark.parametrize("change, name", [
    ({"prompt_ids": torch.zeros(3).long()}, "prompt_ids"),
    ({"attention_mask": torch.ones(2, 3)}, "attention_mask"),
    ({"attention_mask": torch.tensor([[1, 0], [1, 1]])}, "attention_mask"),
    ({"writer": lambda so_far: torch.zeros(5)}, "writer"),
])
def test_wrong_arguments_are_refused_by_name(lm, change, name):
    prompts = change.pop("prompt_ids", torch.zeros(2, 2).long())
    with pytest.raises(ValueError, match=f"^{name}: "):
        sample(lm, prompts, max_new_tokens=2, generator=generator(0, "e"), **change)
