"""What the CUDA kernel computes, shown without a GPU: its source, compiled for CPU threads.

Says nothing about speed, memory order or launch limits; the `cuda` rows of the other tests do.
"""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from ops_cases import assert_as_good_as_torch, double
from test_ops_advantages import (
    GAE_OPTIONS,
    SUPPORTED_OPTIONS,
    dual_case,
    gae_case,
    run_dual,
    run_gae,
    run_supported,
)
from test_ops_grouped import DIALECTS, KINDS, groups

from alignkit import ops
from alignkit.ops.dispatch import pointer
from alignkit.ops.fusion import attend_reference
from alignkit.ops.grouped import BASELINES, SCALES, batch_std

ROOT = Path(__file__).resolve().parents[1]
GAE_ENTRY = """
extern "C" void entry(void** p, float v_min, float gamma, float decay, long B, long T) {
  alignkit::gae_on_device({(float*)p[0], (float*)p[1], (std::uint8_t*)p[2], (std::uint8_t*)p[3],
      (float*)p[4], (std::uint8_t*)p[5], (std::uint8_t*)p[6], v_min, gamma, decay, (float*)p[7],
      (float*)p[8], B, T}, 0, nullptr);
}
"""
DUAL_ENTRY = """
extern "C" void entry(void** p, float gamma, float decay, float multiplier, long B, long T) {
  const auto of = [&](int rewards, int values, int out) {
    return alignkit::GaeArguments{(float*)p[rewards], (float*)p[values], (std::uint8_t*)p[4],
        (std::uint8_t*)p[5], nullptr, (std::uint8_t*)p[6], nullptr, 0, gamma, decay,
        (float*)p[out], nullptr, B, T};
  };
  alignkit::dual_gae_on_device({of(0, 2, 7), of(1, 3, 8), multiplier, (float*)p[9]}, 0, nullptr);
}
"""
GROUPED_ENTRY = """
extern "C" void entry(void** p, long size, int baseline, int scale, double eps, long G) {
  alignkit::grouped_on_device({(float*)p[0], (std::uint8_t*)p[1], (std::int64_t*)p[2], size,
      alignkit::Baseline(baseline), alignkit::Scale(scale), (double*)p[3], eps, (float*)p[4], G},
      0, nullptr);
}
"""
FUSION_ENTRY = """
extern "C" void entry(void** p, bool bfloat16, long B, long H, long D, long Nv, long Nt) {
  const alignkit::FusionTokens x{(float*)p[0], p[1], p[2], (std::uint8_t*)p[3],
      (std::uint8_t*)p[4], bfloat16, B, H, D, Nv, Nt};
  const auto f = [&](int i) { return (float*)p[i]; };
  alignkit::fusion_on_device(x, {f(5), f(6), f(7)}, 0, nullptr);
  alignkit::fusion_backward_on_device(x, {f(7), f(8), f(9), f(10), f(11), p[12], p[13]},
                                      {f(14), f(15)}, 0, nullptr);
}
"""


def compiled(source, entry, types, folder):
    """The `entry` of a .cu file, whose launches start CPU threads."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    text = (ROOT / "csrc/cuda" / source).read_text()
    text, launches = re.subn(r"(\w+)<<<([^>]*)>>>\(", r"launch(\1, \2, ", text)
    assert launches and "<<<" not in text
    (folder / "kernel.cpp").write_text(text + entry)
    includes = [f"-I{ROOT / folder}" for folder in ("tests/cuda_on_threads", "csrc", "csrc/cuda")]
    subprocess.run([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", *includes,
                    folder / "kernel.cpp", "-o", folder / "kernel.so"], check=True)  # fmt: skip
    function = ctypes.CDLL(str(folder / "kernel.so")).entry
    function.argtypes = types
    return function


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    types = [ctypes.c_void_p, *[ctypes.c_float] * 3, *[ctypes.c_long] * 2]
    return compiled("gae.cu", GAE_ENTRY, types, tmp_path_factory.mktemp("gae"))


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    types = [ctypes.c_void_p, *[ctypes.c_float] * 3, *[ctypes.c_long] * 2]
    return compiled("gae.cu", DUAL_ENTRY, types, tmp_path_factory.mktemp("dual"))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    types = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_double,
             ctypes.c_long]
    return compiled("grouped.cu", GROUPED_ENTRY, types, tmp_path_factory.mktemp("grouped"))


@pytest.fixture(scope="module")
def fusion(tmp_path_factory):
    types = [ctypes.c_void_p, ctypes.c_bool, *[ctypes.c_long] * 5]
    return compiled("fusion.cu", FUSION_ENTRY, types, tmp_path_factory.mktemp("fusion"))


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


@pytest.mark.parametrize("options", [(), ("mask",), ("mask", "truncated")], ids="-".join)
def test_dual_gae(dual, options):
    cases = []
    for seed, (B, T) in enumerate(SHAPES):
        x = dual_case(B, T, seed)
        given = {k: x[k] for k in options}
        out = [torch.full((B, T), float("nan")) for _ in range(3)]
        tensors = [*(x[k] for k in ("rewards", "costs", "values", "cost_values", "terminated")),
                   given.get("truncated"), given.get("mask"), *out]  # fmt: skip
        dual((ctypes.c_void_p * 10)(*map(pointer, tensors)), 0.97, 0.97 * 0.9, 0.7, B, T)
        torchs, exact = (run_dual(y, options, op=ops.dual_gae_reference) for y in (x, double(x)))
        cases += zip(out, torchs, exact, strict=True)
    assert_as_good_as_torch(cases)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ids"])
def test_grouped_advantage(grouped, kind):
    rewards, kw = groups(kind, seed=0)
    offsets, size = kw.get("offsets"), kw.get("group_size", 0)
    G = len(rewards) // size if offsets is None else len(offsets) - 1
    cases = []
    masks = None, torch.rand(len(rewards), generator=torch.Generator().manual_seed(1)) < 0.7
    for (baseline, scale), mask in itertools.product(DIALECTS, masks):
        options = kw | {"baseline": baseline, "scale": scale, "mask": mask}
        ours = torch.full_like(rewards, float("nan"))
        tensors = [rewards, mask, offsets, batch_std(rewards, mask), ours]
        grouped((ctypes.c_void_p * 5)(*map(pointer, tensors)), size, BASELINES.index(baseline),
                SCALES.index(scale), 1e-4, G)
        torchs = ops.grouped_advantage_reference(rewards, **options)
        exact = ops.grouped_advantage_reference(rewards.double(), **options)
        cases.append((ours, torchs, exact))
    assert_as_good_as_torch(cases)


def through_fusion(kernel, tokens, grads, mean_grad):
    """What the kernels of both passes leave, from NaN: context, weights, gradients."""
    queries, visual, tactile, *_ = tokens
    (B, H, D), Nv, Nt = queries.shape, visual.shape[1], tactile.shape[1]
    empty = lambda *shape: torch.full(shape, float("nan"))  # noqa: E731
    outputs = empty(B, H, D), empty(B, H, 2), empty(B, H)
    slopes = [torch.full_like(x, float("nan")) for x in (queries, visual, tactile)]
    work = empty(B, H, Nv + Nt), empty(B, H, Nv + Nt)
    arrays = [*tokens, *outputs, *grads, mean_grad, *slopes, *work]
    kernel((ctypes.c_void_p * len(arrays))(*map(pointer, arrays)), visual.dtype == torch.bfloat16,
           B, H, D, Nv, Nt)  # fmt: skip
    return *outputs[:2], *slopes


FUSED = [(2, 1, 7, 1, 1), (1, 4, 40, 3, 2), (2, 5, 130, 37, 0), (1, 3, 300, 2, 5), (1, 1, 600, 3, 9)]


def fusion_case(B, H, D, Nv, Nt, dtype, masked):
    """Queries, tokens and masks; the gradients that arrive."""
    g = torch.Generator().manual_seed(D)
    queries, *grads = (torch.randn(B, H, n, generator=g) for n in (D, D, 2))
    tokens = [torch.randn(B, N, D, generator=g).to(dtype) for N in (Nv, Nt)]
    masks = [torch.rand(B, N, generator=g) < 0.7 if masked else None for N in (Nv, Nt)]
    return (queries / D**0.5, *tokens, *masks), grads


def by_autograd(tokens, grads):
    leaves = [x.clone().requires_grad_() for x in tokens[:3]]
    context, weights, _ = attend_reference(*leaves, *tokens[3:])
    slopes = torch.autograd.grad((context, weights), leaves, grads)
    return context.detach(), weights.detach(), *slopes


@pytest.mark.timeout(300)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_fusion(fusion, dtype, masked):
    cases = [[] for _ in range(5)]
    for size in FUSED:
        tokens, grads = fusion_case(*size, dtype, masked)
        torchs = by_autograd(tokens, grads)
        exact = by_autograd([*(x.double() for x in tokens[:3]), *tokens[3:]],
                            [x.double() for x in grads])  # fmt: skip
        mean_grad = sum((x * g).sum(-1) for x, g in zip(exact, grads, strict=False)).float()
        found = through_fusion(fusion, tokens, grads, mean_grad)
        for name, *figures in zip(cases, found, torchs, exact, strict=True):
            name.append(figures)
    for name in cases:
        assert_as_good_as_torch(name)
