"""The wide kernels of `gae`, `supported_gae`, `dual_gae` and `grouped_advantage` stay within their arrays.

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
from functools import partial

import pytest
import torch
from ops_cases import require

from alignkit.ops import dispatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect and fork")
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 80, 255, 256, 257, 321]
GROUP_SIZES = [1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65]
GROUPS = [1, 2, 3, 4, 5, 32, 33, 37, 64, 65]
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


def check(call, plain, outputs):
    """`call` writes the same where its arguments are fenced; the last `outputs` of them are written."""
    fenced = [[x if x is None else guarded(x, at_end) for x in plain] for at_end in (False, True)]
    call(*plain)
    for each in fenced:
        call(*each)
        for ours, theirs in zip(each[-outputs:], plain[-outputs:], strict=True):
            assert ours is None or torch.equal(ours, theirs)


def steps(T, rows, given):
    """(`rows` of rewards, as many of values, terminated, truncated, mask)"""
    g = torch.Generator().manual_seed(T)
    floats = [torch.randn(2, n, generator=g) for n in (T, T + 1) for _ in range(rows)]
    flags = [torch.rand(2, T, generator=g) < share if there else None
             for share, there in zip((0.1, 0.1, 0.7), given, strict=True)]  # fmt: skip
    return *floats, *flags


def gae(*x):
    *inputs, advantages, targets = x
    dispatch.extension("cpu").gae(*map(dispatch.pointer, inputs), -1.0, 0.9, 0.8,
                                  *map(dispatch.pointer, (advantages, targets)), *advantages.shape)  # fmt: skip


def gae_arguments(T, given, floored):
    """(rewards, values, terminated, truncated, bootstrap, mask, supported, advantages, targets)"""
    *inputs, mask = steps(T, 1, given)
    bootstrap = torch.randn(2, T) if given[1] else None
    supported = torch.rand(2, T) < 0.9 if floored else None
    outputs = torch.zeros(2, T), torch.zeros(2, T) if floored else None
    return [*inputs, bootstrap, mask, supported, *outputs]


def every_gae():
    for T, floored in itertools.product(LENGTHS, (False, True)):
        for given in itertools.product((False, True), repeat=3):
            if not (floored and given[1]):  # supported_gae has no truncation
                check(gae, gae_arguments(T, given, floored), outputs=2)


def dual_gae(*x):
    *inputs, gain, cost, combined = map(dispatch.pointer, x)
    dispatch.extension("cpu").dual_gae(*inputs, 0.9, 0.8, 0.5, gain, cost, combined, *x[-1].shape)


def dual_gae_arguments(T, given):
    """(rewards, costs, values, cost_values, terminated, truncated, mask, advantages, cost_advantages, combined)"""
    return [*steps(T, 2, given), *(torch.zeros(2, T) for _ in range(3))]


def every_dual_gae():
    for T in LENGTHS:
        for given in itertools.product((False, True), repeat=3):
            check(dual_gae, dual_gae_arguments(T, given), outputs=3)


def grouped_advantage(rewards, mask, offsets, batch_std, advantages, size=0, kind=0):
    """`kind`: which baseline, and which scale."""
    G = len(advantages) // size if offsets is None else len(offsets) - 1
    rewards, mask, offsets, batch_std, advantages = map(
        dispatch.pointer, (rewards, mask, offsets, batch_std, advantages))  # fmt: skip
    dispatch.extension("cpu").grouped_advantage(
        rewards, mask, offsets, size, kind, kind, batch_std, 1e-4, advantages, G)  # fmt: skip


def grouped_arguments(N, masked, offsets=None):
    """(rewards, mask, offsets, batch_std, advantages)"""
    g = torch.Generator().manual_seed(N)
    mask = torch.rand(N, generator=g) < 0.7 if masked else None
    batch_std = torch.ones(1, dtype=torch.float64)
    return [torch.randn(N, generator=g), mask, offsets, batch_std, torch.zeros(N)]


def every_grouped_advantage():
    for kind, masked in itertools.product(range(3), (False, True)):
        for size, G in itertools.product(GROUP_SIZES, GROUPS):
            call = partial(grouped_advantage, size=size, kind=kind)
            check(call, grouped_arguments(size * G, masked), outputs=1)
        for first in range(len(GROUP_SIZES)):  # each size at the start and at the end
            sizes = [0, *GROUP_SIZES[first:], 0, *GROUP_SIZES[:first]]
            offsets = torch.tensor(sizes).cumsum(0)
            call = partial(grouped_advantage, kind=kind)
            check(call, grouped_arguments(sum(sizes), masked, offsets), outputs=1)


def one_short(call, plain):
    """The first argument ends one number before it should."""
    faulthandler.disable()  # which would print where
    first, *rest = plain
    call(guarded(first[..., 1:].contiguous(), at_end=True), *rest)


def gae_one_short():
    one_short(gae, gae_arguments(64, (True, False, False), floored=False))


def dual_gae_one_short():
    one_short(dual_gae, dual_gae_arguments(64, (True, False, False)))


def grouped_advantage_one_short():
    one_short(partial(grouped_advantage, size=9), grouped_arguments(9, masked=False))


def exit_code(work):
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork in a process with threads
@pytest.mark.parametrize("work", [every_gae, every_dual_gae, every_grouped_advantage])
def test_nothing_beyond_the_arrays(work):
    require("cpu")
    assert exit_code(work) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("work", [gae_one_short, dual_gae_one_short, grouped_advantage_one_short])
def test_the_pages_catch_what_is_beyond(work):
    require("cpu")
    assert exit_code(work) == -signal.SIGSEGV
