"""The C++ kernels as older machines run them: without wide vectors, and with those of AVX2."""

import importlib.util
import itertools
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest
import test_ops_advantages
import test_ops_attention
import test_ops_comparison
import test_ops_decoder
import test_ops_fusion
import test_ops_grouped
import test_ops_logprobs
import test_ops_policy_loss
import test_ops_sampling
import torch

from alignkit import ops
from alignkit.ops import dispatch
from alignkit.ops.policy_loss import ESTIMATORS, REDUCTIONS

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"portable": [], "avx2": ["-march=x86-64-v3"]}


def built(name, folder):
    """The module alignkit._cpu, compiled for one kind of machine and no other."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    if name == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a processor with AVX2")
    target = folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    subprocess.run(["g++", "-std=c++17", "-O1", "-ftree-vectorize", "-fno-trapping-math", "-fno-math-errno", "-shared",
                    "-fPIC", "-DALIGNKIT_PORTABLE", *FLAGS[name], *[f"-I{i}" for i in includes],
                    *ROOT.glob("csrc/cpu/*.cpp"), "-o", target], check=True)  # fmt: skip
    spec = importlib.util.spec_from_file_location("_cpu", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=FLAGS)
def kernels(request, tmp_path_factory):
    return built(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def older(kernels, monkeypatch):
    """The operators call the older machine's kernels."""
    usual = dispatch.extension
    monkeypatch.setattr(
        dispatch, "extension", lambda name: kernels if name == "cpu" else usual(name))
    return kernels


DTYPES = torch.float32, torch.bfloat16
ADVANTAGES = test_ops_advantages
SUITES = {
    "gae": (ADVANTAGES.test_gae_agrees_with_float64, ADVANTAGES.GAE_OPTIONS, DTYPES),
    "supported_gae": (ADVANTAGES.test_supported_gae_agrees_with_float64,
                      ADVANTAGES.SUPPORTED_OPTIONS, DTYPES),
    "dual_gae": (ADVANTAGES.test_dual_gae_is_gae_twice_and_their_combination,
                 [(), ("mask", "truncated")], DTYPES),
    "grouped_advantage": (test_ops_grouped.test_agrees_with_float64, test_ops_grouped.KINDS,
                          (False, True)),
    "grouped_comparison": (test_ops_comparison.test_agrees_with_float64, (False, True)),
    "token_logps": (test_ops_logprobs.test_agrees_with_float64, DTYPES, (1.0, 0.7)),
    "sample_tokens": (test_ops_sampling.test_agrees_with_float64, DTYPES, (1.0, 0.7)),
    "clipped_policy_loss": (test_ops_policy_loss.test_agrees_with_float64, [None, *ESTIMATORS],
                            REDUCTIONS),
    "attention_fusion": (test_ops_fusion.test_agrees_with_float64, DTYPES, (False, True)),
    "rotary_attention": (test_ops_attention.test_agrees_with_float64, test_ops_attention.SHAPES,
                         (False, True)),
    "decoder_layer": (test_ops_decoder.test_agrees_with_float64, test_ops_decoder.SHAPES, (False, True),
                      (False, True)),
}  # fmt: skip


@pytest.mark.timeout(300)  # the first one compiles
@pytest.mark.parametrize("name", SUITES)
def test_agrees_with_float64(older, name):
    test, *axes = SUITES[name]
    for options in itertools.product(*axes):
        test("cpu", *options)


def test_every_operator_of_the_module_is_held():
    held = {"gae" if name.endswith("gae") and name != "dual_gae" else name for name in SUITES}
    there = {n for n in dir(dispatch.extension("cpu")) if not n.startswith("_")}
    assert {n for n in there if not n.endswith("_backward")} == held


def test_the_older_kernels_are_the_ones_that_run(older, monkeypatch):
    called = []
    monkeypatch.setattr(dispatch, "extension", lambda name: called.append(name) or older)
    ops.gae(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1, 2), backend="cpu")
    assert "cpu" in called
