"""What benchmarks/gpu_check.sh does, as far as a machine without a GPU can show it."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from ops_cases import require
from test_ops import OPERATORS

from alignkit.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu_check.sh"
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402
import kernel_resources  # noqa: E402

# ---- the script ----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="only machines without a GPU refuse")
def test_without_a_device_it_says_so_and_leaves_nothing(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", SCRIPT, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and f"no CUDA device: torch {torch.__version__}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_limits_fit_into_eight_minutes_and_into_each_other():
    text = SCRIPT.read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"(?m)^step (\w+) (\d+)$", text)}
    assert list(limits) == ["machine", "build", "tests", "sanitize"]
    (together,) = re.findall(r"(?m)^step bench \$\(\((\d+) - SECONDS\)\)", text)
    assert sum(limits.values()) + 100 < int(together) < 8 * 60 - 10  # merging takes a moment
    assert gpu_check.TESTS_S + 10 < limits["tests"]  # pytest must have time to report
    assert sum(gpu_check.TOOLS.values()) < limits["sanitize"]


def test_the_operators_need_torch_and_nothing_of_the_notebooks():
    assert not re.search("ModuleNotFoundError: (?!No module named 'alignkit)",
                         gpu_check.imports(ROOT).stderr)  # fmt: skip
    assert "ModuleNotFoundError: torch" in gpu_check.imports(ROOT, missing=("torch",)).stderr


def test_the_copy_is_built_for_one_architecture_and_holds_no_older_build(tmp_path):
    tree = gpu_check.source_copy(tmp_path, "90")
    assert re.findall("cuda_archs = .*", (tree / "settings.ini").read_text()) == ["cuda_archs = 90"]
    assert not list(tree.rglob("*.so")) and (tree / "csrc/cuda/gae.cu").exists()
    assert "cuda_archs = 80 90" in (ROOT / "settings.ini").read_text()


ROWS = """
import pytest
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_row(backend): assert backend != "cuda", "wrong"
def test_skipped(): pytest.skip("a GPU asserts")
def test_by_hand(): pass
"""


def test_what_pytest_reports_is_counted(tmp_path):
    (tmp_path / "test_rows.py").write_text(ROWS)
    report = tmp_path / "tests.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "test_rows.py"],
                   cwd=tmp_path, capture_output=True)  # fmt: skip
    interrupted = '<testcase time="0.000" /></testsuite>'
    report.write_text(report.read_text().replace("</testsuite>", interrupted))
    assert gpu_check.outcomes(report) == {
        "passed": 2, "failed": ["test_rows::test_row[cuda]"], "skipped": {"a GPU asserts": 1},
        "on_device": {"cuda": 0, "triton": 1}}  # fmt: skip


FINE = {"passed": 9, "failed": [], "skipped": {"a GPU asserts": 1}, "on_device": {"cuda": 4, "triton": 4}}


@pytest.mark.parametrize("change, fine", [
    ({}, True), ({"failed": ["test_row"]}, False), ({"on_device": {"cuda": 0, "triton": 4}}, False),
    ({"skipped": {"cuda: no CUDA device was found": 1}}, False),
    ({"skipped": {"cpu: not compiled: install a C++ compiler": 1}}, False),
])  # fmt: skip
def test_a_gpus_rows_must_run_and_pass(change, fine):
    assert gpu_check.complete(FINE | change) is fine


def test_a_program_out_of_time_is_ended_with_what_it_started():
    done = subprocess.run([*gpu_check.limited(0.2), "sh", "-c", "sleep 60 & sleep 60"])
    assert done.returncode == 124


def test_what_the_sanitizer_watches_runs_on_the_cpu_too():
    require("cpu")
    command = [sys.executable, ROOT / "tests/sanitized_cases.py", dispatch.extension("cpu").__file__]
    done = subprocess.run([*command, "20"], capture_output=True, text=True, check=True)
    assert done.stdout == "20 cases\n"
    done = subprocess.run([*command, "20", "0"], capture_output=True, text=True, check=True)
    assert done.stdout == "0 cases\n"


def test_a_step_that_failed_is_in_the_file(tmp_path):
    (tmp_path / "phases.tsv").write_text("machine\t0\t2\nbuild\t124\t80\n")
    (tmp_path / "machine.json").write_text('{"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-01-02"}')
    target = gpu_check.merge(tmp_path, tmp_path)
    assert target.name == "gpu_nvidia-h100-80gb-hbm3_2026-01-02.json"
    found = json.loads(target.read_text())
    assert found["phases"]["build"] == {"status": 124, "seconds": 80} and found["build"] is None


# ---- the benchmarks ------------------------------------------------------------------------


def scan(join, x, dim, combine_mode):
    "What torch.associative_scan does, which wants a GPU."
    rows = [t.unbind(dim) for t in x]
    out = [tuple(column[0] for column in rows)]
    for step in zip(*(column[1:] for column in rows), strict=True):
        out.append(join(out[-1], step))
    return [torch.stack(column, dim) for column in zip(*out, strict=True)]


@pytest.fixture
def uncompiled(monkeypatch):
    "Peers as they are written: compiling each of them takes seconds."
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    module = importlib.import_module("torch._higher_order_ops.associative_scan")
    monkeypatch.setattr(module, "associative_scan", scan)
    monkeypatch.setattr(gpu_check, "selective_peers", lambda *_: {})


def small(make, shape):
    return make(*(min(n, 24 - 2 * i) for i, n in enumerate(shape)), device="cpu")


def test_every_operator_is_timed():
    # linear_token_logps is a product in chunks, each read by token_logps; the other one is timed whole
    names = {getattr(make, "func", make).__name__ for make, _, _ in gpu_check.CASES}
    assert names - {"token_logps_gradient_case"} == {f"{name}_case" for name in {*OPERATORS, "attention_fusion"}}


@pytest.mark.parametrize("make, shape, goal", gpu_check.CASES)
def test_contenders_agree_with_float64_and_a_wrong_one_does_not(uncompiled, make, shape, goal):
    require("cpu")
    case = small(make, shape)
    found = case.ours("cpu")
    assert case.error("cuda", found) <= case.tolerance
    for name, peer in case.peers.items():
        assert case.error(name, peer.run()) <= case.tolerance, name
    outputs = list(found) if isinstance(found, tuple) else [found]
    # another id where tokens are drawn; elsewhere another number, and no number at all
    wrong = [(0, (outputs[0] + 1) % 10 if case.op == "sample_tokens" else outputs[0] + 1),
             (-1, outputs[-1] * math.nan)]  # fmt: skip
    for i, output in wrong:
        changed = outputs.copy()
        changed[i] = output
        given = tuple(changed) if isinstance(found, tuple) else changed[0]
        assert not case.error("cuda", given) <= case.tolerance


def test_trls_kernel_is_called_as_it_wants(monkeypatch):
    pytest.importorskip("trl")
    case = small(partial(gpu_check.token_logps_case, dtype=torch.float32), (6, 10))
    name = "TRL, selective_log_softmax"
    assert case.error(name, case.peers[name].run()) <= case.tolerance


CLOCK = gpu_check.Timers(lambda run, captured: (run(), [1.0, 2.0, 3.0])[1], lambda run: 12.5)


def on_cpu(*shape, device, peers, wrong=0.0):
    case = gpu_check.gae_case(*shape, device)
    return case._replace(backends=("cpu",), peers=peers, ours=lambda b: case.ours(b) + wrong)


def bench(folder, goal, **kw):
    cases = [(partial(on_cpu, **kw), (4, 8), goal)]
    sound = gpu_check.bench(folder, cases, CLOCK, "cpu")
    return sound, json.loads((folder / "bench.json").read_text())


def fails():
    raise RuntimeError("out of memory")


def test_rows_hold_time_share_and_what_was_aimed_at(tmp_path, uncompiled, monkeypatch):
    require("cpu")
    monkeypatch.setattr(gpu_check, "copy_bandwidth", partial(gpu_check.copy_bandwidth, size=1000))
    peers = {"broken": gpu_check.Peer(fails), "slow": gpu_check.Peer(lambda: torch.zeros(4, 8))}
    goal = {"share_of_copy": 0.2, "device_us": 2, "wall_us": 12}
    sound, found = bench(tmp_path, goal, peers=peers)
    ours, broken, slow = found["rows"]
    assert sound and found["bytes_per_us_of_copy"] == 1000
    assert ours["device_us"] == [1, 2, 3] and ours["share_of_copy"] == 13 * 32 / 1000 / 2
    assert ours["met"] == {"share_of_copy": True, "device_us": True, "wall_us": False}
    assert broken["failed"] == "RuntimeError: out of memory" and "device_us" not in broken
    assert not slow["agrees"] and slow["device_us"] == [1, 2, 3]  # shown, with its error
    sound, found = bench(tmp_path, goal, peers={}, wrong=1e-3)
    assert not sound and not found["rows"][0]["agrees"]


# ---- what kernels need of a GPU ------------------------------------------------------------

LOG = """
ptxas info    : Compiling entry function '_Z4halfILi8EEvi' for 'sm_90a'
ptxas info    : Function properties for _Z4halfILi8EEvi
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
"""


def test_an_assemblers_report_is_read():
    expected = {"kernel": "half<8>", "arch": "sm_90a", "registers": 255, "spill_bytes": 12,
                "shared_bytes": 512}  # fmt: skip
    assert kernel_resources.reported(LOG + LOG.replace(", 512 bytes smem", "")) == [
        expected, expected | {"shared_bytes": 0}]  # fmt: skip
    with pytest.raises(RuntimeError, match="expected no warning, got\nptxas warning"):
        kernel_resources.reported("ptxas warning : something")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_kernels_compile_without_warnings_or_spills_and_need_what_is_recorded():
    rows = kernel_resources.cuda_kernels()
    archs = kernel_resources.native_settings()["cuda_archs"].split()
    assert {row["arch"] for row in rows} == {f"sm_{arch}" for arch in archs}
    assert not any(row["spill_bytes"] for row in rows)
    recorded = json.loads(kernel_resources.TARGET.read_text())
    if recorded["versions"]["nvcc"] != kernel_resources.nvcc_version():
        pytest.skip("another nvcc than the recorded one: registers may differ")
    again = "changed: run benchmarks/kernel_resources.py"
    assert rows == [r for r in recorded["kernels"] if r["language"] == "CUDA"], again


def test_every_triton_kernel_is_recorded_without_spills():
    kernels = json.loads(kernel_resources.TARGET.read_text())["kernels"]
    sources = "".join(p.read_text() for p in ROOT.glob("csrc/triton/*.py"))
    there = set(re.findall(r"def (_\w+_(?:fwd|bwd))\(", sources))
    rows = [row for row in kernels if row["language"] == "Triton"]
    assert {row["kernel"] for row in rows} == there
    assert not any(row["spill_bytes"] for row in rows)
    assert {row["arch"].rstrip("a") for row in rows} == {"sm_80", "sm_90"}
