"""`make sanitize`: no kernel reads or writes beyond its arrays, and a kernel that did would be caught."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

pytestmark = pytest.mark.sanitize
ROOT = Path(__file__).resolve().parents[1]
CASES = 100_000
OPTIONS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fno-trapping-math", "-fPIC",
           "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
           "-DALIGNKIT_PORTABLE"]  # fmt: skip


def compiled(csrc, names, folder):
    includes = [csrc, pybind11.get_include(), sysconfig.get_path("include")]
    for name in names:
        subprocess.run(["g++", *OPTIONS, *[f"-I{i}" for i in includes], "-c",
                        csrc / "cpu" / f"{name}.cpp", "-o", folder / f"{name}.o"],
                       check=True)  # fmt: skip
    return folder


def linked(*folders):
    """A module of the newest object of each name."""
    objects = {path.name: path for folder in folders for path in folder.glob("*.o")}
    target = folders[-1] / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", *OPTIONS, "-shared", *objects.values(), "-o", target], check=True)
    return target


def run(module, cases):
    libraries = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True,
                                check=True).stdout.strip()
                 for name in ("libasan.so", "libstdc++.so.6")]  # fmt: skip
    env = os.environ | {"LD_PRELOAD": " ".join(libraries), "PYTHONMALLOC": "malloc",
                        "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}  # fmt: skip
    script = Path(__file__).with_name("sanitized_cases.py")
    return subprocess.run([sys.executable, script, module, str(cases)], env=env,
                          capture_output=True, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    names = [path.stem for path in ROOT.glob("csrc/cpu/*.cpp")]
    return compiled(ROOT / "csrc", names, tmp_path_factory.mktemp("sound"))


@pytest.mark.timeout(1200)
def test_no_report_over_the_boundary_cases(sound):
    done = run(linked(sound), CASES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{CASES} cases"


PLANTED = {
    "a value beyond the row": ("advantages", "pair(i, values[i + 1])", "pair(i, values[i + 2])"),
    "a target before the row": ("advantages", "t == 0 || before[0]", "before[0]"),
    "an advantage beyond the group": ("grouped", "i < span.size; ++i)\n    advantages[i]",
                                      "i <= span.size; ++i)\n    advantages[i]"),
    "the neighbour's flag": ("comparison", "x.judged[at] =", "x.judged[at + 1] ="),
    "an id past the vocabulary": ("logprobs", "widen(logits[id])", "widen(logits[id + 1])"),
    "a chunk longer than the row": ("policy_loss", "std::min<std::int64_t>(kSteps, x.T - start)",
                                    "kSteps"),
    "a token after the last": ("fusion", "n < N && tile.size < kTile", "tile.size < kTile"),
    "a modality too many": ("fusion", "(tile.index[t] >= x.Nv)];\n    for",
                            "(tile.index[t] >= x.Nv) + 1];\n    for"),
    "an array of a chunk too short": ("sampling", "float chunk[kChunk], e[kChunk];\n  float top",
                                      "float chunk[kChunk], e[kChunk - 1];\n  float top"),
    "keys without their padding": ("attention", "x.room : whole(x.n)", "x.room : x.n"),
    "a sequence after the last": ("decoder", "std::min(together, end - b)", "together"),
    "an offset in 32 bits": ("sampling", "row_start(row, x.stride)",
                             "static_cast<int>(row) * static_cast<int>(x.stride)"),
    "an array that is gone": ("decoder", "a.qkv = s.qkv.data()",
                              "a.qkv = std::vector<float>(s.qkv).data()"),
}  # fmt: skip
REPORTS = {"an offset in 32 bits": "runtime error: signed integer overflow",
           "an array that is gone": "AddressSanitizer: heap-use-after-free"}  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(sound, tmp_path, bug):
    name, right, wrong = PLANTED[bug]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cpu" / f"{name}.cpp"
    assert source.read_text().count(right) >= 1
    source.write_text(source.read_text().replace(right, wrong))
    done = run(linked(sound, compiled(tmp_path / "csrc", [name], tmp_path)), 3000)
    report = REPORTS.get(bug, "ERROR: AddressSanitizer")
    assert done.returncode and report in done.stderr, done.stdout + done.stderr[-2000:]
