"""runs with real processes: killed, interrupted, orphaned, resumed, two in one folder."""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from alignkit import runs
from alignkit.runs import Job, Result, Work, derive_seed, stage

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def pack(state: np.ndarray, curve: list[float], generator: np.random.Generator) -> dict[str, bytes]:
    buffer = io.BytesIO()
    np.save(buffer, state, allow_pickle=False)
    more = {"curve": curve, "generator": generator.bit_generator.state}
    return {"state.npy": buffer.getvalue(), "more.json": json.dumps(more).encode()}


def unpack(files: dict[str, bytes]) -> tuple[np.ndarray, list[float], np.random.Generator]:
    more = json.loads(files["more.json"])
    generator = np.random.default_rng()
    generator.bit_generator.state = more["generator"]
    return np.load(io.BytesIO(files["state.npy"])), more["curve"], generator


@stage()
def walk(work: Work) -> Result:
    "A random walk of many numbers whose every step depends on all earlier ones."
    done, steps = 0, work.config["steps"]
    generator = np.random.default_rng(derive_seed(work.seed, "walk"))
    state, curve = np.zeros(work.config["size"]), []
    if latest := work.checkpoints.latest():
        done, (state, curve, generator) = latest[0], unpack(latest[1])
    for step in range(done + 1, steps + 1):
        state = np.sin(state + generator.normal(size=state.size))
        curve.append(float(state.sum()))
        work.progress(step, steps, sum=curve[-1])
        time.sleep(work.config["pause"])
        if step % work.config["save_every"] == 0:
            work.checkpoints.save(step, pack(state, curve, generator))
    (work.folder / "state.npy").write_bytes(state.tobytes())
    return Result(scalars={"mean": state.mean()}, curves={"sum": curve})


def walks(**config) -> list[Job]:
    config = {"steps": 40, "size": 100_000, "save_every": 2, "pause": 0.0, **config}
    first = Job("toy", walk, "", 100, config)
    return [Job("toy", walk, arm, seed, config, needs=(first,)) for arm in "ab" for seed in (1, 2)]


def main(out: str, config: str, processes: str) -> None:
    runs.run(walks(**json.loads(config)), out, int(processes))


def start(out: Path, processes: int = 2, **config) -> subprocess.Popen:
    "A run in a session of its own, as a terminal starts it."
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_runs_kill; " \
           "test_runs_kill.main(*sys.argv[2:])"
    arguments = [str(Path(__file__).parent), str(out), json.dumps(config), str(processes)]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def end_state(out: Path) -> dict[str, str]:
    "Hashes of all that the jobs left, clocks aside."
    found = {}
    for folder in sorted(out.glob("jobs/*/")):
        record = json.loads((folder / "record.json").read_bytes())
        log = [line["step"] for line in runs.read_log(folder / "log.jsonl")]
        parts = [record["scalars"], record["curves"], log]
        data = json.dumps(parts).encode() + (folder / "state.npy").read_bytes()
        found[folder.name] = hashlib.sha256(data).hexdigest()
    return found


def kill_and_resume(tmp_path: Path, kills: int, processes: int) -> None:
    "SIGKILL at random moments, most of them inside a save; the end must not tell."
    rng = random.Random(kills + processes)
    reference = tmp_path / "reference"
    assert start(reference, processes).wait() == 0
    killed = tmp_path / "killed"
    in_save = 0
    for _ in range(kills):
        process = start(killed, processes)
        time.sleep(rng.uniform(0.5, 1.3))
        process.kill()
        process.communicate()
        time.sleep(0.1)
        saves = [folder for folder in killed.glob("jobs/*/checkpoints/*")]
        in_save += any(not (folder / "manifest.json").exists() for folder in saves)
    process = start(killed, processes)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert end_state(killed) == end_state(reference) and len(end_state(killed)) == 5
    strays = [p for p in killed.rglob("*") if p.name.endswith(".tmp") or p.name == "running.json"]
    assert strays == []
    print(f"{kills} kills, {in_save} left an unfinished save")


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path, processes):
    kill_and_resume(tmp_path, 3, processes)


@pytest.mark.soak
def test_thirty_kills(tmp_path):
    kill_and_resume(tmp_path, 30, 2)


def wait_for(condition, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def alive(processes: list[psutil.Process]) -> list[str]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end between two questions
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


LONG = {"steps": 2000, "size": 10, "save_every": 5, "pause": 0.05}


def in_the_middle(out: Path, process: subprocess.Popen) -> list[psutil.Process]:
    "Wait until a job has saved a checkpoint; the processes below the run."
    wait_for(lambda: list(out.glob("jobs/*/checkpoints/*/manifest.json")))
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("whom", [os.kill, os.killpg], ids=["stop button", "terminal"])
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_everything_and_keeps_checkpoints(tmp_path, whom, processes):
    process = start(tmp_path, processes, **LONG)
    children = in_the_middle(tmp_path, process)
    assert len(children) >= processes - 1
    began = time.monotonic()
    whom(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=5)
    assert output.rstrip().endswith("KeyboardInterrupt") and output.count("Traceback") == 1
    wait_for(lambda: not alive(children), 5 - (time.monotonic() - began))
    assert list(tmp_path.glob("jobs/*/checkpoints/*/manifest.json"))


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_while_the_children_start(tmp_path, delay):
    process = start(tmp_path, **LONG)
    wait_for(lambda: psutil.Process(process.pid).children())
    time.sleep(delay)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=5)
    assert process.returncode != 0 and output.count("KeyboardInterrupt") == 1, output
    wait_for(lambda: not alive(children), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="at the next step elsewhere")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_children_die_with_a_killed_parent(tmp_path, how):
    process = start(tmp_path, **LONG)
    children = in_the_middle(tmp_path, process)
    process.send_signal(how)
    process.communicate(timeout=5)
    wait_for(lambda: not alive(children), 5)


def test_a_child_without_its_parent_ends_at_the_next_step():
    pid = os.fork()
    if pid == 0:
        runs._end_without(os.getpid())  # a parent that it does not have
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_two_runs_share_a_folder(tmp_path):
    config = {"steps": 20, "size": 10, "save_every": 5, "pause": 0.1}
    both = [start(tmp_path, **config)]
    in_the_middle(tmp_path, both[0])
    both.append(start(tmp_path, **config))
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "is in the hands of process " in outputs[1]
    assert len(runs.load_records(tmp_path, "toy")) == 5
    logs = [runs.read_log(p) for p in tmp_path.glob("jobs/*/log.jsonl")]
    assert [len(log) for log in logs] == [20] * 5  # nobody did a job twice


def test_fresh_leaves_a_job_alone_that_another_run_has(tmp_path):
    process = start(tmp_path, **LONG)
    in_the_middle(tmp_path, process)
    with pytest.raises(RuntimeError, match=r"walk-100 is in the hands of process \d+ on "):
        runs.run(walks(**LONG), tmp_path, fresh=True)
    process.kill()
    process.communicate()
