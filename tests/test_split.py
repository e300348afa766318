"""A model cut in two says what it said, and is whole again on disk."""

import pytest
import torch
import transformers

from alignkit.models import split as room
from alignkit.models.language import LanguagePolicy, Tokens, quiet_transformers, tiny_causal_lm
from alignkit.worlds.grammar import grammar_tokenizer

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "bos_token_id": None, "eos_token_id": None}


def family(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=True)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tokens(left_padding=0):
    torch.manual_seed(1)
    ids = torch.randint(50, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :left_padding] = False
    return Tokens(ids, mask, prompt_length=4)


class Rollout:
    def __init__(self, inputs):
        self.inputs = inputs


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral"])
@pytest.mark.parametrize("left_padding", [0, 2])
def test_a_policy_over_the_upper_part_agrees_with_the_whole_model(name, left_padding):
    lm = family(name)
    trunk, upper = room.split(lm, 3)
    batch = tokens(left_padding)
    with torch.no_grad():
        whole = LanguagePolicy(lm, 0.7).evaluate(Rollout(batch))
        cut = LanguagePolicy(upper, 0.7).evaluate(Rollout(room.with_trunk(trunk, batch)))
    torch.testing.assert_close(cut.logps, whole.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(cut.entropy, whole.entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_what_was_learned_above_survives_joining_and_the_disk(name, tmp_path):
    lm = family(name)
    trunk, upper = room.split(lm, 3)
    learning = [p for p in upper.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in learning:
            p += 0.1
    whole = room.join(trunk, upper)
    with quiet_transformers():
        whole.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = room.with_trunk(trunk, tokens())
    with torch.no_grad():
        logits = loaded(input_ids=batch.input_ids).logits
        torch.testing.assert_close(upper(inputs_embeds=batch.trunk).logits, logits,
                                   atol=1e-5, rtol=0)
        assert not torch.allclose(lm(input_ids=batch.input_ids).logits, logits, atol=1e-3)
    assert len(loaded.base_model.layers) == 5
    # the originals and the parts are untouched by the join
    assert (len(lm.base_model.layers), len(trunk.layers), len(upper.base_model.layers)) == (5, 3, 2)
    assert lm.base_model.layers[3].self_attn.layer_idx == 3


def test_only_the_upper_layers_learn():
    trunk, upper = room.split(family("Llama"), 3)
    assert not any(p.requires_grad for p in trunk.parameters())
    learning = {n for n, p in upper.named_parameters() if p.requires_grad}
    assert learning == {f"model.{n}" for n, _ in upper.model.named_parameters()
                        if n.startswith("layers.")}


@pytest.mark.parametrize("layers", [0, 5, -1])
def test_a_cut_that_leaves_a_part_empty_is_refused(layers):
    with pytest.raises(ValueError, match=f"frozen_layers: expected 1 to 4, got {layers}"):
        room.split(family("Llama"), layers)


def test_a_model_without_layers_is_refused():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=10, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="lm: expected a decoder"):
        room.split(gpt2, 1)


def test_prefix_means_stop_at_the_end_of_each_row():
    states = torch.arange(12.0).reshape(2, 6, 1)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    batch = Tokens(torch.zeros(2, 6, dtype=torch.long), mask, 2, states)
    found = room.prefix_means(batch)[..., 0]
    assert found.tolist() == [[1, 2, 2.5, 3, 3.5], [7, 8, 8.5, 8.5, 8.5]]


def test_tokens_keep_their_states_through_every_change():
    lm = tiny_causal_lm(grammar_tokenizer(), seed=0, layers=3)
    trunk, _ = room.split(lm, 2)
    batch = room.with_trunk(trunk, Tokens(torch.randint(16, (4, 6)),
                                          torch.ones(4, 6, dtype=torch.bool), 2))
    assert torch.equal(batch[[2, 0]].trunk, batch.trunk[[2, 0]])
    assert batch.without_last().trunk.shape == (4, 5, 32)
    with pytest.raises(ValueError, match=r"trunk: expected shape \(4, 6, 'D'\)"):
        Tokens(batch.input_ids, batch.attention_mask, 2, batch.trunk[:, 1:])
    with pytest.raises(ValueError, match="trunk: expected Tokens with trunk states"):
        room.prefix_means(Tokens(batch.input_ids, batch.attention_mask, 2))
