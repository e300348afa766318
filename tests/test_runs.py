"""runs: jobs that fail, two runs in one folder, what people see."""

import gzip
import io
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import joblib
import pytest

from alignkit import runs
from alignkit.runs import Job, Result, Work, stage

# ---- jobs and records ----------------------------------------------------------------


@stage()
def base(work: Work) -> Result:
    (work.folder / "artefact").write_text(f"made for {work.seed}")
    work.progress(1, 1, loss=0.5)
    return Result(scalars={"seed": work.seed}, curves={"loss": [0.5]}, counts={"n": 1},
                  texts={"said": ["line\n", "é\u2028"]})


@stage()
def branch(work: Work) -> Result:
    need = work.need("base")
    assert (need.folder / "artefact").read_text() == f"made for {work.seed}"
    if work.arm == "bad":
        raise ValueError("on purpose")
    if work.arm == "dies":
        os._exit(7)
    return Result(scalars={"threads": int(os.environ["OMP_NUM_THREADS"])})


@stage()
def leaf(work: Work) -> Result:
    return Result(scalars=work.need("branch").record.scalars)


def family(arms, seeds=(100,)) -> list[Job]:
    jobs = []
    for seed in seeds:
        root = Job("toy", base, "", seed, {"lr": 1e-3})
        for arm in arms:
            middle = Job("toy", branch, arm, seed, {}, needs=(root,))
            jobs.append(Job("toy", leaf, arm, seed, {}, needs=(middle,)))
    return jobs


def test_keys_cover_everything_that_moves_the_numbers():
    def job(paper="toy", function=base, arm="a", seed=1, config=None, needs=()):
        return Job(paper, function, arm, seed, {} if config is None else config, needs)

    @stage(version=2)
    def newer(work): ...

    newer.__name__ = "base"
    variants = [job(), job(paper="other"), job(function=branch), job(function=newer),
                job(arm="b"), job(seed=2), job(config={"x": 1}), job(config={"x": 1.5}),
                job(needs=(job(),)), job(needs=(job(), job(seed=2)))]
    assert len({variant.key for variant in variants}) == len(variants)
    assert job(config={"a": 1, "b": (2,)}).key == job(config={"b": [2], "a": 1}).key
    # A key that moves makes every committed record worthless.
    assert job().key == "c277c98755d7f4c8"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": {"x": float("nan")}}, r"config\['x'\]: expected a finite number"),
        ({"config": {1: 2}}, "expected keys that are strings, got 1"),
        ({"config": {"x": {"y": [object()]}}}, r"config\['x'\]\['y'\]\[0\]: expected a number"),
        ({"arm": "a/b"}, "arm: expected letters"),
        ({"paper": ""}, "paper: expected letters"),
        ({"stage": print}, "expected a function marked @stage"),
        ({"seed": 1.0}, "seed: expected an integer"),
    ],
)
def test_bad_jobs_are_refused(change, message):
    good = dict(paper="toy", stage=base, arm="a", seed=1, config={})
    with pytest.raises((TypeError, ValueError), match=message):
        Job(**{**good, **change})


@pytest.mark.parametrize("purpose", [(1.0,), (True,), (None,)])
def test_derive_seed_refuses_what_would_not_hash_the_same_everywhere(purpose):
    with pytest.raises(TypeError, match="derive_seed"):
        runs.derive_seed(1, *purpose)


def test_derive_seed_never_moves():
    assert runs.derive_seed(100, "rollout", 3) == 2501286801001159834


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_and_its_continuation(tmp_path, processes, capsys):
    jobs = family("ab", (100, 101))
    records = runs.run(jobs, tmp_path, processes)
    assert [(r.arm, r.seed, r.scalars["threads"]) for r in records] == [
        ("a", 100, 1), ("b", 100, 1), ("a", 101, 1), ("b", 101, 1)]
    merged = (tmp_path / "toy.records.jsonl.gz").read_bytes()
    assert runs.run(jobs, tmp_path, processes) == records
    assert (tmp_path / "toy.records.jsonl.gz").read_bytes() == merged
    loaded = runs.load_records(tmp_path, "toy")
    assert len(loaded) == 10
    assert [r.texts["said"] for r in loaded if r.stage == "base"] == [["line\n", "é\u2028"]] * 2
    out = capsys.readouterr().out
    assert "10 jobs, 10 to do" in out and "10 jobs, 0 to do" in out
    assert set(map(ord, out)) & set(range(32)) == {10}
    assert not list(tmp_path.rglob("running.json")) and not list(tmp_path.rglob("checkpoints"))


def test_more_seeds_do_only_what_is_new_even_without_the_old_folders(tmp_path):
    import shutil
    old = runs.run(family("a"), tmp_path, 1)
    shutil.rmtree(tmp_path / "jobs")  # as in a clone with committed records
    assert runs.run(family("a"), tmp_path, 1) == old
    assert not list((tmp_path / "jobs").glob("leaf-a-100-*/"))
    runs.run(family("ab"), tmp_path, 1)  # arm b needs the artefact of base: repeated
    names = {path.name.rpartition("-")[0] for path in (tmp_path / "jobs").glob("*/")}
    assert names == {"base-100", "branch-b-100", "leaf-b-100"}
    assert old[0] in runs.load_records(tmp_path, "toy")


@pytest.mark.parametrize("processes, at_a_time", [(1, 1), (2, 2)])
def test_seeds_are_finished_one_after_the_other(tmp_path, processes, at_a_time):
    runs.run(family(["a"], seeds=(100, 101, 102, 103)), tmp_path, processes=processes)
    written = {stage: {seed: next(tmp_path.glob(f"jobs/{stage}*-{seed}-*/record.json")).stat().st_mtime_ns
                       for seed in range(100, 104)} for stage in ("base", "leaf")}
    for seed in range(100 + at_a_time, 104):
        assert written["base"][seed] > written["leaf"][seed - at_a_time]


def test_records_of_a_killed_run_are_merged_by_the_next(tmp_path):
    jobs = family("a")
    records = runs.run(jobs, tmp_path, 1)
    (tmp_path / "toy.records.jsonl.gz").unlink()
    (tmp_path / ".toy.records.jsonl.gz.123.tmp").write_bytes(b"torn")
    (jobs[0].folder(tmp_path) / "running.json").write_text("{}")  # it was killed right before
    assert runs.run(jobs, tmp_path, 1) == records
    assert len(runs.load_records(tmp_path, "toy")) == 3
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.rglob("running.json"))


def test_fresh_repeats_and_gives_the_same_numbers(tmp_path):
    jobs = family("a")
    (first,) = runs.run(jobs, tmp_path, 1)
    (folder,) = (tmp_path / "jobs").glob("base-100-*/")
    (folder / "mark").write_text("of the first run")
    (second,) = runs.run(jobs, tmp_path, 1, fresh=True)
    assert not (folder / "mark").exists() and second.scalars == first.scalars


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failed_job_leaves_the_others_running(tmp_path, processes, capsys):
    with pytest.raises(runs.JobsFailed) as caught:
        runs.run(family(["a", "bad", "c"], (100, 101)), tmp_path, processes)
    assert {job.name for job in caught.value.failed} == {"branch-bad-100", "branch-bad-101"}
    assert {job.name for job in caught.value.skipped} == {"leaf-bad-100", "leaf-bad-101"}
    assert "branch-bad-100: ValueError: on purpose" in str(caught.value)
    done = [(r.stage, r.arm) for r in runs.load_records(tmp_path, "toy")]
    assert done.count(("leaf", "a")) == done.count(("leaf", "c")) == 2
    (trace,) = tmp_path.glob("jobs/branch-bad-100-*/traceback.txt")
    assert "on purpose" in trace.read_text() and "in branch" in trace.read_text()
    assert "FAILED" in capsys.readouterr().out


def test_a_process_that_dies_fails_its_own_job_only(tmp_path):
    with pytest.raises(runs.JobsFailed) as caught:
        runs.run(family(["a", "dies", "c", "d"]), tmp_path)
    assert {job.name for job in caught.value.failed} == {"branch-dies-100"}
    assert "its process died, EXIT(7)" in str(caught.value)
    assert {r.arm for r in runs.load_records(tmp_path, "toy")} == {"", "a", "c", "d"}
    assert list(tmp_path.glob("jobs/branch-dies-100-*/traceback.txt"))


@stage()
def returns_a_dict(work):
    return {"gold": 1.0}


@stage()
def returns_nan(work):
    return Result(scalars={"gold": float("nan")})


@pytest.mark.parametrize("function, message", [
    (returns_a_dict, r"returned {'gold': 1.0}, expected a Result"),
    (returns_nan, r"scalars\['gold'\]: expected a finite number, got nan")])
def test_bad_results_fail_the_job(tmp_path, function, message):
    with pytest.raises(runs.JobsFailed, match=message):
        runs.run([Job("toy", function, "a", 1, {})], tmp_path, 1)


@stage()
def fills_the_disk(work):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        work.checkpoints.save(1, {"weights": bytes(3000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_fails_the_job_and_says_so(tmp_path):
    with pytest.raises(runs.JobsFailed, match="DiskFull: .*no room for the 3000 bytes of"):
        runs.run([Job("toy", fills_the_disk, "a", 1, {}), *family("a")], tmp_path, 1)
    assert len(runs.load_records(tmp_path, "toy")) == 3


def test_need_says_what_there_is(tmp_path):
    arms = [Job("toy", base, arm, 1, {}) for arm in "xy"]
    work = Work(Job("toy", leaf, "z", 1, {}, needs=tuple(arms)), tmp_path)
    with pytest.raises(LookupError, match="'base-x-1', 'base-y-1'.*; 2 are base"):
        work.need("base")
    with pytest.raises(LookupError, match="base-x-1 has no record"):
        work.need("base", arm="x")
    with pytest.raises(LookupError, match="0 are branch of arm 'x'"):
        work.need("branch", arm="x")


def test_select_and_bad_arguments(tmp_path):
    jobs = family("ab")
    assert [job.name for job in runs.select(jobs, ["b"])] == [
        "base-100", "branch-b-100", "leaf-b-100"]
    with pytest.raises(ValueError, match=r"arms: expected some of \['a', 'b'\], got \['c'\]"):
        runs.select(jobs, ["a", "c"])
    with pytest.raises(ValueError, match="processes: expected at least 1, got 0"):
        runs.run(jobs, tmp_path, 0)
    with pytest.raises(ValueError, match="processes=1"):
        runs.run(jobs, tmp_path, 2, on_progress=print)


def test_on_progress_sees_every_step(tmp_path):
    seen = []
    runs.run([Job("toy", base, "", 1, {})], tmp_path, 1, on_progress=lambda *a: seen.append(a))
    assert [(job.name, *rest) for job, *rest in seen] == [("base-1", 1, 1, {"loss": 0.5})]


@stage()
def slow(work: Work) -> Result:
    work._started -= work.config["seconds"]
    work.progress(1, 1)
    return Result(scalars={"gold": 0.25})


def test_a_line_for_each_job_that_took_a_second(tmp_path, capsys):
    jobs = [Job("toy", slow, arm, 1, {"seconds": s}) for arm, s in (("a", 0.0), ("b", 7.0))]
    runs.run(jobs, tmp_path, 1)
    assert capsys.readouterr().out.splitlines() == [
        f"toy: 2 jobs, 2 to do, 1 at a time, in {tmp_path}", "[2/2] slow-b-1: 7 s, gold 0.25"]


def test_with_on_progress_the_caller_shows_it_and_nothing_is_printed(tmp_path, capfd):
    with pytest.raises(runs.JobsFailed):
        runs.run([Job("toy", slow, "", 1, {"seconds": 7.0}), *family(["bad"])], tmp_path, 1,
                 on_progress=lambda *_: None)
    assert capfd.readouterr() == ("", "")


BALLAST: list[bytes] = []


@stage()
def grow(work: Work) -> Result:
    "As if it imported torch: the process stays large, and long enough for loky's check."
    BALLAST.append(b"x" * work.config["bytes"])
    time.sleep(work.config["pause"])
    return Result(counts={"process": os.getpid()})


def test_a_child_that_grows_keeps_what_it_has_imported(tmp_path):
    small = [Job("toy", grow, "small", seed, {"bytes": 1, "pause": 0.1}) for seed in range(4)]
    large = [Job("toy", grow, "large", seed, {"bytes": size, "pause": 1.1}, small)
             for seed, size in enumerate([350_000_000, 350_000_000, 1, 1])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = runs.run(large, tmp_path)
    assert [str(w.message) for w in caught if "worker stopped" in str(w.message)] == []
    assert len({record.counts["process"] for record in records}) <= 2


@pytest.mark.parametrize("damage", [
    lambda data: data[:-5],
    lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
    lambda data: b"not gzip",
    lambda data: gzip.compress(b'{"key": 1}\n'),
    lambda data: gzip.compress(b"[1, 2]\n"),
    lambda data: gzip.compress(b"{\n"),
])
def test_damaged_records_are_named(tmp_path, damage):
    runs.run(family("a"), tmp_path, 1)
    path = tmp_path / "toy.records.jsonl.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(runs.CorruptRecords, match="toy.records.jsonl.gz"):
        runs.load_records(tmp_path, "toy")


def test_the_same_records_are_the_same_bytes():
    records = [runs.Record(key, "toy", "s", "a", 1, {"x": 0.1}, {"c": [1, 2.5]}, {}, 1.0,
                           "abc", {}, {}) for key in "bca"]
    assert runs._compress(records) == runs._compress(reversed(records))
    lines = gzip.decompress(runs._compress(records)).splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["a", "b", "c"]


def test_another_joblib_backend_can_take_the_place_of_local_processes(tmp_path):
    with joblib.parallel_config("threading"):
        assert len(runs.run(family("ab"), tmp_path)) == 2
    assert list(tmp_path.glob("jobs/*/output.txt")) == []


# ---- what people see -----------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_moving_line_and_a_file_gets_lines(tmp_path):
    jobs = {job.key: job for job in family("a")}
    for stream in (Terminal(), io.StringIO()):
        with runs._Display(jobs, [], 3, 2, tmp_path, stream) as display:
            display.line("a job is done")
            if stream.isatty():
                display._stop.wait(1.3)
        text = stream.getvalue()
        assert ("\x1b[K" in text) == stream.isatty() and "a job is done\n" in text
        assert not stream.isatty() or "2/3 jobs done" in text


def test_the_display_reads_where_a_running_job_is(tmp_path):
    jobs = {job.key: job for job in runs.needs_first(family("a"))}
    display = runs._Display(jobs, [], 3, 1, tmp_path, io.StringIO())
    job = next(iter(jobs.values()))
    work = Work(job, tmp_path)
    work.progress(3, 12, loss=0.5)
    assert display.describe() == "0/3 jobs done"  # nobody has it
    note = {"pid": 1, "host": "here", "since": display.started + 1}
    (work.folder / "running.json").write_text(json.dumps(note))
    assert display.describe() == "0/3 jobs done; base-100 3/12"


def test_import_is_light():
    code = ("import sys, alignkit.runs; heavy = {'torch', 'joblib', 'filelock', 'numpy', "
            "'transformers', 'datasets', 'matplotlib'} & set(sys.modules); assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_torch_in_use_either(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[2]); import test_runs as t; "
            "t.runs.run(t.family('ab'), sys.argv[1], 1); assert 'torch' not in sys.modules")
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, str(tmp_path), here], check=True)


def test_code_commit_is_that_of_the_checkout_or_the_version(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_ROOT", tmp_path)
    assert runs.code_commit() == runs.versions().get("alignkit", "unknown")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "alignkit").mkdir()
    (tmp_path / "alignkit" / "x.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    clean = runs.code_commit()
    assert clean and "dirty" not in clean
    (tmp_path / "results.json").write_text("{}")
    assert runs.code_commit() == clean
    (tmp_path / "alignkit" / "x.py").write_text("2")
    assert runs.code_commit() == f"{clean}-dirty"


def test_a_missing_extra_names_its_command():
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'alignkit\[llm\]'"):
        runs.require("no_such_module.part", "llm")
