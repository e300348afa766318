"""Beside TRL's trainers: the same advantages, losses and gradients; rewards both ways."""

import math
import re

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from alignkit.generate.text import Scripted  # noqa: E402
from alignkit.judging.judges import Judge  # noqa: E402
from alignkit.judging.scorers import GroupedScorer  # noqa: E402
from alignkit.judging.verdicts import Choice  # noqa: E402
from alignkit.models.language import LanguagePolicy, Tokens, tiny_causal_lm  # noqa: E402
from alignkit.models.scores import Scores  # noqa: E402
from alignkit.rl.algorithms import GRPO, RLOO, Batch, DrGRPO  # noqa: E402
from alignkit.rl.language import (  # noqa: E402
    LanguageCollector,
    RewardFunction,
    as_reward_function,
    last_sampled,
    written,
)
from alignkit.rl.rollout import Rollout  # noqa: E402
from alignkit.rl.train import train  # noqa: E402
from alignkit.worlds.grammar import WORDS, grammar_tokenizer  # noqa: E402

GROUP, TOKENS = 4, 6


def tokenizer():
    tokenizer = grammar_tokenizer()
    tokenizer.eos_token = WORDS[3]
    return tokenizer


def likes_e(prompts, completions, **_):
    return [float(text.count("e")) - 0.1 * len(text) for text in completions]


class Spied:
    """What TRL's trainer computed at each step, and what we make of the same rollout."""

    def __init__(self, trainer, algorithm):
        self.steps, self.algorithm, self.theirs = [], algorithm, trainer._compute_loss
        trainer._compute_loss = self

    def __call__(self, model, inputs):
        loss = self.theirs(model, inputs)
        weights = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, weights, retain_graph=True)
        self.steps.append((inputs, loss.detach(), found, *self.ours(model, inputs, weights)))
        return loss

    def ours(self, model, inputs, weights):
        there = inputs["completion_mask"].bool()
        tokens = Tokens(torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                        torch.cat([inputs["prompt_mask"].bool(), there], 1),
                        inputs["prompt_ids"].shape[1])  # fmt: skip
        ends = last_sampled(there)
        rewards = torch.tensor(likes_e(None, written(tokenizer(), tokens)))
        groups = tokens.prompt_ids.unique(dim=0, return_inverse=True)[1]  # TRL shuffles the rows
        rollout = Rollout(
            inputs=tokens, logps=torch.zeros(there.shape), rewards=rewards[:, None] * ends,
            terminated=ends, truncated=torch.zeros_like(ends), mask=there,
            group_ids=groups)  # fmt: skip
        evaluation = LanguagePolicy(model).evaluate(rollout)
        rollout.logps = evaluation.logps.detach()
        targets = self.algorithm.targets(rollout)
        loss, _ = self.algorithm.loss(Batch(rollout, targets), evaluation)
        return targets.advantages, loss.detach(), torch.autograd.grad(loss, weights)


def trained(kind, config, folder, reward, steps=2, spy=None, **options):
    torch.manual_seed(0)
    arguments = config(
        output_dir=str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=16,
        num_generations=GROUP, max_completion_length=TOKENS, max_steps=steps, learning_rate=3e-3,
        lr_scheduler_type="constant", report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=1, gradient_checkpointing=False, beta=0.0, seed=0, **options)  # fmt: skip
    rows = Dataset.from_dict({"prompt": [f"{a} {b}" for a in WORDS for b in WORDS]})
    trainer = kind(model=tiny_causal_lm(tokenizer(), seed=0), reward_funcs=reward, args=arguments,
                   train_dataset=rows, processing_class=tokenizer())  # fmt: skip
    if spy is not None:
        spy(trainer)
    trainer.train()
    return trainer


CASES = {
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, GRPO(), {"loss_type": "grpo"}),
    "dapo": (trl.GRPOTrainer, trl.GRPOConfig, GRPO(average="token"), {"loss_type": "dapo"}),
    "dr_grpo": (trl.GRPOTrainer, trl.GRPOConfig, DrGRPO(max_tokens=TOKENS),
                {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, RLOO(), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_same_advantages_loss_and_gradient(name, tmp_path):
    kind, config, algorithm, options = CASES[name]
    spied = []
    trained(kind, config, tmp_path, likes_e, spy=lambda t: spied.append(Spied(t, algorithm)),
            **options)  # fmt: skip
    assert len(spied[0].steps) == 2
    for inputs, loss, gradient, advantages, our_loss, our_gradient in spied[0].steps:
        assert advantages.abs().max() > 0.1
        torch.testing.assert_close(advantages, inputs["advantages"], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(our_loss, loss, atol=1e-6, rtol=1e-5)
        for ours, theirs in zip(our_gradient, gradient, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_our_scorer_trains_their_model(tmp_path):
    def counts_e(rollout):
        assert isinstance(rollout.inputs, Tokens)
        found = (rollout.inputs.completion_ids == WORDS.index("e")) & rollout.mask
        return Scores(found.float().sum(1), applicable=rollout.inputs.prompt_ids[:, 0] != 0)

    reward = as_reward_function(counts_e, tokenizer())
    trainer = trained(trl.GRPOTrainer, trl.GRPOConfig, tmp_path, reward, steps=30)
    line = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert not any(map(math.isnan, line))
    assert sum(line[-5:]) / 5 > sum(line[:5]) / 5 + 0.3


def test_their_reward_function_trains_our_model():
    policy, prompts = LanguagePolicy(tiny_causal_lm(tokenizer(), seed=0)), torch.arange(16)[:, None]
    rows = Dataset.from_dict({"prompt": list(WORDS)})
    collect = LanguageCollector(
        policy, prompts, torch.ones_like(prompts).bool(),
        RewardFunction(likes_e, tokenizer(), rows), batch_size=16, group_size=GROUP,
        max_new_tokens=TOKENS, seed=0, eos_token_id=tokenizer().eos_token_id)  # fmt: skip
    history = train(collect, policy, None, GRPO(), rounds=30, lr=3e-3, minibatches=1, epochs=1,
                    seed=0)  # fmt: skip
    line = [entry["reward"] for entry in history]
    assert sum(line[-5:]) / 5 > sum(line[:5]) / 5 + 0.3


def judge_that_likes_e():
    def choose(question):
        a, b = re.findall(r"<answer [AB] \w+>\n(.*?)\n</answer", question.text, re.S)
        return "[[A]]" if a.count("e") >= b.count("e") else "[[B]]"

    return GroupedScorer(Judge(Scripted(choose), Choice()), tokenizer(), GROUP)


def test_a_judge_trains_their_model(tmp_path):
    scorer, seen = judge_that_likes_e(), []
    reward = as_reward_function(scorer, tokenizer())

    def spied(completions, **columns):
        seen.append(sum(text.count("e") for text in completions) / len(completions))
        return reward(**columns)

    trained(trl.GRPOTrainer, trl.GRPOConfig, tmp_path, spied, steps=30)
    assert sum(seen[-5:]) / 5 > sum(seen[:5]) / 5 + 0.3
    assert dict(scorer.outcomes)["decided"] == len(seen) * (16 // GROUP) * GROUP * (GROUP - 1)


def test_a_judge_trains_our_model():
    policy, prompts, seen = LanguagePolicy(tiny_causal_lm(tokenizer(), seed=0)), torch.arange(16)[:, None], []
    scorer = judge_that_likes_e()

    def spied(rollout):
        seen.append(float((rollout.inputs.completion_ids == WORDS.index("e")).float().sum(1).mean()))
        return scorer(rollout)

    collect = LanguageCollector(
        policy, prompts, torch.ones_like(prompts).bool(), spied, batch_size=16, group_size=GROUP,
        max_new_tokens=TOKENS, seed=0, eos_token_id=tokenizer().eos_token_id)  # fmt: skip
    train(collect, policy, None, GRPO(), rounds=30, lr=3e-3, minibatches=1, epochs=1, seed=0)
    assert sum(seen[-5:]) / 5 > sum(seen[:5]) / 5 + 0.3
