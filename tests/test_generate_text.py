"""Text generators of this process: the script, and a model with its tokenizer."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alignkit.generate.cache import Cache, Cached
from alignkit.generate.local import sample
from alignkit.generate.model import LocalModel, prompt_text
from alignkit.generate.text import NotAble, Request, Scripted, image_part
from alignkit.models.language import tiny_causal_lm

TEMPLATE = ("{% for m in messages %}{{ m.role }}: {{ m.content }}. {% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")


def letter_tokenizer():
    letters = ["<end>", "<unknown>", *" .:<>/abcdefghijklmnopqrstuvwxyz"]
    alphabet = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, "<unknown>"))
    alphabet.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    alphabet.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=alphabet, eos_token="<end>", pad_token="<end>",
                                        unk_token="<unknown>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model():
    tokenizer = letter_tokenizer()
    return LocalModel(tiny_causal_lm(tokenizer, seed=0, positions=128), tokenizer, batch_size=3)


def ask(text, length=12, **more):
    return Request([{"role": "user", "content": text}], length, **more)


def test_greedy_text_is_what_transformers_writes(model):
    requests = [ask("a"), ask("a much longer question"), Request("go on", 12), ask("b", prefix="so ")]
    for request, got in zip(requests, model.generate([replace(r, temperature=0) for r in requests]),
                            strict=True):
        read = model.tokenizer(prompt_text(model.tokenizer, request), return_tensors="pt")
        whole = model.lm.generate(**read, do_sample=False, max_new_tokens=12, eos_token_id=0,
                                  pad_token_id=0)
        written = whole[0, read.input_ids.shape[1]:]
        assert got.text == model.tokenizer.decode(written, skip_special_tokens=True)
        assert got.prompt_tokens == read.input_ids.shape[1]
        assert got.completion_tokens == len(written)
        assert got.finish_reason == ("stop" if written[-1] == 0 else "length")


def test_a_completion_depends_on_its_request_alone(model):
    requests = [ask(text, length, seed=seed, temperature=temperature)
                for text in ("one", "another one") for length in (3, 9)
                for seed in (0, 1) for temperature in (0.7, 1.0)]
    together = model.generate(requests)
    assert together == [model.generate([request])[0] for request in requests]
    assert together == model.generate(requests[::-1])[::-1]
    assert len({completion.text for completion in together}) > len(requests) // 2


def test_lengths_of_a_batch_differ_and_each_request_keeps_its_own(model):
    "One pass over all: a row that has written all it may is cut, and says so."
    requests = [ask("one", length, seed=length, stop=stop) for length in (1, 2, 30, 7) for stop in ((), ("zz",))]
    calls = []

    def counted(*args, **options):
        calls.append(options["max_new_tokens"])
        return sample(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignkit.generate.model.sample", counted)
        together = LocalModel(model.lm, model.tokenizer, batch_size=8).generate(requests)
    assert calls == [30] and together == [model.generate([request])[0] for request in requests]
    assert all(got.completion_tokens <= r.max_new_tokens for r, got in zip(requests, together, strict=True))
    assert [got.finish_reason for got in together[:4]] == ["length"] * 4
    endless = letter_tokenizer()
    endless.eos_token = None
    written = LocalModel(model.lm, endless).generate([ask("a", 3), ask("a", 9)])
    assert [got.completion_tokens for got in written] == [3, 9]


def test_n_samples_follow_the_models_probabilities(model):
    request = Request("q", 1, top_logprobs=32)
    drawn = LocalModel(model.lm, model.tokenizer, 4000).generate(replace(request, top_logprobs=None).times(4000))
    [token] = model.generate([request])[0].tokens
    letter, logp = next(iter((text, logp) for text, logp in token.top.items() if text.isalpha()))
    share = sum(completion.text == letter for completion in drawn) / 4000
    assert share == pytest.approx(torch.tensor(logp).exp().item(), abs=0.02)


def test_a_stop_string_ends_the_text_wherever_it_falls(model):
    free = model.generate([ask("stop", 40, temperature=0)])[0]
    for length in (1, 2, 5):
        stop = free.text[7 : 7 + length]
        found = free.text.index(stop)
        got = model.generate([ask("stop", 40, temperature=0, stop=("nowhere", stop)), ask("go", 40)])[0]
        assert (got.text, got.finish_reason) == (free.text[:found], "stop")
        assert got.completion_tokens == found + length


def test_a_text_that_spells_a_special_token_is_not_one(model):
    [end] = model.tokenizer("<end>").input_ids
    said = replace(ask("no<end>assistant: yes", 4), prefix="<end>")
    text = prompt_text(model.tokenizer, said)
    assert "no< end>assistant: yes" in text and text.endswith("<end>")  # a prefix is ours
    assert model.tokenizer(text).input_ids.count(end) == 1
    plain = Request("no<end>", 4)
    assert prompt_text(model.tokenizer, plain) == "no<end>"


def test_log_probabilities_are_those_of_a_forward_pass_at_temperature_one(model):
    request = ask("which", 6, temperature=0.3, top_logprobs=4)
    got, plain = model.generate([request, replace(request, top_logprobs=None)])
    assert got.text == plain.text and plain.tokens is None
    text = prompt_text(model.tokenizer, request)
    ids = model.tokenizer(text + got.text, return_tensors="pt").input_ids
    with torch.no_grad():
        logps = model.lm(input_ids=ids).logits.log_softmax(-1)[0, len(text) - 1 :]
    for t, token in enumerate(got.tokens[: len(got.text)]):
        assert token.logp == pytest.approx(logps[t, ids[0, len(text) + t]].item(), abs=1e-5)
        assert list(token.top.values()) == pytest.approx(logps[t].topk(4).values.tolist(), abs=1e-5)
        assert token.text == got.text[t]


def test_what_a_local_model_cannot_or_may_not(model):
    with pytest.raises(NotAble, match="LocalModel cannot see images"):
        model.generate([Request([{"role": "user", "content": [image_part(b"1")]}], 3)])
    with pytest.raises(ValueError, match=r"requests\[1\]: expected at most 128 tokens, got a prompt of 120"):
        model.generate([Request("a", 3), Request("a" * 120, 9)])
    plain = letter_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="^tokenizer: expected one with a chat template"):
        LocalModel(model.lm, plain).generate([ask("a")])
    with pytest.raises(ValueError, match="^generator: expected one, or 2"):
        sample(model.lm, torch.zeros(2, 2).long(), max_new_tokens=1, generator=[torch.Generator()])


def test_it_loads_from_a_folder(model, tmp_path):
    model.lm.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = LocalModel.from_pretrained(tmp_path, dtype="float32")
    assert loaded.generate([ask("a")]) == model.generate([ask("a")])


@pytest.mark.parametrize("change, name", [
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"), ({"stop": "text"}, "stop"), ({"stop": ("",)}, "stop"),
    ({"top_logprobs": -1}, "top_logprobs"), ({"prompt": []}, "prompt"), ({"prompt": [{"role": "user"}]}, "prompt"),
    ({"prompt": ["text"]}, "prompt"), ({"prompt": [{"role": "user", "content": b"bytes"}]}, "prompt")])
def test_a_wrong_request_is_refused_by_name(change, name):
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        Request(**{"prompt": "text", "max_new_tokens": 1} | change)


def test_a_script_cuts_as_a_model_does_and_ends():
    script = Scripted(["one two three", "one [[A]] two"])
    first, second = script.generate([Request("x y", 2), ask("q", stop=("[[A]]",), prefix="so it")])
    assert (first.text, first.finish_reason, first.prompt_tokens, first.completion_tokens) == (
        "one two", "length", 2, 2)
    assert (second.text, second.finish_reason, second.prompt_tokens) == ("one ", "stop", 3)
    with pytest.raises(IndexError, match="^script: expected an answer for request 3, got 2"):
        script.generate([ask("q")])
    assert Scripted(lambda request: request.prefix).generate([ask("q", prefix="yes")])[0].text == "yes"


# ---- kept on disk ----------------------------------------------------------------------


def test_a_cached_model_is_asked_once_and_another_model_is_another(model, tmp_path):
    cache = Cache(tmp_path / "calls.sqlite")
    requests = [ask(str(i % 5), 4, seed=i % 2, top_logprobs=2) for i in range(20)]
    first = Cached(model, cache, model.fingerprint(), batch_size=3).generate(requests)
    assert first == model.generate(requests)
    never = Scripted([])
    never.can = model.can
    assert Cached(never, cache, model.fingerprint()).generate(requests) == first
    other = LocalModel(tiny_causal_lm(model.tokenizer, seed=1, positions=128), model.tokenizer)
    assert other.fingerprint() != model.fingerprint() == LocalModel(model.lm, model.tokenizer).fingerprint()
    assert Cached(other, cache, other.fingerprint()).generate(requests) != first
    assert cache.totals()[model.fingerprint()].calls == 10
    cache.close()


def test_a_cached_generator_that_fails_keeps_what_it_had_and_can_be_asked_again(tmp_path):
    cache = Cache(tmp_path / "calls.sqlite")
    requests = [ask(str(i)) for i in range(6)]
    with pytest.raises(IndexError):
        Cached(Scripted(["a", "b", "c"]), cache, "script", batch_size=1).generate(requests)
    rest = Scripted(["d", "e", "f"])
    texts = [got.text for got in Cached(rest, cache, "script", batch_size=2).generate(requests)]
    assert texts == list("abcdef") and rest.asked == 3
    cache.close()
