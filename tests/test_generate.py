"""The local sampler against transformers' own, and its distribution against the model's."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers

from alignkit import ops
from alignkit.generate import llama, local
from alignkit.generate.local import Memory, sample
from alignkit.models.language import LanguagePolicy, tiny_causal_lm
from alignkit.models.split import split, with_trunk
from alignkit.rl.language import sample_policy
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

    def second_is_seven(so_far, _drawn):
        return torch.full((3,), 7 if so_far.shape[1] == 1 else -1)

    out = sample(lm, ids, mask, max_new_tokens=3, generator=generator(0, "w"),
                 writer=second_is_seven)
    assert (out.tokens.completion_ids[:, 1] == 7).all()
    assert out.sampled.tolist() == [[True, False, True]] * 3
    assert (out.logps[:, 1] < 0).all()


def test_a_writer_sees_what_was_drawn_and_may_replace_it(lm):
    ids, mask = padded_prompts()
    seen = []

    def never_an_end(so_far, drawn):
        seen.append(drawn)
        return torch.where(drawn == 5, 7, -1)

    options = {"max_new_tokens": 12, "eos_token_id": 5, "pad_token_id": 16}
    plain = sample(lm, ids, mask, generator=generator(0, "w"), **options)
    out = sample(lm, ids, mask, generator=generator(0, "w"), writer=never_an_end, **options)
    assert plain.terminated.any() and not out.terminated.any()
    drawn = torch.stack(seen, 1)
    assert torch.equal(out.tokens.completion_ids, drawn.masked_fill(drawn == 5, 7))
    assert torch.equal(out.sampled, drawn != 5)


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
    ({"writer": lambda so_far, drawn: torch.zeros(5)}, "writer"),
])
def test_wrong_arguments_are_refused_by_name(lm, change, name):
    prompts = change.pop("prompt_ids", torch.zeros(2, 2).long())
    with pytest.raises(ValueError, match=f"^{name}: "):
        sample(lm, prompts, max_new_tokens=2, generator=generator(0, "e"), **change)


# ---- what makes it fast changes nothing ------------------------------------------------


def plainly(lm, ids, mask, length, seed, eos, pad=16):
    "The same sampling without cache, sharing or dropping: the whole text, every token."
    uniforms = torch.rand((length, len(ids)), generator=generator(seed, "p"))
    done, logps = torch.zeros(len(ids), dtype=torch.bool), []
    for u in uniforms:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = lm(input_ids=ids, attention_mask=mask.long(),
                        position_ids=positions).logits[:, -1]
        token, logp = ops.sample_tokens(logits, u, temperature=0.8)
        token = token.masked_fill(done, pad)
        ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, ~done[:, None]], 1)
        logps.append(logp.masked_fill(done, 0.0))
        done = done | (token == eos)
    return ids, torch.stack(logps, 1)


def prompts_of(kind):
    if kind == "different":
        return torch.arange(16).reshape(16, 1), torch.ones(16, 1, dtype=torch.bool)
    if kind == "equal":
        return torch.tensor([[3, 4], [5, 6]]).repeat(8, 1), torch.ones(16, 2, dtype=torch.bool)
    ids = torch.tensor([[16, 16, 3], [16, 5, 6], [1, 2, 4], [16, 5, 6]]).repeat(4, 1)
    return ids, ids != 16


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", ["different", "equal", "padded"])
@pytest.mark.parametrize("eos, looks", [(7, 1), (7, 5), (99, 1), (99, 5)])
def test_cache_sharing_dropping_and_a_trunk_change_nothing(monkeypatch, kind, cut, eos, looks):
    monkeypatch.setattr(local, "_looks", lambda device, t: t % looks == looks - 1)  # as for a GPU
    lm = tiny_causal_lm(grammar_tokenizer(), seed=0, layers=4)
    trunk, upper = split(lm, 2) if cut else (None, lm)
    ids, mask = prompts_of(kind)
    ours = sample(upper, ids, mask, max_new_tokens=12, generator=generator(3, "p"),
                  temperature=0.8, eos_token_id=eos, pad_token_id=16, trunk=trunk)
    expected, logps = plainly(lm, ids, mask, 12, 3, eos)
    T = ours.logps.shape[1]
    assert torch.equal(ours.tokens.input_ids, expected[:, : ids.shape[1] + T])
    torch.testing.assert_close(ours.logps, logps[:, :T], atol=1e-5, rtol=0)
    if eos == 7:  # rows ended at different times, so some left before others
        assert len(set(ours.sampled.sum(1).tolist())) > 2
    if cut:
        real = ours.tokens.attention_mask
        states = with_trunk(trunk, ours.tokens).trunk
        torch.testing.assert_close(ours.tokens.trunk[real], states[real], atol=1e-5, rtol=0)


# ---- Llama, read the lean way ---------------------------------------------------------


lean = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="products cannot be packed here")


@pytest.fixture
def lean_miniatures(monkeypatch):
    "Miniatures are read the lean way too, which they are not otherwise."
    monkeypatch.setattr(llama, "MIN_WIDTH", 1)


def grouped_llama(dtype=torch.float32, width=96, **changes):
    "Query heads that share keys, and what else a configuration may change."
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{
        "vocab_size": 17, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1,
        "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, **changes})
    lm = transformers.LlamaForCausalLM(config).eval().to(dtype)
    for name, weight in lm.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    return lm


LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@lean
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", ["different", "equal", "padded"])
@pytest.mark.parametrize("changes", [
    {}, {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR_ROPE},
    {"num_key_value_heads": 6, "tie_word_embeddings": True}])
def test_the_lean_way_is_the_same_model(lean_miniatures, changes, kind, cut):
    lm = grouped_llama(**changes)
    trunk, upper = split(lm, 2) if cut else (None, lm)
    assert all(llama.can_read(part.base_model, torch.float32) for part in (trunk or lm, upper))
    ids, mask = prompts_of(kind)
    ours = sample(upper, ids, mask, max_new_tokens=12, generator=generator(3, "p"),
                  temperature=0.8, eos_token_id=7, pad_token_id=16, trunk=trunk)
    expected, logps = plainly(lm, ids, mask, 12, 3, 7)
    T = ours.logps.shape[1]
    assert torch.equal(ours.tokens.input_ids, expected[:, : ids.shape[1] + T])
    torch.testing.assert_close(ours.logps, logps[:, :T], atol=1e-5, rtol=0)
    if cut:
        real = ours.tokens.attention_mask
        states = with_trunk(trunk, ours.tokens).trunk
        torch.testing.assert_close(ours.tokens.trunk[real], states[real], atol=1e-5, rtol=1e-5)


@lean
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6, "tie_word_embeddings": True}])
def test_a_shared_start_is_read_once_and_changes_nothing(lean_miniatures, monkeypatch, changes, padded):
    lm = grouped_llama(**changes)
    start = torch.randint(0, 16, (20,))
    ends = [torch.randint(0, 16, (1 + i % 5 if padded else 4,)) for i in range(6)]
    rows = [torch.cat([torch.full((5 - len(end),), 16), start, end]) for end in ends + ends[:3]]
    ids = torch.stack(rows)
    read, forward = [], llama.LlamaReader.__call__

    def counting(self, new, mask):
        read.append(new.numel())
        return forward(self, new, mask)

    monkeypatch.setattr(llama.LlamaReader, "__call__", counting)
    ours = sample(lm, ids, ids != 16, max_new_tokens=12, generator=generator(3, "p"),
                  temperature=0.8, eos_token_id=7, pad_token_id=16)
    different = len(ids.unique(dim=0))
    assert read[:2] == [20, different * (ids.shape[1] - 20)]
    expected, logps = plainly(lm, ids, ids != 16, 12, 3, 7)
    T = ours.logps.shape[1]
    assert torch.equal(ours.tokens.input_ids, expected[:, : ids.shape[1] + T])
    torch.testing.assert_close(ours.logps, logps[:, :T], atol=1e-5, rtol=0)


@pytest.fixture
def reads(monkeypatch):
    "How many tokens of how many rows the lean reader was given at a time."
    shapes, forward = [], llama.LlamaReader.__call__

    def recording(self, new, mask):
        shapes.append(tuple(new.shape[:2]))
        return forward(self, new, mask)

    monkeypatch.setattr(llama.LlamaReader, "__call__", recording)
    return shapes


def on_the_left(rows):
    "Ids and mask."
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    return ids.where(ids >= 0, 16), ids >= 0


def pieces(lm, memory, prompts, change=lambda lm: None):
    "Two rounds: the second goes on from the texts of the first, in another order, after a word or two."
    def write(ids, mask, seed):
        return sample(lm, ids, mask, max_new_tokens=10, generator=generator(seed, "p"), temperature=0.8,
                      eos_token_id=7, pad_token_id=16, memory=memory)

    first = write(*on_the_left(prompts), 3)
    change(lm)
    texts = [ids[real] for ids, real in zip(first.tokens.input_ids, first.tokens.attention_mask, strict=True)]
    texts[1][-2] = (texts[1][-2] + 1) % 16  # as if it had been split into other tokens
    texts = [torch.cat([text, torch.tensor([1, 2][: 1 + i % 2])]) for i, text in enumerate(texts)]
    ids, mask = on_the_left(texts[::-1])
    second, (expected, logps) = write(ids, mask, 4), plainly(lm, ids, mask, 10, 4, 7)
    assert torch.equal(second.tokens.input_ids, expected[:, : second.tokens.input_ids.shape[1]])
    torch.testing.assert_close(second.logps, logps[:, : second.logps.shape[1]], atol=1e-5, rtol=0)
    return mask


PROMPTS = [torch.tensor([3, 4, 5, 6, 8]), torch.tensor([9, 3, 10]), *[torch.tensor([3, 4, 5, 9])] * 6]


@lean
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 6, "tie_word_embeddings": True}])
def test_a_text_that_is_gone_on_from_is_not_read_again_and_is_the_same(lean_miniatures, reads, changes):
    mask = pieces(grouped_llama(**changes), Memory(8), PROMPTS)
    assert len(set(mask.sum(1).tolist())) > 2  # rows ended at different times
    [_, again] = [(B, n) for B, n in reads if n > 1]
    assert again == (8, 4)  # two put in, one that differed, and the last, which nobody had read


@lean
@pytest.mark.parametrize("texts, change", [
    (8, lambda lm: lm.model.layers[0].self_attn.k_proj.weight.detach().mul_(1.5)),
    (4, lambda lm: None),
])
def test_what_is_forgotten_is_read_again(lean_miniatures, reads, texts, change):
    "Weights have changed, or there were more texts than it holds."
    memory = Memory(texts)
    mask = pieces(grouped_llama(), memory, PROMPTS, change)
    assert [(B, n) for B, n in reads if n > 1][-1] == tuple(mask.shape)
    assert len(memory.texts) == texts


def errors(lm, samples):
    "Of kept log-probabilities, and of a full forward pass, against the model in float64."
    exact = completion_logps_of(copy.deepcopy(lm).double(), samples.tokens)
    full = completion_logps_of(lm, samples.tokens)
    return (samples.logps - exact).abs(), (full - exact).abs()


def completion_logps_of(lm, tokens):
    with torch.no_grad():
        logits = lm(input_ids=tokens.input_ids).logits[:, tokens.prompt_length - 1 : -1]
    logps = logits.to(torch.float64).log_softmax(-1)
    return logps.gather(2, tokens.completion_ids[..., None])[..., 0]


@lean
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lean_way_rounds_no_worse_than_the_models_own(dtype):
    lm = grouped_llama(dtype, width=256, num_attention_heads=16, num_key_value_heads=4)
    assert llama.can_read(lm.base_model, dtype)
    samples = sample(lm, torch.arange(16).repeat(4)[:, None], max_new_tokens=24,
                     generator=generator(0, "b"))
    ours, full = errors(lm, samples)
    assert 0 < ours.mean() < 2 * full.mean()
    assert ours.max() < 2 * full.max()


@lean
def test_a_policy_that_learns_in_float32_above_a_bfloat16_trunk(lean_miniatures):
    trunk, upper = split(grouped_llama(torch.bfloat16), 2)
    upper.base_model.layers.float()
    policy = LanguagePolicy(upper, 0.8, trunk=trunk, compute_dtype=torch.bfloat16)
    samples = sample_policy(policy, torch.arange(16)[:, None], max_new_tokens=12,
                            generator=generator(0, "a"))
    with torch.no_grad():
        again = policy.evaluate(SimpleNamespace(inputs=samples.tokens))
    assert (samples.logps - again.logps).abs().mean() < 0.02
    assert samples.tokens.trunk.dtype == torch.bfloat16


@lean
def test_mixed_weights_are_not_converted_unasked(lean_miniatures):
    lm = grouped_llama(torch.bfloat16)
    lm.base_model.layers.float()
    assert not llama.can_read(lm.base_model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert llama.can_read(lm.base_model, torch.bfloat16)


def hooked(lm):
    lm.base_model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)


def adapted(lm):
    class Adapter(torch.nn.Linear):
        def forward(self, x): return 2 * super().forward(x)
    lm.base_model.layers[0].self_attn.q_proj.__class__ = Adapter


def replaced(lm):
    lm.base_model.layers[0].mlp.forward = lambda x: x


@lean
@pytest.mark.parametrize("change", [hooked, adapted, replaced])
def test_a_model_that_was_changed_is_read_as_it_is(lean_miniatures, change):
    lm = grouped_llama()
    change(lm)
    assert not llama.can_read(lm.base_model, torch.float32)
    samples = sample(lm, torch.tensor([[3, 4], [5, 6]]), max_new_tokens=6, generator=generator(0, "c"))
    expected = completion_logps_of(lm, samples.tokens).float()
    torch.testing.assert_close(samples.logps, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_precision_that_cannot_be_packed_is_read_by_the_model(lean_miniatures, dtype):
    assert not llama.can_read(grouped_llama(dtype).base_model, dtype)


def test_a_sliding_window_model_is_sampled_right():
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=17, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=4,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
    lm = transformers.MistralForCausalLM(config).eval()
    ids, mask = prompts_of("different")
    ours = sample(lm, ids, mask, max_new_tokens=12, generator=generator(3, "p"),
                  temperature=0.8, eos_token_id=7, pad_token_id=16)
    expected, logps = plainly(lm, ids, mask, 12, 3, 7)
    T = ours.logps.shape[1]
    assert torch.equal(ours.tokens.input_ids, expected[:, : 1 + T])
    torch.testing.assert_close(ours.logps, logps[:, :T], atol=1e-5, rtol=0)


def test_a_restricted_choice_has_the_restricted_probabilities(lm):
    prompts, even = torch.full((4000, 1), 3), torch.arange(17) % 2 == 0
    drawn = sample(lm, prompts, max_new_tokens=1, generator=generator(0, "r"),
                   allowed=lambda so_far: even.expand(len(so_far), 17))
    with torch.no_grad():
        logits = lm(input_ids=prompts[:1]).logits[0, -1].masked_fill(~even, -torch.inf)
    ids = drawn.tokens.completion_ids[:, 0]
    assert even[ids].all()
    torch.testing.assert_close(drawn.logps[:, 0], logits.log_softmax(-1)[ids])


@pytest.mark.parametrize("allowed, message", [
    (lambda so_far: torch.ones(2, 5).bool(), r"^allowed: expected bool of shape \(2, 17\)"),
    (lambda so_far: torch.ones(2, 17), "^allowed: expected bool"),
    (lambda so_far: torch.arange(2)[:, None].expand(2, 17).bool(),
     "^allowed: expected at least one token, got none in row 0")])
def test_a_restriction_that_is_none_is_refused(lm, allowed, message):
    with pytest.raises(ValueError, match=message):
        sample(lm, torch.zeros(2, 2).long(), max_new_tokens=2, generator=generator(0, "e"),
               allowed=allowed)
