"""`fit` resumes to the bit from anywhere, and stops before a bad step."""

import hashlib
import pickle
import tempfile

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from alignkit.storage import Checkpoints
from alignkit.training import (
    NotFinite,
    fit,
    generator,
    linear_decay,
    load_dump,
    named_tensors,
    shuffled_batches,
)


@pytest.fixture(autouse=True)
def dumps_here(monkeypatch, tmp_path):
    "Dumps of runs without checkpoints go to the temporary folder: here, the test's."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class EveryRound(Checkpoints):
    def due(self):
        return True


class Tied(nn.Module):
    "Two names for one weight and a buffer: what a checkpoint likes to forget."

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


class Dropping(nn.Module):
    "All that a checkpoint may hold: weights, a buffer, a frozen part, randomness."

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.frozen = nn.Linear(4, 8).requires_grad_(False)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)
        self.register_buffer("moving", torch.zeros(()))

    def forward(self, x):
        hidden = nn.functional.dropout(torch.tanh(self.first(self.frozen(x))), 0.5)
        predicted = self.second(hidden)
        self.moving += 0.1 * (predicted.detach().mean() - self.moving)
        return (predicted - self.moving - 1).square().mean(), {}


def end_state(folder, rounds=6, module=None):
    "Everything that a resumed run may differ in."
    module = module or Dropping()
    checkpoints = EveryRound(folder)
    history = fit(module, batches, rounds=rounds, lr=0.05, checkpoints=checkpoints)
    step, files = checkpoints.latest()
    return step, history, {name: hashlib.sha256(data).hexdigest()
                           for name, data in files.items()}


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    "A run of six rounds, and the checkpoint after three."
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(5)
    whole = end_state(root / "whole")
    torch.manual_seed(5)
    end_state(root / "half", rounds=3)
    return whole, EveryRound(root / "half").latest()


def inventory():
    "What a checkpoint of `Dropping` holds: file, entry."
    learned = ["first.weight", "first.bias", "second.weight", "second.bias", "moving"]
    kinds = ["step", "exp_avg", "exp_avg_sq"]
    return ([("objective.safetensors", name) for name in learned]
            + [("optimizer.safetensors", f"{i}/{kind}") for i in range(4) for kind in kinds]
            + [("random.safetensors", "cpu"), ("history.json", None), ("frozen.sha256", None),
               ("step", None)])


def test_the_inventory_is_complete(half_way):
    step, files = half_way[1]
    found = [(file, name) for file in files if file.endswith(".safetensors")
             for name in load(files[file])]
    listed = inventory()
    assert step == 3 and sorted(found) == sorted(item for item in listed if item[1])
    assert set(files) == {file for file, _ in listed} - {"step"}


def test_a_checkpoint_that_nobody_touched_resumes_to_the_same_state(half_way, tmp_path):
    whole, (step, files) = half_way
    Checkpoints(tmp_path).save(step, files)
    torch.manual_seed(99)
    assert end_state(tmp_path) == whole


def altered(entry):
    entry = entry.clone()
    if entry.dtype == torch.uint8:  # the middle of a random state: not the count, not the end
        entry[1000:1100] ^= 1
        return entry
    return entry + 1


def mutated(step, files, file, name, change):
    "The checkpoint with one item lost (emptied, dropped) or altered."
    files = dict(files)
    if file == "step":
        return (step + 1 if change == "alter" else 0), files
    if name is None and change == "drop":
        files[file] = b"[]" if file == "history.json" else b""
    elif name is None:
        files[file] = files[file].replace(b"1", b"2")
    else:
        tensors = load(files[file])
        entry = tensors.pop(name)
        if change == "alter":
            tensors[name] = altered(entry)
        files[file] = save(tensors)
    return step, files


@pytest.mark.parametrize("change", ["drop", "alter"])
@pytest.mark.parametrize("file, name", inventory())
def test_every_item_of_a_checkpoint_that_is_lost_is_noticed(half_way, tmp_path, file, name, change):
    whole, (step, files) = half_way
    Checkpoints(tmp_path).save(*mutated(step, files, file, name, change))
    try:
        found = end_state(tmp_path)
    except (ValueError, KeyError) as error:
        assert name is None or "checkpoints: expected" in str(error) or name == "cpu"
    else:
        assert found != whole


def test_a_lost_optimiser_entry_is_noticed_too(half_way, tmp_path):
    whole, (step, files) = half_way
    kept = {name: x for name, x in load(files["optimizer.safetensors"]).items()
            if not name.startswith("2/")}
    Checkpoints(tmp_path).save(step, files | {"optimizer.safetensors": save(kept)})
    assert end_state(tmp_path)[2]["objective.safetensors"] != whole[2]["objective.safetensors"]


def test_what_does_not_learn_is_not_written_but_must_be_the_same(tmp_path):
    end_state(tmp_path, rounds=2)
    files = EveryRound(tmp_path).latest()[1]
    assert not [name for name in load(files["objective.safetensors"]) if "frozen" in name]
    other = Dropping()
    other.frozen.bias[0] += 1e-6
    with pytest.raises(ValueError, match="^checkpoints: expected the frozen weights"):
        end_state(tmp_path, module=other)


def test_a_checkpoint_of_another_objective_is_refused_by_name(tmp_path):
    end_state(tmp_path, rounds=2)
    other = Dropping()
    other.third = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"^checkpoints: .*\['third.bias', 'third.weight'\]"):
        end_state(tmp_path, module=other)


class Rows(nn.Module):
    "Mean over rows of exp(weight · x): overflows for one large row, in loss or in gradient."

    def __init__(self, wrong="loss"):
        super().__init__()
        self.weight, self.wrong = nn.Parameter(torch.ones(2)), wrong

    def forward(self, x):
        y = x @ self.weight
        if self.wrong == "loss":
            loss = y.exp().mean()
            return loss, {"largest": y.detach().max(), "part": loss.detach()}
        return y.sqrt().mean(), {}  # infinite slope at zero


@pytest.mark.parametrize("wrong, bad_row, quantity", [
    ("loss", [60.0, 60.0], "loss, part, gradient of weight"),
    ("gradient", [1.0, -1.0], "gradient of weight")])
def test_the_row_behind_a_bad_loss_or_gradient_is_named(tmp_path, wrong, bad_row, quantity):
    x = torch.ones(5, 2)
    x[3] = torch.tensor(bad_row)
    module = Rows(wrong)
    with pytest.raises(NotFinite, match=f"^round 2: {quantity}: expected .* in row 3") as caught:
        fit(module, lambda round_: [x if round_ == 2 else torch.ones(5, 2)], rounds=3, lr=0.0,
            checkpoints=Checkpoints(tmp_path))
    info, tensors = load_dump(caught.value.dump)
    assert info["round"] == 2 and torch.equal(tensors["batch"], x)
    assert caught.value.dump.parent == tmp_path and torch.equal(module.weight, torch.ones(2))


def test_a_dump_without_checkpoints_loads_too():
    with pytest.raises(NotFinite, match="^round 0: batch: expected .* in row 1") as caught:
        fit(Rows(), lambda round_: [torch.tensor([[1.0, 1.0], [float("nan"), 1.0]])], rounds=1,
            lr=0.1)
    info, tensors = load_dump(caught.value.dump)
    assert tensors["batch"].isnan().tolist() == [[False, False], [True, False]]


def test_a_dump_does_not_disturb_the_checkpoints(tmp_path):
    checkpoints = EveryRound(tmp_path)
    with pytest.raises(NotFinite):
        fit(Line(), lambda round_: [torch.tensor(float("nan") if round_ == 2 else 1.0)],
            rounds=3, lr=0.1, checkpoints=checkpoints)
    checkpoints.clean()
    assert checkpoints.latest()[0] == 2
    fit(Line(), lambda round_: [torch.tensor(1.0)], rounds=4, lr=0.1, checkpoints=checkpoints)
    assert checkpoints.latest()[0] == 4


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(NotFinite("x: wrong", {"x": torch.ones(1)})))
    assert str(error) == "x: wrong" and torch.equal(error.tensors["x"], torch.ones(1))


def test_tensors_are_found_in_what_a_batch_is_made_of():
    nested = {"a": [torch.ones(1), {"b": torch.zeros(2)}], "c": 3, "d": None}
    assert list(named_tensors(nested)) == ["a.0", "a.1.b"]
