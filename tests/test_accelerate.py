"""Two processes under `accelerate launch` learn what one learns; the launch files load."""

import json
import math
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch import nn

from alignkit.storage import Checkpoints
from alignkit.training import fit

STEPS = Path(__file__).with_name("accelerate_steps.py")
LAUNCH = resources.files("alignkit") / "launch"
RUNS = ["ppo", "bspo", "grpo", "grpo_token", "dr_grpo", "rloo", "reinforce", "scorelm", "sft"]


def steps(folder, *launcher):
    folder.mkdir()
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(STEPS.parents[1]), "TMPDIR": str(folder)}  # dumps go there
    done = subprocess.run([sys.executable, *launcher, str(STEPS), str(folder)], env=env,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    "The folders that one process and two processes left."
    root = tmp_path_factory.mktemp("steps")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "cpu2.yaml"),
                "--main_process_port", "0"]
    return steps(root / "one"), steps(root / "two", *launcher)


def told(folder, process=0):
    return json.loads((folder / f"{process}.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_with_the_weights_of_one(ended, name):
    "Everything that learns; masks and lengths differ, so a mean of means would be wrong."
    one, two = ended
    expected = load_file(one / f"{name}-0.safetensors")
    found, other = (load_file(two / f"{name}-{process}.safetensors") for process in (0, 1))
    for key, tensor in expected.items():
        assert torch.equal(found[key], other[key])
        assert torch.allclose(found[key], tensor, atol=1e-4), key


@pytest.mark.parametrize("name", RUNS)
def test_the_figures_are_those_of_the_whole_batch(ended, name):
    one, two = ended
    assert told(one)["processes"] == 1 and told(two)["processes"] == 2
    expected, found = told(one)["histories"][name], told(two)["histories"][name]
    assert found == told(two, 1)["histories"][name]
    for line, other in zip(expected, found, strict=True):
        assert line.keys() == other.keys()
        for figure, value in line.items():
            assert math.isclose(value, other[figure], rel_tol=1e-3, abs_tol=1e-3), figure


def test_one_process_saves_and_shows_and_both_resume(ended):
    for process in (0, 1):
        result = told(ended[1], process)
        assert result["resumed_equals"] and result["resumed_rounds"] == 3
        assert result["shown"] == ([0, 1, 2] if process == 0 else [])


def test_rows_that_cannot_be_shared_are_refused(ended):
    one, two = ended
    assert told(one)["odd"] is None
    assert told(two)["odd"].endswith("rows that 2 processes can share, got 7")


def test_every_process_stops_at_a_row_that_overflows_in_one(ended):
    for process in (0, 1):
        assert told(ended[1], process)["overflow"].startswith(
            "round 0: loss, gradient of weight: expected finite numbers, got NaN or infinity "
            "in row 4")


@pytest.mark.parametrize("name, kind, processes", [
    ("fsdp", "FSDP", 8), ("zero3", "DEEPSPEED", 8), ("cpu2", "MULTI_GPU", 2)])
def test_accelerate_reads_the_launch_files(name, kind, processes):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert config.distributed_type.value == kind and config.num_processes == processes
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3
    if name == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2


def accelerator(kind="MULTI_CPU", processes=1):
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind), num_processes=processes)


def test_an_accelerator_that_does_not_know_the_other_processes_is_refused(monkeypatch):
    "Else every process would train by itself and write over the checkpoints of the others."
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^accelerator: expected one of 2 processes"):
        fit(nn.Linear(1, 1), lambda round_: [], rounds=1, lr=0.1, accelerator=accelerator())


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_pieces_of_weights_are_refused_where_whole_ones_are_needed(tmp_path, kind):
    def run(objective, checkpoints=None):
        fit(objective, lambda round_: [], rounds=1, lr=0.1, checkpoints=checkpoints,
            accelerator=accelerator(kind))

    sampling = nn.Linear(1, 1)
    sampling.whole_weights = True
    with pytest.raises(ValueError, match=f"^checkpoints: expected .* got {kind}"):
        run(nn.Linear(1, 1), Checkpoints(tmp_path))
    with pytest.raises(ValueError, match=f"^objective: expected .* got {kind}"):
        run(sampling)


def test_a_plain_run_imports_no_accelerate():
    code = ("import sys, torch; from alignkit.training import fit\n"
            "class Line(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__(); self.w = torch.nn.Parameter(torch.ones(()))\n"
            "    def forward(self, x): return self.w * x, {}\n"
            "fit(Line(), lambda r: [torch.ones(())], rounds=1, lr=.1)\n"
            "assert 'accelerate' not in sys.modules")
    env = {name: value for name, value in os.environ.items() if "ACCELERATE" not in name}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
