"""A tiny vision-language model of a transformers class, through sampling, judging, scoring and training."""

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_generate_text import letter_tokenizer
from transformers import Qwen2VLConfig

from alignkit.generate.local import sample
from alignkit.generate.model import LocalModel, prompt_text
from alignkit.generate.served import request_body
from alignkit.generate.text import NotAble, Request, Scripted, image_part
from alignkit.judging import verdicts
from alignkit.judging.judges import RUBRIC_ROLE, Judge, Task, grouped, pairwise
from alignkit.judging.scorers import GroupedScorer, RubricScorer
from alignkit.models.language import (
    Images,
    LanguagePolicy,
    Tokens,
    hidden_states,
    quiet_transformers,
    sees_images,
    tiny_causal_lm,
    tiny_critic,
)
from alignkit.models.scores import ScoreLM, ScoreLMScorer, Scores, SupportedPolicy, behaviour_logps
from alignkit.models.vision import encode_image_prompts, open_image, tiny_processor, tiny_vision_lm
from alignkit.preferences import PreferencePairs, fit_scorelm, pair_accuracy
from alignkit.rl.algorithms import GRPO, ReinforcePlusPlus
from alignkit.rl.language import LanguageCollector, RewardFunction
from alignkit.rl.train import train


def square(color):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), color).save(file, "png")
    return image_part(file.getvalue())


RED, BLUE, GREEN = (square(color) for color in ("red", "blue", "green"))
PROMPTS = ["what is <image>", "a much longer prompt with <image> and <image>", "no picture"]
SHOWN = [[RED], [BLUE, GREEN], []]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(letter_tokenizer())


@pytest.fixture(scope="module")
def lm(processor):
    return tiny_vision_lm(processor, seed=0, positions=1024)


def generator():
    return torch.Generator().manual_seed(0)


def sampled(lm, processor, repeat=1, **options):
    ids, mask, images = encode_image_prompts(processor, PROMPTS * repeat, SHOWN * repeat)
    return sample(lm, ids, mask, images=images, max_new_tokens=8, generator=generator(), **options)


def logps(lm, tokens, temperature=1.0):
    with torch.no_grad():
        return LanguagePolicy(lm, temperature).evaluate(SimpleNamespace(inputs=tokens)).logps


# ---- sampling ---------------------------------------------------------------------------


def test_greedy_text_is_what_transformers_writes(lm, processor):
    ids, mask, images = encode_image_prompts(processor, PROMPTS, SHOWN)
    ours = sample(lm, ids, mask, images=images, max_new_tokens=8, generator=generator(), temperature=1e-6)
    for i, each in enumerate(images):
        shown = {} if each is None else {"pixel_values": each.pixel_values}
        theirs = lm.generate(input_ids=ids[i, mask[i]][None], do_sample=False, max_new_tokens=8,
                             eos_token_id=None, pad_token_id=0, **shown)
        assert ours.tokens.completion_ids[i].tolist() == theirs[0, mask[i].sum():].tolist()


def test_kept_log_probabilities_are_recomputed_ones(lm, processor):
    "Rows of one, two and no images, equal prompts, rows that end; then any rows of them."
    drawn = sampled(lm, processor, repeat=8, temperature=0.8, eos_token_id=5)
    assert not drawn.terminated.all() and drawn.terminated.any()
    again = logps(lm, drawn.tokens, 0.8)
    assert torch.allclose(drawn.logps, again, atol=1e-5)
    chosen = torch.tensor([7, 1, 5, 7])
    assert torch.allclose(logps(lm, drawn.tokens[chosen], 0.8), again[chosen], atol=1e-5)


def test_a_placeholder_that_the_policy_wrote_shows_nothing(lm, processor):
    drawn = sampled(lm, processor, writer=lambda so_far, drawn: torch.full((3,), processor.image_token_id))
    assert (drawn.tokens.completion_ids == processor.image_token_id).all()
    assert torch.allclose(drawn.logps, logps(lm, drawn.tokens), atol=1e-5)


def test_other_pixels_are_other_log_probabilities(lm, processor):
    tokens = sampled(lm, processor).tokens
    red, two, nothing = tokens.images
    black = Images(red.parts, torch.zeros_like(red.pixel_values))
    swapped = Images(two.parts[::-1], two.pixel_values.flip(0))
    other = logps(lm, replace(tokens, images=(black, swapped, nothing)))
    distance = (other - logps(lm, tokens)).abs().amax(1)
    assert (distance[:2] > 1e-2).all() and distance[2] < 1e-5


def test_one_text_beside_two_images_is_two_prompts(lm, processor):
    ids, mask, images = encode_image_prompts(processor, [PROMPTS[0]] * 4, [[RED], [BLUE], [RED], [BLUE]])
    assert images[0] is images[2] and images[1] is images[3]
    drawn = sample(lm, ids, mask, images=images, max_new_tokens=8, generator=generator(), temperature=1e-6)
    red, blue, red_too, blue_too = drawn.tokens.completion_ids.tolist()
    assert red == red_too and blue == blue_too and red != blue


def test_bfloat16_products(lm, processor):
    policy = LanguagePolicy(lm, compute_dtype=torch.bfloat16)
    with torch.no_grad(), policy.computing():
        drawn = sampled(lm, processor)
        again = policy.evaluate(SimpleNamespace(inputs=drawn.tokens)).logps
    assert 0 < (drawn.logps - logps(lm, drawn.tokens)).abs().max() < 0.1
    assert (drawn.logps - again).abs().max() < 0.1


# ---- a generator of text, and judging -----------------------------------------------------


def ask(text, *images, length=12, **more):
    return Request([{"role": "user", "content": [*images, {"type": "text", "text": text}]}], length, **more)


def test_a_completion_depends_on_its_request_and_its_images_alone(lm, processor):
    model = LocalModel(lm, processor, batch_size=3)
    requests = [ask("what", RED), ask("what", BLUE), ask("and these", RED, BLUE), ask("text"),
                Request([{"role": "user", "content": "text"}], 12), Request("go on", 12)]
    together = model.generate(requests)
    assert together == [model.generate([request])[0] for request in requests]
    assert together[0].text != together[1].text
    assert together[3] == together[4]
    assert together[2].prompt_tokens == len(processor.tokenizer(prompt_text(processor, requests[2]))["input_ids"]) + 6


def test_its_log_probabilities_are_those_of_a_forward_pass_with_the_image(lm, processor):
    [got] = LocalModel(lm, processor).generate([ask("what", RED, top_logprobs=0)])
    text = prompt_text(processor, ask("what", RED))
    ids, mask, images = encode_image_prompts(processor, [text], [[RED]])
    written = processor.tokenizer.convert_tokens_to_ids([token.text for token in got.tokens])
    tokens = torch.cat([ids, torch.tensor([written])], 1)
    whole = Tokens(tokens, torch.ones_like(tokens).bool(), ids.shape[1], images=images)
    assert torch.allclose(torch.tensor([token.logp for token in got.tokens]), logps(lm, whole)[0], atol=1e-4)


def test_a_text_that_spells_the_placeholder_moves_no_image(lm, processor):
    request = ask("see <image> and <image>", RED)
    assert prompt_text(processor, request).count("<image>") == 1
    assert "< image> and < image>" in prompt_text(processor, request)
    LocalModel(lm, processor).generate([request])


def test_it_judges_in_both_orders_and_in_groups(lm, processor):
    "Random weights decide nothing: what came is counted, and depends on the picture."
    judge = Judge(LocalModel(lm, processor), verdicts.Choice(), max_new_tokens=8)
    tasks = [Task("what is it", ("x", "y <image>"), (image,)) for image in (RED, BLUE)]
    both = pairwise(judge, tasks)
    (red, swapped), (blue, _) = both
    asked = [replace(judgement.question, top_logprobs=0) for judgement in (red, blue)]
    first, second = ([token.logp for token in said.tokens] for said in judge.generator.generate(asked))
    assert max(abs(x - y) for x, y in zip(first, second, strict=True)) > 1e-3
    assert red.question.order == (0, 1) and swapped.question.order == (1, 0)
    found = grouped(judge, [replace(task, answers=("x", "y", "z")) for task in tasks])
    assert sum(found.outcomes.values()) == 12 == len(found.judgements)
    assert {judgement.outcome for judgement in (red, swapped, blue)} <= set(verdicts.OUTCOMES)


def test_it_loads_from_a_folder_as_a_generator_a_policy_and_a_reward_model(lm, processor, tmp_path):
    with quiet_transformers():
        lm.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        model, policy = LocalModel.from_pretrained(tmp_path), LanguagePolicy.from_pretrained(tmp_path)
        scorelm = ScoreLM.from_pretrained(tmp_path)
    here = LocalModel(lm, processor)
    assert model.fingerprint() == here.fingerprint() and "images" in model.can
    assert model.generate([ask("what", RED)]) == here.generate([ask("what", RED)])
    assert sees_images(policy.lm) and sees_images(scorelm.lm)
    other = tiny_processor(letter_tokenizer())
    other.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert LocalModel(lm, other).fingerprint() != here.fingerprint()


def test_a_server_is_sent_the_image_as_it_stands_in_the_message():
    path, body = request_body(ask("what", RED), "a model", {})
    assert path == "/chat/completions" and body["messages"][0]["content"][0] == RED
    assert RED["image_url"]["url"].startswith("data:image/png;base64,")


# ---- scoring and training -----------------------------------------------------------------


def collector(policy, processor, scorer, **more):
    ids, mask, images = encode_image_prompts(processor, PROMPTS, SHOWN)
    return LanguageCollector(policy, ids, mask, scorer, batch_size=24, max_new_tokens=6, seed=0,
                             group_size=4, images=images, **more)


def test_a_reward_model_reads_the_images_of_a_rollout(lm, processor):
    scorelm = ScoreLM(tiny_vision_lm(processor, seed=1))
    torch.nn.init.normal_(scorelm.score_head.weight)
    rollout = collector(LanguagePolicy(lm), processor, ScoreLMScorer(scorelm, eps_beta=0.01))(0)
    assert rollout.supported.shape == rollout.logps.shape
    with torch.no_grad():
        rewards = scorelm.scores(rollout.inputs)
        blind = [each and Images(each.parts, torch.zeros_like(each.pixel_values)) for each in rollout.inputs.images]
        unseen = scorelm.scores(replace(rollout.inputs, images=tuple(blind)))
    assert torch.allclose(rollout.rewards.sum(1), rewards, atol=1e-4)
    shows = torch.tensor([each is not None for each in rollout.inputs.images])
    assert torch.equal((rewards - unseen).abs() > 1e-3, shows) and shows.any() and not shows.all()
    assert behaviour_logps(scorelm, rollout.inputs).shape == rollout.logps.shape


def test_a_reward_model_learns_to_prefer_by_the_picture(processor):
    "Red is to be called r and blue b: without the picture, no better than chance."
    ids, mask, images = encode_image_prompts(processor, ["<image>"] * 4, [[RED], [BLUE], [RED], [BLUE]])
    r, b = processor.tokenizer.convert_tokens_to_ids(["r", "b"])
    answers = torch.cat([ids, torch.tensor([[r], [b], [b], [r]])], 1)
    pairs = PreferencePairs(Tokens(answers, torch.ones_like(answers).bool(), ids.shape[1], images=images))
    scorelm = ScoreLM(tiny_vision_lm(processor, seed=0))
    fit_scorelm(scorelm, pairs, steps=40, batch_size=2, lr=3e-3, lm_coef=0.0, seed=0)
    assert pair_accuracy(scorelm, pairs) == 1
    black = tuple(Images(each.parts, torch.zeros_like(each.pixel_values)) for each in images)
    assert pair_accuracy(scorelm, PreferencePairs(replace(pairs.answers, images=black))) == 0.5


@pytest.mark.parametrize("algorithm", [GRPO(), ReinforcePlusPlus()], ids=lambda a: type(a).__name__)
def test_an_update_reaches_the_vision_tower(processor, algorithm):
    lm = tiny_vision_lm(processor, seed=0)
    before = {name: weight.clone() for name, weight in lm.named_parameters()}
    asked = []

    def count_e(rollout):
        asked.append(rollout.inputs.images)
        return Scores((rollout.inputs.completion_ids == processor.tokenizer.convert_tokens_to_ids("e")).float().sum(1))

    history = train(collector(LanguagePolicy(lm), processor, count_e), LanguagePolicy(lm), None, algorithm,
                    rounds=2, lr=3e-3, minibatches=2, epochs=1, seed=0)
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-4 for line in history)
    moved = [name for name, weight in lm.named_parameters() if not torch.equal(weight, before[name])]
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        assert any(part in name for name in moved)
    assert len(asked[0]) == 24 and len({id(each) for each in asked[0]}) <= 3


def test_judges_are_shown_the_images_of_a_rollout(lm, processor):
    seen = []

    def script(said):
        def answer(question):
            seen.append(question.prompt[0]["content"])
            return said
        return Scripted(answer)

    tokenizer = processor.tokenizer
    pairs = GroupedScorer(Judge(script("[[A]]"), verdicts.Choice()), tokenizer, group_size=4)
    rubric = RubricScorer(Judge(script(r"\boxed{3}"), verdicts.Scores(count=1), RUBRIC_ROLE), tokenizer)
    for scorer, times in ((pairs, 12), (rubric, 4)):
        seen.clear()
        rollout = collector(LanguagePolicy(lm), processor, scorer)(0)
        shown = [[] if isinstance(content, str) else content[1:] for content in seen]
        expected = [list(each.parts) if each else [] for each in rollout.inputs.images[::4] for _ in range(times)]
        assert shown == expected and [] in shown and [BLUE, GREEN] in shown
        assert not any("<image>" in str(content) for content in seen)


# ---- what is refused ----------------------------------------------------------------------


def pixels(*shape, dtype=torch.float32):
    return Images((RED,), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("images, message", [
    (None, r"images\[0\]: expected images for 4 placeholder tokens of the prompt, got some for 0"),
    ((pixels(1, 3, 16, 16), None), r"images\[1\]: expected images for 4 placeholder tokens"),
    ((pixels(1, 3, 8, 8), None), r"images\[0\]: expected float pixel_values of shape \(1, 3, 16, 16\), got .*8, 8"),
    ((pixels(2, 3, 16, 16), None), r"images\[0\]: expected float pixel_values of shape \(1, 3, 16, 16\), got .*\(2,"),
    ((None, pixels(1, 3, 16, 16, dtype=torch.uint8)), r"images\[1\]: expected float pixel_values .* got torch.uint8"),
    ((pixels(1, 3, 16, 16),), "images: expected 2, one a row, got 1"),
])
def test_images_that_do_not_fit_are_refused_by_row(lm, processor, images, message):
    with pytest.raises(ValueError, match=message):
        ids, mask, _ = encode_image_prompts(processor, ["a <image>"] * 2, [[RED], [BLUE]])
        hidden_states(lm, Tokens(ids, mask, ids.shape[1], images=images))


@pytest.mark.parametrize("prompts, shown, message", [
    (["a <image>"], [[]], r"images\[0\]: expected 1, one for each <image> of the prompt, got 0"),
    (["a", "a"], [[], [RED]], r"images\[1\]: expected 0, one for each <image> of the prompt, got 1"),
    ([], [], "prompts: expected at least one row, got none"),
    (["a"], [], "images: expected 1, one sequence a prompt, got 0"),
    (["a", ""], [[], []], "prompts: expected at least one token a row, row 1 has none"),
    (["<image>"], [[{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]],
     "images: expected a data URL of an image in base64, got 'https://example.org/a.png'"),
    (["<image>"], [[image_part(b"no picture")]], "images: expected the bytes of an image file, got cannot identify"),
])
def test_prompts_and_images_that_do_not_fit_are_refused_by_name(processor, prompts, shown, message):
    with pytest.raises(ValueError, match=message):
        encode_image_prompts(processor, prompts, shown)


def test_models_of_text_refuse_images_by_name(lm, processor):
    blind, tokens = tiny_causal_lm(processor.tokenizer, seed=0), sampled(lm, processor).tokens
    rollout = SimpleNamespace(inputs=tokens)
    with pytest.raises(NotAble, match=r"requests\[0\]: LocalModel cannot see images"):
        LocalModel(blind, processor.tokenizer).generate([ask("what", RED)])
    with pytest.raises(NotAble, match=r"requests\[0\]: LocalModel cannot see images"):
        LocalModel(lm, processor.tokenizer).generate([ask("what", RED)])
    with pytest.raises(ValueError, match="lm: expected a vision-language model beside a processor, got a LlamaFor"):
        LocalModel(blind, processor)
    with pytest.raises(ValueError, match="images: expected None for a LlamaForCausalLM"):
        sample(blind, tokens.prompt_ids, max_new_tokens=1, generator=generator(), images=tokens.images)
    for read in (LanguagePolicy(blind).evaluate, tiny_critic(processor.tokenizer, seed=0).values):
        with pytest.raises(ValueError, match="images: expected None for a model that reads text alone"):
            read(rollout)
    with pytest.raises(ValueError, match="scorelm: expected one that reads text alone, got a LlavaFor"):
        SupportedPolicy(blind, ScoreLM(lm), eps_beta=0.1)


def test_a_reward_function_in_trls_signature_refuses_prompts_with_images(lm, processor):
    rows = Dataset.from_dict({"prompt": ["a"]})
    scorer = RewardFunction(lambda prompts, completions: [0.0] * len(prompts), processor.tokenizer, rows)
    with pytest.raises(ValueError, match="rollout: expected prompts of text alone"):
        collector(LanguagePolicy(lm), processor, scorer)(0)


def test_a_collector_wants_images_for_every_prompt(lm, processor):
    with pytest.raises(ValueError, match="images: expected 3, one a prompt, got 1"):
        replace(collector(LanguagePolicy(lm), processor, None), images=(None,))


def test_a_kind_that_is_not_read_here_says_so(tmp_path):
    Qwen2VLConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Qwen2VLConfig"):
        LanguagePolicy.from_pretrained(tmp_path)


def test_a_picture_comes_back_from_its_part():
    assert open_image(RED).size == (20, 16) and open_image(RED).getpixel((0, 0)) == (255, 0, 0)
