"""The wide kernels of `gae` and `supported_gae` stay within their arrays.

Their masked loads and stores are instructions that AddressSanitizer does not watch, so the arrays stand against pages
that nobody may touch: once the page behind, once the page in front.
"""

import ctypes
import faulthandler
import itertools
import mmap
import multiprocessing
import signal
import sys

import pytest
import torch
from ops_cases import require

from alignkit.ops import dispatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect and fork")
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 80, 255, 256, 257, 321]
NO_ACCESS = 0


def guarded(x, at_end):
    """A copy of `x` that ends where a forbidden page begins, or begins where one ends."""
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    start = mmap.PAGESIZE + (pages * mmap.PAGESIZE - size if at_end else 0)
    y = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
    first = y.data_ptr() - start
    for page in (first, first + (pages + 1) * mmap.PAGESIZE):
        assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, NO_ACCESS)
    return y.copy_(x)


def arguments(T, given, floored):
    """(rewards, values, terminated, truncated, bootstrap, mask, supported, advantages, targets)"""
    g = torch.Generator().manual_seed(T)
    floats = [torch.randn(2, n, generator=g) for n in (T, T + 1, T)]
    flags = [torch.rand(2, T, generator=g) < share if there else None
             for share, there in zip((0.1, 0.1, 0.7), given, strict=True)]  # fmt: skip
    terminated, truncated, mask = flags
    supported = torch.rand(2, T, generator=g) < 0.9 if floored else None
    outputs = torch.zeros(2, T), torch.zeros(2, T) if floored else None
    return [*floats[:2], terminated, truncated, None if truncated is None else floats[2], mask,
            supported, *outputs]  # fmt: skip


def call(x):
    *inputs, advantages, targets = x
    B, T = advantages.shape
    dispatch.extension("cpu").gae(*map(dispatch.pointer, inputs), -1.0, 0.9, 0.8,
                                  *map(dispatch.pointer, (advantages, targets)), B, T)  # fmt: skip


def every_case():
    for T, floored, at_end in itertools.product(LENGTHS, (False, True), (False, True)):
        for given in itertools.product((False, True), repeat=3):
            if floored and given[1]:  # supported_gae has no truncation
                continue
            plain = arguments(T, given, floored)
            fenced = [x if x is None else guarded(x, at_end) for x in plain]
            call(plain)
            call(fenced)
            for ours, theirs in zip(fenced[-2:], plain[-2:], strict=True):
                assert ours is None or torch.equal(ours, theirs)


def one_step_too_many():
    faulthandler.disable()  # which would print where
    rewards, *rest, advantages, targets = arguments(64, (True, False, False), False)
    call([guarded(rewards[:, 1:].contiguous(), at_end=True), *rest, advantages, targets])


def exit_code(work):
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork in a process with threads
@pytest.mark.parametrize("work, code", [(every_case, 0), (one_step_too_many, -signal.SIGSEGV)])
def test_no_step_beyond_the_arrays(work, code):
    require("cpu")
    assert exit_code(work) == code
