"""What a step of the loop costs: its parts, how it grows with the batch, and that no logits of all tokens exist."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

from alignkit.ops import logprobs

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def cost():
    pytest.importorskip("trl")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("rl_cost")
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)


def test_the_parts_of_a_step_are_the_step(cost):
    steps = cost.our_steps(cost.Case(completions=32, tokens=8), steps=3, seed=0, beta=0.04)
    assert len(steps) == 2
    for step in steps:
        assert set(step) == {"step", *cost.PHASES}
        assert sum(step[name] for name in cost.PHASES) == pytest.approx(step["step"])
        assert all(step[name] > 0 for name in cost.PHASES)
        assert step["rest"] < 0.5 * step["step"]  # nothing large is left unnamed


def test_a_step_grows_at_most_in_proportion_to_the_batch(cost):
    small, large = 32, 512
    seconds = [min(step["step"] for step in
                   cost.our_steps(cost.Case(completions=n, tokens=8), steps=4, seed=0))
               for n in (small, large)]
    assert math.log(seconds[1] / seconds[0]) / math.log(large / small) < 1.3


def test_the_update_has_no_logits_of_all_tokens(cost, monkeypatch):
    "Four times the vocabulary: the memory grows with the LM head and its gradients alone."
    small, large = (cost.Case(completions=64, tokens=16, vocabulary=v) for v in (2048, 8192))
    whole = [cost.update_memory(case, cost.WholeLogits) for case in (small, large)]
    monkeypatch.setattr(logprobs, "CHUNK", 2**17)
    ours = [cost.update_memory(case) for case in (small, large)]
    logits = whole[1]["logits"] - whole[0]["logits"]
    head = 4 * (large.vocabulary - small.vocabulary) * large.width
    assert whole[1]["largest"] >= whole[1]["logits"]  # the measure sees what is there
    assert whole[1]["peak"] - whole[0]["peak"] >= 2 * logits
    assert ours[1]["largest"] <= max(4 * 2**17, 4 * large.vocabulary * large.width)
    assert ours[1]["peak"] - ours[0]["peak"] <= 4 * head < logits / 3
