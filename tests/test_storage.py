"""storage: files that survive a crash, a full disk, corruption and a kill."""

import errno
import io
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignkit import storage
from alignkit.storage import Checkpoints, DiskFull, write_durably

OLD = {"weights": random.Random(1).randbytes(3000), "state.json": b'{"step": 1}'}
NEW = {"weights": random.Random(2).randbytes(3000), "state.json": b'{"step": 2}'}


def leftovers(folder: Path) -> list[str]:
    "Files below a folder that belong to no whole checkpoint."
    whole = set()
    for manifest in folder.rglob("manifest.json"):
        _, files = storage.read_checkpoint(manifest.parent)
        whole |= {manifest, *(manifest.parent / name for name in files)}
    return [str(p) for p in folder.rglob("*") if p.is_file() and p not in whole]


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
        monkeypatch.setattr(storage, "open", self.open, raising=False)
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


def write_and_be_killed(path: Path) -> None:
    "A process that is killed between the write and the rename."
    code = "import os, signal, sys; from alignkit import storage; " \
           "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); " \
           "storage.write_durably(sys.argv[1], b'new')"
    done = subprocess.run([sys.executable, "-c", code, str(path)])
    assert done.returncode == -signal.SIGKILL


def test_the_next_write_removes_what_killed_writers_of_that_file_left(tmp_path):
    path = tmp_path / "bspo.json"
    write_durably(path, b"old")
    write_and_be_killed(path)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    at_work, gone = os.getppid(), 2**22 + 1  # no Linux gives that number to a process
    others = [tmp_path / f"{storage._temporary_prefix(path)}{at_work}.tmp",
              tmp_path / f"{storage._temporary_prefix(tmp_path / 'bspo.json.gz')}{gone}.tmp",
              tmp_path / f".bspo.json.elsewhere.{gone}.tmp"]
    for other in others:
        other.write_bytes(b"torn")
    write_durably(path, b"new")
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])
    assert path.read_bytes() == b"new"


def test_a_kill_costs_at_most_ten_seconds_of_work(monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    checkpoints, saved = Checkpoints(tmp_path), [0.0]
    for _ in range(100):
        clock[0] += 0.7
        if checkpoints.due():
            checkpoints.save(1, {})
            saved.append(clock[0])
    assert max(b - a for a, b in zip(saved, saved[1:], strict=False)) <= 5.0 + 0.7
