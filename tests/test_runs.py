"""runs: files that survive faults, jobs that fail, two runs in one folder, what people see."""

import errno
import gzip
import io
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import joblib
import pytest

from alignkit import runs
from alignkit.runs import Checkpoints, DiskFull, Job, Result, Work, stage, write_durably

OLD = {"weights": random.Random(1).randbytes(3000), "state.json": b'{"step": 1}'}
NEW = {"weights": random.Random(2).randbytes(3000), "state.json": b'{"step": 2}'}


def leftovers(folder: Path) -> list[str]:
    "Files below a folder that belong to no whole checkpoint."
    whole = set()
    for manifest in folder.rglob("manifest.json"):
        _, files = runs.read_checkpoint(manifest.parent)
        whole |= {manifest, *(manifest.parent / name for name in files)}
    return [str(p) for p in folder.rglob("*") if p.is_file() and p not in whole]


# ---- durable files: promises 3, 4, 5 -------------------------------------------------


def crash_at_call(n: int, action) -> bool:
    "Run `action` in a fork that dies at its n-th function call; whether it got to the end."
    pid = os.fork()
    if pid == 0:
        calls = iter(range(n))
        sys.setprofile(lambda frame, event, arg: (
            os._exit(9) if "call" in event and next(calls, None) is None else None))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def crash_saves(tmp_path: Path, every: int) -> None:
    outcomes = []
    for n in range(0, 10_000, every):
        folder = tmp_path / str(n)
        Checkpoints(folder).save(1, OLD)
        finished = crash_at_call(n, lambda folder=folder: Checkpoints(folder).save(2, NEW))
        restarted = Checkpoints(folder)
        restarted.clean()
        found = restarted.latest()
        assert found in ((1, OLD), (2, NEW))
        assert leftovers(folder) == [] and not restarted.skipped
        outcomes.append(found[0])
        if finished:
            break
    assert finished and n > 100
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}


def test_a_crash_in_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path):
    crash_saves(tmp_path, every=17)


@pytest.mark.soak
def test_a_crash_at_any_call_of_a_save(tmp_path):
    crash_saves(tmp_path, every=1)


def test_a_crash_in_a_write_leaves_the_old_or_the_new_bytes(tmp_path):
    path, seen = tmp_path / "file", []
    for n in range(0, 1000, 3):
        write_durably(path, b"old" * 5000)
        finished = crash_at_call(n, lambda: write_durably(path, b"new" * 5000))
        seen.append(path.read_bytes())
        assert seen[-1] in (b"old" * 5000, b"new" * 5000)
        if finished:
            break
    assert finished and len(set(seen)) == 2


class FaultyFiles:
    "`open` whose files fail at the n-th write, flush or fsync."

    def __init__(self, monkeypatch, n: int, code: int):
        self.left, self.code = n, code
        sync = os.fsync
        monkeypatch.setattr(runs, "open", self.open, raising=False)
        monkeypatch.setattr(os, "fsync", lambda fd: (self.count(), sync(fd)))

    def count(self):
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path, mode):
        faults = self

        class File(io.FileIO):
            def write(self, data):
                faults.count()
                return super().write(data)

        return File(path, mode.replace("b", ""))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_at_any_write_keeps_the_previous_checkpoint(tmp_path, code):
    expected = OSError if code == errno.EIO else DiskFull
    for n in range(1, 100):
        folder = tmp_path / str(n)
        Checkpoints(folder).save(1, OLD)
        with pytest.MonkeyPatch.context() as patch:
            faults = FaultyFiles(patch, n, code)
            try:
                Checkpoints(folder).save(2, NEW)
            except expected as error:
                assert code == errno.EIO or str(folder) in str(error)
                succeeded = False
            else:
                succeeded = True
        assert Checkpoints(folder).latest() == ((2, NEW) if succeeded else (1, OLD))
        assert leftovers(folder) == []
        if succeeded:
            break
    assert faults.left > 0 and n > 5


def full_disk_at(limit: int, action) -> bool:
    "Whether `action` was told that the disk is full when no file may exceed `limit` bytes."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores SIGXFSZ
    try:
        action()
    except DiskFull:
        return True
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return False


def sweep_full_disk(folder: Path, limits) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, OLD)
    for limit in limits:
        full = full_disk_at(limit, lambda: checkpoints.save(2, NEW))
        assert full == (limit < len(NEW["weights"]))
        assert Checkpoints(folder).latest() == ((1, OLD) if full else (2, NEW))
        assert leftovers(folder) == []


def test_a_full_disk_is_an_error_and_the_previous_checkpoint_loads(tmp_path):
    sweep_full_disk(tmp_path, [*range(0, 3000, 60), 2999, 3000, 3001])


@pytest.mark.soak
def test_a_full_disk_at_every_byte(tmp_path):
    sweep_full_disk(tmp_path, range(0, 3002))


def corrupt(data: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(["flip", "page", "truncate", "append"])
    at = rng.randrange(len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == "page":
        page = at // 4096 * 4096
        return data[:page] + bytes(len(data[page : page + 4096])) + data[page + 4096 :]
    return data[:at] if kind == "truncate" else data + rng.randbytes(rng.randint(1, 5000))


def reject_corruptions(folder: Path, count: int) -> None:
    rng = random.Random(3)
    files = {"policy.safetensors": rng.randbytes(20_000), "state.json": b'{"kl": 0.25}'}
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, OLD)
    checkpoints.save(2, files)
    newest = sorted(folder.iterdir())[-1]
    for _ in range(count):
        victim = newest / rng.choice([*files, "manifest.json"])
        whole = victim.read_bytes()
        victim.write_bytes(corrupt(whole, rng))
        resumed = Checkpoints(folder)
        assert resumed.latest() == (1, OLD)
        (reason,) = resumed.skipped.values()
        assert str(victim) in reason
        victim.write_bytes(whole)
    assert Checkpoints(folder).latest() == (2, files)


def test_a_corruption_is_rejected_by_name_and_the_last_good_checkpoint_used(tmp_path):
    reject_corruptions(tmp_path, 100)


@pytest.mark.soak
def test_a_thousand_corruptions(tmp_path):
    reject_corruptions(tmp_path, 1000)


def test_the_save_after_a_fallback_removes_the_bad_checkpoint_not_the_good_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, OLD)
    (tmp_path / "000002" / "weights").write_bytes(b"")
    resumed = Checkpoints(tmp_path)
    assert resumed.latest() == (1, OLD)
    resumed.save(2, NEW)
    assert sorted(os.listdir(tmp_path)) == ["000001", "000002"]
    assert Checkpoints(tmp_path).latest() == (2, NEW)


def test_a_missing_file_and_names_that_are_paths(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, OLD)
    (tmp_path / "000001" / "weights").unlink()
    assert checkpoints.latest() is None and "weights is missing" in str(checkpoints.skipped)
    for name in ("../x", "a/b", "manifest.json", ".hidden", ""):
        with pytest.raises(ValueError, match="plain file names"):
            checkpoints.save(2, {name: b""})


def test_write_durably_follows_links_and_the_umask(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_durably(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o666 & ~umask


# ---- jobs and records ----------------------------------------------------------------


@stage()
def base(work: Work) -> Result:
    (work.folder / "artefact").write_text(f"made for {work.seed}")
    work.progress(1, 1, loss=0.5)
    return Result(scalars={"seed": work.seed}, curves={"loss": [0.5]}, counts={"n": 1})


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
    assert len(runs.load_records(tmp_path, "toy")) == 10
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


def test_records_of_a_killed_run_are_merged_by_the_next(tmp_path):
    jobs = family("a")
    records = runs.run(jobs, tmp_path, 1)
    (tmp_path / "toy.records.jsonl.gz").unlink()
    (tmp_path / ".toy.records.jsonl.gz.123.tmp").write_bytes(b"torn")
    assert runs.run(jobs, tmp_path, 1) == records
    assert len(runs.load_records(tmp_path, "toy")) == 3
    assert not list(tmp_path.glob(".*"))


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
        work.checkpoints.save(1, OLD)
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
