"""What the operator tests share: backends, awkward layouts, tolerances, poisoned memory."""

import contextlib

import pytest
import torch

from alignkit import ops

KERNELS = ["cpu", "triton", pytest.param("cuda", marks=pytest.mark.cuda)]
BACKENDS = ["reference", *KERNELS]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def require(backend):
    """The device on which a backend's inputs live; skips, with the reason, where it is missing."""
    problem = {b.name: b.problem for b in ops.backends()}[backend]
    if problem:
        pytest.skip(f"{backend}: {problem}")
    on_gpu = backend == "cuda" or backend == "triton" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


@contextlib.contextmanager
def poisoned():
    """New tensors are NaN until somebody writes into them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def move(x, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in x.items()}


def double(x):
    """The same inputs, with floats as float64."""
    return {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in x.items()
    }


def assert_as_good_as_torch(cases):
    """Over a list of (ours, torch's at the same precision, exact): at most twice torch's error.

    A list, because torch is exact on some of the small cases; and at least one rounding of the
    output's dtype, at 1, which is the size of the inputs.
    """
    ours_worst, torchs_worst, rounding = 0.0, 0.0, 0.0
    for ours, torchs, exact in cases:
        assert torch.equal(ours.isnan().cpu(), exact.isnan())
        rounding = max(rounding, torch.finfo(ours.dtype).eps * max(1, largest(exact)))
        ours_worst = max(ours_worst, largest(ours.double().cpu() - exact))
        torchs_worst = max(torchs_worst, largest(torchs.double() - exact))
    assert ours_worst <= max(2 * torchs_worst, rounding)


def largest(x):
    """The largest finite magnitude; 0 where there is none. (-inf minus -inf is NaN: equal.)"""
    x = x[x.isfinite()].abs()
    return x.max().item() if x.numel() else 0.0


def layouts(x):
    """The same numbers as a transposed, a strided and a lazily negated view."""
    yield "transposed", x.t().contiguous().t()
    wide = torch.full((x.shape[0], 2 * x.shape[1]), float("nan"), device=x.device).to(x.dtype)
    wide[:, ::2] = x
    yield "strided", wide[:, ::2]
    if x.dtype != torch.bool:
        yield "negated", (-x)._neg_view()
