"""Where the time and the memory of a step of `rl.train` go, and how they grow.

    python benchmarks/rl_cost.py [--runs 3] [--steps 5] [--out benchmarks/results/rl_cost.json]

The random Llama, prompts and reward are those of `grpo_loop.py`. One thing grows at a time: completions a step, tokens
a completion, the vocabulary, the model. Ours and TRL's GRPO take turns, in every run from the same weights; the first
step of a run is not timed. Times are CPU seconds of the process, on one thread, which other processes on the machine
move little. The memory is that of one update (forward, loss, backward), as torch's allocator counts it, beside the
same update with `log_softmax` over all logits. `nbs/library/10e_rl_cost.ipynb` draws what this records, beside
the split of an earlier commit (rl_cost_before.json).
"""

import argparse
import json
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import grpo_loop
import torch
import transformers
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.profiler import ProfilerActivity, profile

from alignkit import ops, runs
from alignkit.models.language import Evaluation, LanguagePolicy, completion_hidden, label_ids
from alignkit.ops.logprobs import CHUNK
from alignkit.rl.algorithms import GRPO, Batch
from alignkit.rl.train import PolicyObjective, train

PHASES = ("sampling", "scoring", "reference", "advantages", "forward and backward", "optimizer",
          "rest")
clock = time.process_time


@dataclass(frozen=True)
class Case:
    "The size of a step."

    completions: int = 64
    tokens: int = 32  # of a completion
    vocabulary: int = 256
    width: int = 64
    layers: int = 2

    def setup(self):
        heads = self.width // 16
        sizes = {"vocab_size": self.vocabulary, "hidden_size": self.width,
                 "intermediate_size": 4 * self.width, "num_hidden_layers": self.layers,
                 "num_attention_heads": heads, "num_key_value_heads": heads}
        return grpo_loop.random_llama(sizes, prompts=self.completions // grpo_loop.GROUP,
                                      new=self.tokens)


GROWTH = {
    "completions": [Case(completions=n) for n in (32, 64, 128, 256, 512)],
    "tokens": [Case(tokens=n) for n in (8, 16, 32, 64, 128)],
    "vocabulary": [Case(vocabulary=n) for n in (256, 1024, 4096, 16384, 49152)],
    "parameters": [Case(width=w, layers=n) for w, n in ((64, 2), (128, 4), (256, 4), (384, 6))],
}
SPLITS = {"tiny": Case(completions=256),
          "10M": Case(vocabulary=4096, width=320, layers=6)}
MEMORY = [Case(vocabulary=n) for n in (1024, 4096, 8192, 16384, 32768, 65536)]


class Phases:
    "Seconds of each part of every step but the first."

    def __init__(self):
        self.seconds, self.steps = defaultdict(float), []
        self._last, self._began = None, {}

    def timed(self, name, function):
        def timed(*args):
            start = clock()
            result = function(*args)
            self.seconds[name] += clock() - start
            return result
        return timed

    def on_round(self, *_):
        now = clock()
        if self._last is not None:
            rest = now - self._last - sum(self.seconds.values())
            self.steps.append(self.seconds | {"rest": rest, "step": now - self._last})
        self.seconds, self._last = defaultdict(float), now

    @contextmanager
    def of_the_update(self):
        "From the objective's call to the optimiser's is forward and backward, the clipping included."
        def begins(module, _):
            if isinstance(module, PolicyObjective):
                self._began["forward and backward"] = clock()

        def ends(name):
            def hook(*_):
                now = clock()
                self.seconds[name] += now - self._began[name]
                self._began["optimizer"] = now
            return hook

        with ExitStack() as stack:
            for handle in (register_module_forward_pre_hook(begins),
                           register_optimizer_step_pre_hook(ends("forward and backward")),
                           register_optimizer_step_post_hook(ends("optimizer"))):
                stack.callback(handle.remove)
            yield


class TimedGRPO(GRPO):
    "GRPO whose advantages are timed."

    def __init__(self, phases, **options):
        super().__init__(**options)
        object.__setattr__(self, "phases", phases)

    def targets(self, rollout):
        return self.phases.timed("advantages", super().targets)(rollout)


def our_steps(case, steps, seed, beta=0.0):
    "Phases of the steps; with a penalty, a frozen reference policy reads every rollout too."
    setup, phases = case.setup(), Phases()
    policy, reference = LanguagePolicy(setup.fresh()), None
    if beta:
        reference = LanguagePolicy(setup.fresh())
        reference.evaluate = phases.timed("reference", reference.evaluate)
    collect = grpo_loop.collector(setup, policy, seed, ref_policy=reference)
    collect.samples = phases.timed("sampling", collect.samples)
    collect.scorer = phases.timed("scoring", collect.scorer)
    with phases.of_the_update():
        train(collect, policy, None, TimedGRPO(phases, beta=beta), rounds=steps, lr=setup.lr,
              minibatches=1, epochs=1, seed=seed, on_round=phases.on_round)
    return phases.steps


def their_steps(case, steps, seed):
    "Seconds of the steps of TRL's GRPO."
    return grpo_loop.theirs(case.setup(), "grpo", steps, seed, clock)[0]


def split(case, steps, seeds):
    "Median seconds of each phase, a reference policy among them."
    found = [step for seed in range(seeds) for step in our_steps(case, steps, seed, beta=0.04)]
    return {name: median(step[name] for step in found) for name in ("step", *PHASES)}


def growth(cases, steps, seeds):
    "Seconds of a step, ours and TRL's in turn: one median a run."
    found = [{"alignkit": [], "trl": []} for _ in cases]
    for seed in range(seeds):
        for case, times in zip(cases, found, strict=True):
            times["alignkit"].append(median(s["step"] for s in our_steps(case, steps, seed)))
            times["trl"].append(median(their_steps(case, steps, seed)))
    return found


class WholeLogits(LanguagePolicy):
    "The policy as people write it: `log_softmax` and `gather` over the logits of all tokens."

    def evaluate(self, rollout):
        tokens, head = rollout.inputs, self.lm.get_output_embeddings()
        found = ops.linear_token_logps_reference(
            completion_hidden(self.lm, tokens).flatten(0, 1), head.weight,
            label_ids(tokens).flatten())
        return Evaluation(*(x.view(tokens.completion_ids.shape) for x in found[:2]))


def update_memory(case, policy_class=LanguagePolicy):
    "Bytes above the weights at the peak of one update, and of its largest allocation."
    setup, algorithm = case.setup(), GRPO()
    policy = policy_class(setup.fresh())
    rollout = grpo_loop.collector(setup, policy, seed=0)(0)
    batch = Batch(rollout, algorithm.targets(rollout))

    def update():
        loss, _ = algorithm.loss(batch, policy.evaluate(rollout))
        loss.backward()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
    events = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events()
              if e.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return {"peak": peak, "largest": max(size for _, size in events),
            "logits": 4 * int(rollout.mask.sum()) * case.vocabulary}


def parameters(case):
    return sum(p.numel() for p in case.setup().fresh().parameters())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results/rl_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = {
        "date": datetime.now(UTC).date().isoformat(), "machine": runs.machine(),
        "versions": runs.versions(), "commit": runs.code_commit(), "threads": 1,
        "clock": "CPU seconds of the process", "runs": args.runs, "steps": args.steps,
        "chunk_bytes": 4 * CHUNK, "split": {}, "growth": {}, "memory": []}
    for name, case in SPLITS.items():
        result["split"][name] = {"case": asdict(case), "parameters": parameters(case),
                                 "seconds": split(case, args.steps, args.runs)}
    for name, cases in GROWTH.items():
        result["growth"][name] = [
            {"case": asdict(case), "parameters": parameters(case), "step_seconds": times}
            for case, times in zip(cases, growth(cases, args.steps, args.runs), strict=True)]
        print(name, *(f"{median(line['step_seconds']['alignkit']):.3f}"
                      for line in result["growth"][name]))
    for case in MEMORY:
        result["memory"].append({"case": asdict(case), "alignkit": update_memory(case),
                                 "whole_logits": update_memory(case, WholeLogits)})
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
