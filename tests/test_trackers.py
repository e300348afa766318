"""Figures in TensorBoard, trackio and W&B: written, read back, continued by a resumed run."""

import sys
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from alignkit import cli
from alignkit.models.language import Evaluation
from alignkit.rl.algorithms import GRPO
from alignkit.rl.rollout import Rollout
from alignkit.rl.train import train
from alignkit.storage import Checkpoints
from alignkit.trackers import TRACKERS, Tracker
from alignkit.training import generator


class Bandit(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))

    def evaluate(self, rollout):
        logp = self.logits.log_softmax(0)
        entropy = -(logp.exp() * logp).sum().expand(len(rollout), 1)
        return Evaluation(logp[rollout.inputs][:, None], entropy)


def trained(rounds, on_round, **options):
    "GRPO on a bandit with three arms, eight pulls a group, with a KL penalty."
    bandit, pays = Bandit(), torch.tensor([0.0, 0.2, 1.0])

    def pull(round_):
        p = bandit.logits.detach().softmax(0)
        arm = torch.multinomial(p, 32, replacement=True, generator=generator(0, "pull", round_))
        end = torch.ones(32, 1).bool()
        rollout = Rollout(inputs=arm, logps=p.log()[arm][:, None], rewards=pays[arm][:, None],
                          terminated=end, truncated=~end, mask=end, group_ids=torch.arange(32) // 8)
        return replace(rollout, ref_logps=torch.full((32, 1), 1 / 3).log())

    return train(pull, bandit, None, GRPO(beta=0.1), rounds=rounds, lr=0.05, seed=0,
                 on_round=on_round, **options)


class EveryOther(Checkpoints):
    "Saves after the second round, the fourth, and so on."

    asked = 0

    def due(self):
        self.asked += 1
        return self.asked % 2 == 0


def curves(folder):
    "{figure: {step: value}} of the one run in a folder of TensorBoard; a step twice is an error."
    events = EventAccumulator(str(folder)).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        found[name] = {point.step: point.value for point in points}
        assert len(found[name]) == len(points), name
    return found


def test_tensorboard_holds_every_figure_of_the_loop_under_its_name(tmp_path):
    with Tracker("tensorboard", tmp_path, run="mine") as tracker:
        history = trained(3, tracker)
    found = curves(tmp_path / "tensorboard" / "mine")
    times = found.pop("step_time")
    assert set(times) == {2, 3} and all(0 < seconds < 60 for seconds in times.values())
    assert set(found) == set(history[0]) >= {
        "loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "grad_norm",
        "clip_ratio/region_mean", "completions/mean_length", "num_tokens"}
    for name, points in found.items():
        expected = {step: pytest.approx(line[name], rel=1e-6) for step, line in enumerate(history, 1)}
        assert points == expected, name


def test_a_resumed_run_goes_on_at_its_step_and_forgets_what_is_done_again(tmp_path):
    "Killed in the sixth round, saved after the fourth: the fifth is done twice and logged once."
    whole = trained(8, None)

    def killed(round_, figures):
        tracker(round_, figures)
        if round_ == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Tracker("tensorboard", tmp_path, run="mine") as tracker:
        trained(8, killed, checkpoints=EveryOther(tmp_path / "checkpoints"))
    assert set(curves(tmp_path / "tensorboard" / "mine")["reward"]) == set(range(1, 7))
    seen = []
    with Tracker("tensorboard", tmp_path, run="mine") as tracker:
        trained(8, lambda round_, figures: (seen.append(round_), tracker(round_, figures)),
                checkpoints=EveryOther(tmp_path / "checkpoints"))
    assert seen == [4, 5, 6, 7]
    found = curves(tmp_path / "tensorboard" / "mine")["reward"]
    assert found == {step: pytest.approx(line["reward"]) for step, line in enumerate(whole, 1)}


def test_a_name_that_is_none_and_a_package_that_is_missing(monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match="^report_to: expected one of tensorboard, trackio, wandb, got 'x'"):
        Tracker("x", tmp_path, run="mine")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "bspo", "--report-to", "x"])
    said = capsys.readouterr().err
    assert all(name in said for name in ("--report-to", *TRACKERS))
    assert cli.main(["run", "bspo", "--report-to", "tensorboard"]) == 2  # a run of one's own alone
    assert "--model and --data: required" in capsys.readouterr().err
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModuleNotFoundError, match=rf"pip install 'alignkit\[{name}\]'"):
            Tracker(name, tmp_path, run="mine")


def test_trackio_goes_on_with_the_run(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path)
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path)
    for rounds in ((0, 1), (1, 2)):
        with Tracker("trackio", tmp_path, run="mine", project="p") as tracker:
            for round_ in rounds:
                tracker(round_, {"reward": round_ / 4})
    lines = storage.SQLiteStorage.get_logs("p", "mine")
    assert [(line["step"], line["reward"]) for line in lines] == [
        (1, 0.0), (2, 0.25), (2, 0.25), (3, 0.5)]


def test_wandb_is_told_run_step_and_figures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Tracker("wandb", tmp_path, run="mine", project="p") as tracker:
        tracker(4, {"reward": 0.25})
        assert (wandb.run.id, wandb.run.project, wandb.run.step) == ("mine", "p", 5)
        tracker(5, {"reward": 0.5})
        assert wandb.run.step == 6
    assert wandb.run is None
    assert [path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")] == ["run-mine.wandb"]
