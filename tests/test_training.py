"""`fit` resumes to the bit from anywhere, and stops before a bad step."""

import hashlib

import pytest
import torch
from torch import nn

from alignkit.storage import Checkpoints
from alignkit.training import NotFinite, fit, generator, linear_decay, shuffled_batches


class EveryRound(Checkpoints):
    def due(self):
        return True


class Tied(nn.Module):
    "Two names for one weight, a buffer and dropout: what a checkpoint likes to forget."

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return (self.second(torch.tanh(self.first(x))) - 1).square().mean(), {}


def batches(round_):
    return [torch.randn(3, 4, generator=generator(0, "x", round_, i)) for i in range(2)]


def digest(module):
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest()
            for name, t in module.state_dict().items()}


def run(folder=None, stop=None):
    module = Tied()

    def interrupt(round_, figures):
        if round_ == stop:
            raise KeyboardInterrupt

    history = fit(module, batches, rounds=12, lr=0.05, weight_decay=0.1, schedule=linear_decay,
                  checkpoints=EveryRound(folder) if folder else None, on_round=interrupt)
    return digest(module), history


def test_resume_from_every_round_and_twice_equals_one_run(tmp_path):
    expected, expected_history = run()
    for first in range(0, 11):
        folder = tmp_path / str(first)
        for stop in (first, first + 1):
            with pytest.raises(KeyboardInterrupt):
                run(folder, stop)
        found, history = run(folder)
        assert found == expected and history == expected_history


def test_different_data_end_in_different_bits():
    one, other = Tied(), Tied()
    fit(one, batches, rounds=2, lr=0.05)
    fit(other, lambda round_: batches(round_ + 1), rounds=2, lr=0.05)
    assert digest(one)["first.weight"] != digest(other)["first.weight"]


def test_rows_cover_every_epoch_and_depend_on_seed_and_step_alone():
    rows = shuffled_batches(12, 4, seed=3)
    for epoch in range(3):
        seen = torch.cat([rows(3 * epoch + i) for i in range(3)])
        assert seen.sort().values.tolist() == list(range(12))
    assert not torch.equal(rows(0), shuffled_batches(12, 4, seed=4)(0))
    with pytest.raises(ValueError, match="^batch_size: expected"):
        shuffled_batches(3, 4, seed=0)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.slope * x, {}


def test_gradients_are_clipped_to_the_norm():
    "Two steps of AdamW with gradients 1000 and 1: unclipped, the second hardly moves."
    def two(round_):
        return [torch.tensor(1000.0 if round_ == 0 else 1.0)]

    clipped, free = Line(), Line()
    fit(clipped, two, rounds=2, lr=0.1, max_grad_norm=1.0)
    fit(free, two, rounds=2, lr=0.1, max_grad_norm=1e9)
    assert clipped.slope.item() == pytest.approx(0.8, abs=1e-3)
    assert free.slope.item() > 0.81


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_stops_the_run_before_the_step(bad):
    module = Line()
    with pytest.raises(NotFinite, match="round 1"):
        fit(module, lambda round_: [torch.tensor(bad if round_ else 1.0)], rounds=3, lr=0.1)
    assert module.slope.item() == pytest.approx(0.9)


def test_figures_are_means_over_the_steps_of_a_round():
    class Counter(Line):
        def forward(self, x):
            return self.slope * 0, {"x": x}

    history = fit(Counter(), lambda round_: [torch.tensor(1.0), torch.tensor(3.0)], rounds=1,
                  lr=0.1, observe=lambda round_: {"looked": 7.0})
    assert history[0]["x"] == 2.0 and history[0]["looked"] == 7.0
