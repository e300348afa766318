"""Completions per second of `rl.train` beside TRL's trainers, GRPO or RLOO, one update a batch.

    python benchmarks/grpo_loop.py [--method grpo|rloo] [--size tiny|10m|135m] [--runs 5] [--threads 2]

Both train the same randomly initialised Llama on 32 prompts x 8 completions of up to 32 tokens a step, with the same
reward, learning rate and end token, in turn, each run from the same weights with a seed of its own; the first step of
a run is not timed. Size 135m is a pretrained model (`alignkit.models.weights`), on 8 prompts x 8 completions: a step
of it takes a minute, so `--runs 1 --steps 2` is enough. `tests/test_trl.py` holds advantages, loss and gradient of the two against each other. Beside the
times stands the floor, which has its turn too: the model's own forward and backward pass over the batch.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from alignkit import runs
from alignkit.models.language import LanguagePolicy, encode_prompts, quiet_transformers
from alignkit.models.weights import small_model
from alignkit.rl.algorithms import GRPO, RLOO
from alignkit.rl.language import LanguageCollector, RewardFunction
from alignkit.rl.train import train

GROUP, NEW = 8, 32
SIZES = {"tiny": {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 256,
                  "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
         "10m": {"vocab_size": 4096, "hidden_size": 320, "intermediate_size": 1024,
                 "num_hidden_layers": 6, "num_attention_heads": 5, "num_key_value_heads": 5}}
METHODS = {"grpo": (GRPO(), GRPOTrainer, GRPOConfig, {"loss_type": "grpo"}),
           "rloo": (RLOO(), RLOOTrainer, RLOOConfig, {})}


def words(size):
    "A tokenizer of one word an id; the last two end and pad."
    vocabulary = {f"w{i}": i for i in range(size - 2)} | {"<end>": size - 2, "<pad>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", padding_side="left")


def odd_words(completions, **_):
    "The share of words whose number is odd."
    return [mean([int(w[1:]) % 2 for w in text.split()] or [0]) for text in completions]


def odd_lengths(completions, **_):
    "The share of words with an odd number of letters."
    return [mean([len(w) % 2 for w in text.split()] or [0]) for text in completions]


@dataclass
class Setup:
    "A model that can be had again and again, its prompts and its reward."

    fresh: Callable  # () -> the model with its first weights
    tokenizer: Any
    rows: Dataset
    reward: Callable
    prompts: int  # a step
    lr: float
    new: int = NEW  # tokens of a completion, at most

    @property
    def completions(self):
        return self.prompts * GROUP


def random_llama(sizes, **changes):
    "A Llama with random weights, 32 prompts of two words a step."
    tokenizer = words(sizes["vocab_size"])

    def fresh():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **sizes, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))

    rows = Dataset.from_dict({"prompt": [f"w{i} w{i + 7}" for i in range(200)]})
    return Setup(**{"fresh": fresh, "tokenizer": tokenizer, "rows": rows, "reward": odd_words,
                    "prompts": 32, "lr": 3e-3} | changes)


def pretrained():
    "The small real model, 8 prompts a step."
    path = small_model().path
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def fresh():
        with quiet_transformers():
            return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    rows = Dataset.from_dict({"prompt": [f"What I know of the number {i}:" for i in range(200)]})
    return Setup(fresh, tokenizer, rows, odd_lengths, prompts=8, lr=1e-6)


class Stopwatch:
    "Seconds between calls."

    def __init__(self, clock=time.perf_counter):
        self.seconds, self.last, self.clock = [], None, clock

    def __call__(self, *_):
        now = self.clock()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def collector(setup, policy, seed, **options):
    ids, mask = encode_prompts(setup.tokenizer, setup.rows["prompt"][:])
    scorer = RewardFunction(setup.reward, setup.tokenizer, setup.rows)
    return LanguageCollector(
        policy, ids, mask, scorer, batch_size=setup.completions, group_size=GROUP,
        max_new_tokens=setup.new, seed=seed, eos_token_id=setup.tokenizer.eos_token_id,
        pad_token_id=setup.tokenizer.pad_token_id, **options)


def ours(setup, method, steps, seed):
    policy, watch = LanguagePolicy(setup.fresh()), Stopwatch()
    history = train(collector(setup, policy, seed), policy, None, METHODS[method][0], rounds=steps,
                    lr=setup.lr, minibatches=1, epochs=1, seed=seed, on_round=watch)
    return watch.seconds, [line["reward"] for line in history]


def theirs(setup, method, steps, seed, clock=time.perf_counter):
    _, trainer_class, config, options = METHODS[method]
    watch = Stopwatch(clock)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            watch()

    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0,
            per_device_train_batch_size=setup.completions, num_generations=GROUP, max_steps=steps,
            max_completion_length=setup.new, learning_rate=setup.lr, lr_scheduler_type="constant",
            seed=seed, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
            **options)
        trainer = trainer_class(model=setup.fresh(), reward_funcs=setup.reward, args=arguments,
                                train_dataset=setup.rows, processing_class=setup.tokenizer,
                                callbacks=[Watch()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return watch.seconds, [line["reward"] for line in trainer.state.log_history if "reward" in line]


def floor(setup):
    "Seconds of one forward and backward pass over the tokens of a step."
    lm = setup.fresh()
    ids = torch.randint(0, lm.config.vocab_size, (setup.completions, setup.new + 1))
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        lm(ids).logits.logsumexp(-1).mean().backward()
        seconds = time.perf_counter() - start
    return seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=METHODS, default="grpo")
    parser.add_argument("--size", choices=[*SIZES, "135m"], default="tiny")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    setup = pretrained() if args.size == "135m" else random_llama(SIZES[args.size])
    floors = []
    times, curves = ({"alignkit": [], "trl": []} for _ in range(2))
    for seed in range(args.runs):
        for name, loop in (("alignkit", ours), ("trl", theirs)):
            seconds, rewards = loop(setup, args.method, args.steps, seed)
            times[name].append(median(seconds))
            curves[name].append(rewards)
        floors.append(floor(setup))
    ratio = [b / a for a, b in zip(times["alignkit"], times["trl"], strict=True)]
    parameters = sum(p.numel() for p in setup.fresh().parameters())
    result = {"date": datetime.now(UTC).date().isoformat(), "machine": runs.machine(),
              "versions": runs.versions(), "commit": runs.code_commit(), "method": args.method,
              "parameters": parameters, "prompts": setup.prompts, "group_size": GROUP,
              "new_tokens": setup.new, "threads": args.threads, "step_seconds": times, "ratio": ratio,
              "floor_seconds": median(floors), "rewards": curves}
    out = args.out or f"benchmarks/results/{args.method}_loop_{args.size}.json"
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    for name, each in times.items():
        rate = setup.completions / median(each)
        last = mean(mean(curve[-5:]) for curve in curves[name])
        print(f"{name:9} {rate:6.0f} completions/s, {median(each):.3f} s a step; "
              f"reward {mean(c[0] for c in curves[name]):.3f} -> {last:.3f}")
    print(f"floor     {median(floors):.3f} s (forward and backward)")
    print(f"ratio     {median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})")


if __name__ == "__main__":
    main()
