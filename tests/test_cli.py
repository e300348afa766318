"""The command line's promises: exit statuses, clean JSON, resuming, and speed before torch."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignkit import cli, report

ROOT = Path(__file__).resolve().parents[1]

# A paper of two arms whose numbers are known. `TOY_PAUSE` makes its jobs slow, `TOY_FAIL` breaks an arm.
TOY = '''
import os, time
from dataclasses import asdict, dataclass
from alignkit import runs
from alignkit.claims import Claim, Greater, NotTested, Reported

@dataclass(frozen=True)
class Config:
    steps: int = 3
    device: str = "cpu"
    @classmethod
    def smoke(cls): return cls(steps=1)
    @classmethod
    def mini(cls): return cls()

@runs.stage()
def count(work):
    steps = work.config["steps"]
    for step in range(steps):
        time.sleep(float(os.environ.get("TOY_PAUSE", 0)))
        work.progress(step + 1, steps)
    if work.arm == os.environ.get("TOY_FAIL"):
        raise RuntimeError("out of order")
    gain = {"plain": 0, "better": 2}[work.arm]
    return runs.Result(scalars={"gold": gain + work.seed % 7 / 10})

def jobs(config, seeds):
    return [runs.Job("bspo", count, arm, seed, asdict(config))
            for seed in seeds for arm in ("plain", "better")]

def gain(records):
    gold = {(r.arm, r.seed): r.scalars["gold"] for r in records}
    return {s: gold["better", s] - gold["plain", s] for _, s in gold if ("plain", s) in gold
            and ("better", s) in gold}

def level(records):
    return {r.seed: r.scalars["gold"] for r in records if r.arm == "plain"}

def claims():
    return [
        Claim("Z.1-gain", "better is better", "2 against 0", "table 1", "mini",
              ("plain", "better"), gain, Greater()),
        Claim("Z.2", "plain is plain", "0", "table 2", "mini", ("plain",), level, Reported()),
        Claim("Z.3", "on a real model", "", "the list", "small", (), None, NotTested("later")),
    ]

def plots(): return []
'''
MAIN = """
import sys, toy
from alignkit import cli
sys.modules["alignkit.papers.bspo"] = toy
if __name__ == "__main__":
    sys.exit(cli.main())
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the toy paper, and a command line that finds it in BSPO's place."""
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "command.py").write_text(MAIN)
    return tmp_path


def start(folder, *argv, **env):
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, str(folder / "command.py"), *argv], cwd=folder, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def call(folder, *argv, **env):
    child = start(folder, *argv, **env)
    out, err = child.communicate(timeout=120)
    return child.returncode, out, err


def status_of(*argv):
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return stop.code


def test_list_names_the_ten(capsys):
    assert status_of("list", "--json") == 0
    papers = json.loads(capsys.readouterr().out)
    assert [paper["paper"] for paper in papers] == list(report.PAPERS)
    for paper in papers:
        assert set(paper) == {"paper", "title", "arxiv", "notebook", "status", "claims"}
        assert re.fullmatch(r"\d{4}\.\d{5}", paper["arxiv"])
        for claim in paper["claims"]:
            assert set(claim) == {"key", "statement", "scale", "verdict"}


def test_list_reads_well(capsys):
    assert status_of("list") == 0
    out = capsys.readouterr().out
    assert all(key in out for key in report.PAPERS) and "not built yet" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("argv", [
    (), ("cook",), ("run",), ("run", "gpt"), ("run", "bspo", "--scale", "huge"),
    ("run", "bspo", "--seeds", "0"), ("run", "bspo", "--seeds", "1.5"),
    ("run", "bspo", "--first-seed", "-1"), ("run", "bspo", "--jobs", "none"),
    ("run", "bspo", "--device", "tpu"), ("run", "bspo", "--only"), ("bench", "softmax"),
    ("report", "a", "b"), ("list", "--yaml"),
])
def test_bad_arguments_exit_2(argv, capsys):
    assert status_of(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err


def test_unknown_paper_names_the_ten(capsys):
    assert status_of("run", "gpt") == 2
    err = capsys.readouterr().err
    assert all(key in err for key in report.PAPERS)


def test_paper_that_is_not_built_exits_1(capsys):
    unbuilt = [key for key, paper in report.PAPERS.items() if not paper.built]
    if not unbuilt:
        pytest.skip("all ten are built")
    assert status_of("run", unbuilt[-1]) == 1
    assert f"{unbuilt[-1]} is not built yet" in capsys.readouterr().err


def test_doctor(capsys):
    assert status_of("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"]
    assert {"reference", "cpu", "cuda", "triton"} == {b["name"] for b in found["backends"]}
    assert "llm" in found["extras"]
    for problem in found["problems"]:
        assert problem["problem"] and problem["remedy"]
    assert status_of("doctor") == 0
    assert "reference" in capsys.readouterr().out


def test_bench(capsys, monkeypatch):
    from alignkit.ops import bench

    small = bench.Planned(lambda device: bench.masked_gae_case(4, 16, False, device), {bench.LOOP: 1e9})
    monkeypatch.setitem(bench.CASES, "gae", [small])
    assert status_of("bench", "gae", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in rows} == {"gae"} and all(row["ours_us"] > 0 for row in rows)
    assert status_of("bench", "gae") == 0
    head, case, first, *_, _, how = capsys.readouterr().out.splitlines()
    assert head == bench.HEAD and case.startswith("gae 4×16") and bench.LOOP in first and "✗" in first and "1 thread, CPU time" in how


def test_report_of_a_folder_without_results_exits_1(tmp_path, capsys):
    assert status_of("report", str(tmp_path), "--out", str(tmp_path / "x.html")) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_run_prints_claims_and_the_page(folder):
    status, out, err = call(folder, "run", "bspo")
    assert status == 0, err
    assert out.splitlines()[0].startswith("alignkit ") and "runs/bspo/mini" in out.splitlines()[0]
    assert "Z.1-gain" in out and "reproduced" in out and "\x1b" not in out + err
    page = Path(folder, "runs/bspo/mini/report.html")
    assert page.exists() and str(page.relative_to(folder)) in out.splitlines()[-1]
    results = json.loads(Path(folder, "runs/bspo/mini/bspo.json").read_text())
    gain, level, later = results["claims"]
    assert (later["scale"], later["verdict"]) == ("small", "not tested")
    assert results["seeds"] == gain["seeds"] == list(range(100, 110))
    assert gain["verdict"] == "reproduced" and level["verdict"] == "reported"
    assert gain["value"] == pytest.approx(2) and gain["p"] == 1 / 1024


def test_second_run_does_nothing_again_and_fresh_does(folder):
    def written():
        return {path: path.stat().st_mtime_ns for path in Path(folder).glob("runs/**/record.json")}

    run = ("run", "bspo", "--scale", "smoke", "--seeds", "1", "--jobs", "1")
    assert call(folder, *run)[0] == 0
    first, started = written(), time.monotonic()
    assert call(folder, *run)[0] == 0
    assert time.monotonic() - started < 15 and len(first) == 2 and written() == first
    assert call(folder, *run, "--fresh")[0] == 0
    assert not set(first.items()) & set(written().items())


def test_one_seed_decides_nothing(folder):
    status, out, _ = call(folder, "run", "bspo", "--seeds", "1", "--out", "here", "--jobs", "1")
    assert status == 0 and "1 of 10 seeds" in out
    assert json.loads(Path(folder, "here/bspo.json").read_text())["claims"][0]["verdict"] == "not tested"


def test_only_runs_the_arms_its_claims_need(folder):
    run = ("run", "bspo", "--seeds", "1", "--jobs", "1", "--out", "here")
    assert call(folder, *run, "--only", "Z.2")[0] == 0
    names = [path.name for path in Path(folder, "here/jobs").iterdir() if path.is_dir()]
    assert names and all("plain" in name for name in names)
    assert [c["key"] for c in json.loads(Path(folder, "here/bspo.json").read_text())["claims"]] == ["Z.2"]
    assert call(folder, *run, "--only", "Z.1")[0] == 0  # stands for Z.1-gain
    assert len(json.loads(Path(folder, "here/bspo.json").read_text())["claims"]) == 2
    status, _, err = call(folder, *run, "--only", "Z.9")
    assert status == 2 and "Z.1-gain" in err


def test_scale_that_the_paper_lacks_exits_1(folder):
    status, _, err = call(folder, "run", "bspo", "--scale", "small", "--seeds", "1")
    assert status == 1 and "small scale is not built yet" in err and "Traceback" not in err


def test_folder_of_another_scale_is_refused_before_the_run(folder):
    run = ("run", "bspo", "--seeds", "1", "--jobs", "1", "--out", "here", "--scale")
    assert call(folder, *run, "smoke")[0] == 0
    status, _, err = call(folder, *run, "mini")
    assert status == 2 and "holds Z.1-gain at smoke scale" in err
    assert len(list(Path(folder, "here/jobs").glob("*/record.json"))) == 2


def test_reader_that_leaves_is_no_error():
    alignkit = Path(sys.executable).with_name("alignkit")
    command = f"{shlex.quote(str(alignkit))} list | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_failed_job_leaves_the_others_and_exits_1(folder):
    status, out, err = call(folder, "run", "bspo", "--seeds", "2", TOY_FAIL="better")
    assert status == 1 and "out of order" in out + err
    assert "Z.2" in out  # the table of what there is
    traces = list(Path(folder, "runs/bspo/mini/jobs").glob("*/traceback.txt"))
    assert len(traces) == 2 and all("better" in str(trace) for trace in traces)
    assert call(folder, "run", "bspo", "--seeds", "2")[0] == 0


def test_ctrl_c_says_how_to_go_on_and_exits_130(folder):
    argv = ["run", "bspo", "--seeds", "3", "--out", "my runs", "--fresh"]
    child = start(folder, *argv, TOY_PAUSE="2")
    deadline = time.monotonic() + 60
    while not list(Path(folder).glob("my runs/jobs/*/log.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)
    interrupted = time.monotonic()
    _, err = child.communicate(timeout=30)
    assert time.monotonic() - interrupted < 5
    assert child.returncode == 130 and "Traceback" not in err
    resume = shlex.split(err.strip().splitlines()[-1])
    assert resume[1:] == argv[:-1]
    assert call(folder, *resume[1:])[0] == 0


def test_no_warning_follows_the_line_that_says_how_to_go_on():
    """The process that tracks semaphores outlives the run; it warned below that line once in a hundred."""
    code = ("from alignkit import runs\n"
            "from joblib.externals.loky.backend import resource_tracker\n"
            "with runs._quiet_tracker():\n"
            "    resource_tracker.ensure_running()\n"
            "resource_tracker.register('/no such semaphore', 'semlock')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_first_line_comes_before_torch_does(tmp_path):
    """Two seconds are promised; a busy machine gets four here."""
    code = ("import sys; from alignkit import cli; cli.load_paper = lambda key: sys.exit("
            "int('torch' in sys.modules)); cli.main(['run', 'bspo'])")
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("alignkit ")
    assert time.monotonic() - started < 4
