"""Tokens per second of `alignkit.generate.local.sample` beside transformers' `generate`.

    python benchmarks/generate.py [--model FOLDER] [--rounds 5] [--dtype float32|bfloat16] [--group-size 4]

Both continue the same 64 prompts by exactly 32 tokens at the same dtype and number of threads, in turn, in one
process. `--group-size G` repeats each of 64 / G prompts G times, as GRPO does and the experiment on this model with 4;
ours reads equal prompts once. Before anything is timed, the log-probabilities that ours kept are held against a full
forward pass. Without `--model` the weights are random and the sizes are those of SmolLM2-135M, which costs the same.
The products alone, with packed weights, are timed beside the two: nothing that computes this model is faster. Both
clocks are recorded: on a busy machine, the time that the processor gave this process is the one to
read.
"""

import argparse
import json
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import transformers

from alignkit import runs
from alignkit.generate.llama import PackedLinear
from alignkit.generate.local import sample
from alignkit.models.language import LanguagePolicy
from alignkit.training import generator

BATCH, PROMPT, NEW = 64, 16, 32
SMOLLM2_135M = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "max_position_embeddings": 8192, "tie_word_embeddings": True}


def load(model, dtype):
    if model:
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMOLLM2_135M, bos_token_id=None, eos_token_id=None)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def ours(lm, prompts, seed):
    return sample(lm, prompts, max_new_tokens=NEW, generator=generator(seed, "bench"))


def products(lm, different):
    "A function that does the products of one call of `ours`, and nothing else."
    layers = [(PackedLinear(part, dtype=lm.dtype), part.in_features) for part in lm.base_model.modules()
              if isinstance(part, torch.nn.Linear)]
    head, width = PackedLinear(lm.lm_head, dtype=lm.dtype), lm.lm_head.in_features

    @torch.no_grad()
    def run():
        for rows, read in [(different, different * PROMPT)] + [(BATCH, BATCH)] * (NEW - 1):
            for layer, features in layers:
                layer(torch.ones(read, features, dtype=lm.dtype))
            head(torch.ones(rows, width, dtype=lm.dtype))

    return run


@torch.no_grad()
def theirs(lm, prompts):
    # no end token: every row has its 32 tokens
    lm.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=NEW, min_new_tokens=NEW,
                eos_token_id=None, pad_token_id=0)


def largest_error(lm, prompts):
    "Of the log-probabilities kept while sampling, against a full forward pass."
    samples = ours(lm, prompts[:8], seed=1)
    with torch.no_grad():
        again = LanguagePolicy(lm).evaluate(SimpleNamespace(inputs=samples.tokens))
    return float((samples.logps - again.logps).abs().max())


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def seconds(function):
    start = {name: clock() for name, clock in CLOCKS.items()}
    function()
    return {name: clock() - start[name] for name, clock in CLOCKS.items()}


def summary(times, clock):
    "Tokens per second by each, and the ratio of the first two, round by round."
    rates = {name: [BATCH * NEW / t[clock] for t in each] for name, each in times.items()}
    ratio = [a / b for a, b in zip(rates["ours"], rates["transformers"], strict=True)]
    return {"tokens_per_second": rates, "ratio": ratio}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="benchmarks/results/generate.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = load(args.model, getattr(torch, args.dtype))
    prompts = torch.randint(100, 40000, (BATCH // args.group_size, PROMPT), generator=generator(0, "prompts"))
    prompts = prompts.repeat_interleave(args.group_size, 0)
    error = largest_error(lm, prompts)
    assert args.dtype != "float32" or error < 1e-4, error
    runners = {"ours": lambda round_: ours(lm, prompts, round_), "transformers": lambda _: theirs(lm, prompts)}
    alone = products(lm, BATCH // args.group_size)
    runners["products"] = lambda _: alone()
    times = {name: [] for name in runners}
    for round_ in range(args.rounds + 1):
        for name, runner in runners.items():
            taken = seconds(partial(runner, round_))
            if round_:  # the first warms up
                times[name].append(taken)
    result = {"date": datetime.now(UTC).date().isoformat(), "machine": runs.machine(),
              "versions": runs.versions(), "commit": runs.code_commit(),
              "model": args.model and Path(args.model).name, "dtype": args.dtype,
              "threads": args.threads, "batch": BATCH, "group_size": args.group_size, "prompt": PROMPT,
              "new_tokens": NEW, "largest_logp_error": error,
              **{clock: summary(times, clock) for clock in CLOCKS}}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    for clock in CLOCKS:
        for name, each in result[clock]["tokens_per_second"].items():
            print(f"{clock:10} {name:13} {median(each):6.0f} tokens/s  ({min(each):.0f} to {max(each):.0f})")
        ratio = result[clock]["ratio"]
        print(f"{clock:10} ratio         {median(ratio):6.2f}           ({min(ratio):.2f} to {max(ratio):.2f})")


if __name__ == "__main__":
    main()
