"""Completions per second of `rl.train` beside TRL's trainers, GRPO or RLOO, one update a batch.

    python benchmarks/grpo_loop.py [--method grpo|rloo] [--size tiny|10m] [--runs 5] [--threads 2]

Both train the same randomly initialised Llama on 32 prompts x 8 completions of up to 32 tokens a step, with the same
reward, learning rate and end token, in turn, each run from the same weights with a seed of its own; the first step of
a run is not timed. `tests/test_trl.py` holds advantages, loss and gradient of the two against each other. Beside the
times stands the floor: the model's own forward and backward pass over the batch.
"""

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from alignkit import runs
from alignkit.models.language import LanguagePolicy, encode_prompts
from alignkit.rl.algorithms import GRPO, RLOO
from alignkit.rl.language import LanguageCollector, RewardFunction
from alignkit.rl.train import train

PROMPTS, GROUP, NEW, LR = 32, 8, 32, 3e-3
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


class Stopwatch:
    "Seconds between calls."

    def __init__(self):
        self.seconds, self.last = [], None

    def __call__(self, *_):
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def ours(lm, tokenizer, rows, method, steps, seed):
    ids, mask = encode_prompts(tokenizer, rows["prompt"][:])
    policy, watch = LanguagePolicy(lm), Stopwatch()
    collect = LanguageCollector(
        policy, ids, mask, RewardFunction(odd_words, tokenizer, rows), batch_size=PROMPTS * GROUP,
        group_size=GROUP, max_new_tokens=NEW, seed=seed, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    history = train(collect, policy, None, METHODS[method][0], rounds=steps, lr=LR, minibatches=1,
                    epochs=1, seed=seed, on_round=watch)
    return watch.seconds, [line["reward"] for line in history]


def theirs(lm, tokenizer, rows, method, steps, seed):
    _, trainer_class, config, options = METHODS[method]
    watch = Stopwatch()

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            watch()

    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.0,
            per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP, max_steps=steps,
            max_completion_length=NEW, learning_rate=LR, lr_scheduler_type="constant", seed=seed,
            report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, **options)
        trainer = trainer_class(model=lm, reward_funcs=odd_words, args=arguments,
                                train_dataset=rows, processing_class=tokenizer, callbacks=[Watch()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return watch.seconds, [line["reward"] for line in trainer.state.log_history if "reward" in line]


def floor(lm):
    "Seconds of one forward and backward pass over the tokens of a step."
    ids = torch.randint(0, lm.config.vocab_size, (PROMPTS * GROUP, NEW + 1))
    start = time.perf_counter()
    lm(ids).logits.logsumexp(-1).mean().backward()
    lm.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=METHODS, default="grpo")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    tokenizer = words(SIZES[args.size]["vocab_size"])
    rows = Dataset.from_dict({"prompt": [f"w{i} w{i + 7}" for i in range(200)]})

    def fresh():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            **SIZES[args.size], max_position_embeddings=128, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id)
        return transformers.LlamaForCausalLM(config)

    times, curves = ({"alignkit": [], "trl": []} for _ in range(2))
    for seed in range(args.runs):
        for name, loop in (("alignkit", ours), ("trl", theirs)):
            seconds, rewards = loop(fresh(), tokenizer, rows, args.method, args.steps, seed)
            times[name].append(median(seconds))
            curves[name].append(rewards)
    floors = [floor(fresh()) for _ in range(10)]
    ratio = [b / a for a, b in zip(times["alignkit"], times["trl"], strict=True)]
    parameters = sum(p.numel() for p in fresh().parameters())
    result = {"date": datetime.now(UTC).date().isoformat(), "machine": runs.machine(),
              "versions": runs.versions(), "commit": runs.code_commit(), "method": args.method,
              "parameters": parameters, "prompts": PROMPTS, "group_size": GROUP,
              "new_tokens": NEW, "threads": args.threads, "step_seconds": times, "ratio": ratio,
              "floor_seconds": median(floors), "rewards": curves}
    out = args.out or f"benchmarks/results/{args.method}_loop_{args.size}.json"
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    for name, each in times.items():
        rate = PROMPTS * GROUP / median(each)
        last = mean(mean(curve[-5:]) for curve in curves[name])
        print(f"{name:9} {rate:6.0f} completions/s, {median(each):.3f} s a step; "
              f"reward {mean(c[0] for c in curves[name]):.3f} -> {last:.3f}")
    print(f"floor     {median(floors):.3f} s (forward and backward)")
    print(f"ratio     {median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})")


if __name__ == "__main__":
    main()
