"""What the CUDA kernel computes, shown without a GPU: its source, compiled for CPU threads.

Says nothing about speed, memory order or launch limits; the `cuda` rows of the other tests do.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ops_cases import assert_as_good_as_torch, double
from test_ops_advantages import GAE_OPTIONS, SUPPORTED_OPTIONS, gae_case, run_gae, run_supported

from alignkit import ops
from alignkit.ops.dispatch import pointer

ROOT = Path(__file__).resolve().parents[1]
ENTRY = """
extern "C" void entry(void** p, float v_min, float gamma, float decay, long B, long T) {
  alignkit::gae_on_device({(float*)p[0], (float*)p[1], (std::uint8_t*)p[2], (std::uint8_t*)p[3],
      (float*)p[4], (std::uint8_t*)p[5], (std::uint8_t*)p[6], v_min, gamma, decay, (float*)p[7],
      (float*)p[8], B, T}, 0, nullptr);
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("cuda")
    text = (ROOT / "csrc/cuda/gae.cu").read_text()
    text, launches = re.subn(r"(\w+)<<<([^>]*)>>>\(", r"launch(\1, \2, ", text)
    assert launches == 1
    (folder / "gae.cpp").write_text(text + ENTRY)
    includes = [f"-I{ROOT / folder}" for folder in ("tests/cuda_on_threads", "csrc", "csrc/cuda")]
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", *includes,
                    folder / "gae.cpp", "-o", folder / "gae.so"], check=True)  # fmt: skip
    entry = ctypes.CDLL(str(folder / "gae.so")).entry
    entry.argtypes = [ctypes.c_void_p, *[ctypes.c_float] * 3, *[ctypes.c_long] * 2]
    return entry


def through(kernel, x, options, supported=None, v_min=0.0):
    """Advantages and targets as the kernel leaves them, from NaN."""
    given = {k: x[k] for k in options}
    order = "truncated", "bootstrap", "mask"
    out = [torch.full_like(x["rewards"], float("nan")) for _ in range(2)]
    terminated = x["terminated"] if supported is None else given.get("terminated")
    tensors = [x["rewards"], x["values"], terminated, *map(given.get, order), supported, out[0],
               None if supported is None else out[1]]  # fmt: skip
    addresses = (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))
    kernel(addresses, v_min, 0.97, 0.97 * 0.9, *x["rewards"].shape)
    return out


SHAPES = [(1, 1), (3, 5), (1, 31), (2, 32), (5, 33), (1, 70)]


@pytest.mark.parametrize("options", GAE_OPTIONS, ids="-".join)
def test_gae(kernel, options):
    cases = []
    for seed, (B, T) in enumerate(SHAPES):
        x = gae_case(B, T, seed)
        torchs = run_gae(x, options, op=ops.gae_reference)
        exact = run_gae(double(x), options, op=ops.gae_reference)
        cases.append((through(kernel, x, options)[0], torchs, exact))
    assert_as_good_as_torch(cases)


@pytest.mark.parametrize("options", SUPPORTED_OPTIONS, ids="-".join)
def test_supported_gae(kernel, options):
    cases = []
    for seed, (B, T) in enumerate(SHAPES):
        x = gae_case(B, T, seed)
        x["mask"][:, 1 : T - 1] &= torch.rand(T)[1 : T - 1] < 0.1  # gaps longer than a warp
        ours = through(kernel, x, options, x["supported"], -2.5)
        torchs = run_supported(x, options, op=ops.supported_gae_reference)
        exact = run_supported(double(x), options, op=ops.supported_gae_reference)
        cases += zip(ours, torchs, exact, strict=True)
    assert_as_good_as_torch(cases)
