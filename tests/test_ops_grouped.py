"""`grouped_advantage`: every way to say groups, every dialect, every backend against float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import BACKENDS, KERNELS, assert_as_good_as_torch, poisoned, require

from alignkit import ops
from alignkit.ops.grouped import BASELINES, SCALES

DIALECTS = list(itertools.product(BASELINES, SCALES))


def groups(kind, seed):
    """Rewards and how they are grouped; ragged groups include empty ones and ones of one."""
    g = torch.Generator().manual_seed(seed)
    if kind.isdigit():
        n = int(kind)
        G = 67 if n in (16, 64) else 3  # a batch of the widest kernel, and some
        return torch.randn(G * n, generator=g), {"group_size": n}
    sizes = torch.cat([torch.tensor([0, 1, 2, 5, 33, 0, 70, 1]), torch.randperm(71, generator=g)[:30]])
    N = int(sizes.sum())
    rewards = torch.randn(N, generator=g)
    if kind == "offsets":
        return rewards, {"offsets": torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])}
    ids = torch.repeat_interleave(torch.arange(len(sizes)) * 1000 - 3000, sizes)
    return rewards, {"ids": ids[torch.randperm(N, generator=g)]}


KINDS = ["1", "2", "3", "4", "8", "16", "32", "64", "65", "offsets", "ids"]


def moved(kw, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kw.items()}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_float64(backend, kind, masked):
    device, cases = require(backend), []
    rewards, kw = groups(kind, seed=len(kind))
    mask = torch.rand(len(rewards), generator=torch.Generator().manual_seed(1)) < 0.7
    kw |= {"mask": mask} if masked else {}
    for (baseline, scale), dtype in itertools.product(DIALECTS, (torch.float32, torch.bfloat16)):
        options = kw | {"baseline": baseline, "scale": scale}
        x = rewards.to(dtype)
        with poisoned():
            ours = ops.grouped_advantage(x.to(device), **moved(options, device), backend=backend)
        assert ours.shape == x.shape and ours.dtype == torch.float32
        torchs = ops.grouped_advantage_reference(x, **options)
        cases.append((ours, torchs, ops.grouped_advantage_reference(x.double(), **options)))
    assert_as_good_as_torch(cases)


def by_the_formulas(rewards, groups, baseline, scale, eps, mask):
    """Group by group in Python, from the table of the notebook."""
    out = [0.0] * len(rewards)
    counted = [r for r, m in zip(rewards, mask, strict=True) if m]

    def deviation(values):
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))

    for group in groups:
        rows = [i for i in group if mask[i]]
        values = [rewards[i] for i in rows]
        if len(rows) < 2 and (baseline != "none" or scale == "std"):
            continue
        for i in rows:
            others = [rewards[j] for j in rows if j != i]
            base = {"mean": lambda v=values: math.fsum(v) / len(v),
                    "loo": lambda v=others: math.fsum(v) / len(v), "none": lambda: 0.0}
            spread = {"std": lambda v=values: deviation(v) + eps, "none": lambda: 1.0,
                      "batch": lambda: eps + (deviation(counted) if len(counted) > 1 else 0.0)}
            out[i] = (rewards[i] - base[baseline]()) / spread[scale]()
    return out


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_reference_is_the_table(data):
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    N = sum(sizes)
    numbers = st.integers(-8, 8).map(lambda i: i / 4)
    rewards = data.draw(st.lists(numbers, min_size=N, max_size=N))
    mask = data.draw(st.lists(st.booleans(), min_size=N, max_size=N))
    baseline, scale = data.draw(st.sampled_from(DIALECTS))
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    members = [range(a, b) for a, b in itertools.pairwise(starts)]
    expected = by_the_formulas(rewards, members, baseline, scale, 0.25, mask)
    given_ = {"baseline": baseline, "scale": scale, "eps": 0.25, "mask": torch.tensor(mask).bool()}
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.tensor(rewards).double()
    for groups_ in ({"offsets": torch.tensor(starts)}, {"ids": ids}):
        found = ops.grouped_advantage(x, **groups_, **given_)
        torch.testing.assert_close(found, torch.tensor(expected).double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3, 8, 16])
def test_equal_rewards_say_nothing_and_close_ones_keep_their_difference(backend, size):
    device = require(backend)
    for value in (0.1, 1e8, -3.3):
        equal = torch.full((2 * size,), value, device=device)
        assert not ops.grouped_advantage(equal, size, backend=backend).any()
        for scale in SCALES:
            kw = {"scale": scale, "eps": 0.0, "backend": backend}
            assert not ops.grouped_advantage(equal, size, **kw).any(), scale
        assert not ops.grouped_advantage(equal, size, baseline="loo", scale="none",
                                         backend=backend).any()  # fmt: skip
    close = torch.ones(size)
    close[0] = 1.00001
    found = ops.grouped_advantage(close.to(device), size, eps=0.0, backend=backend).cpu()
    exact = ops.grouped_advantage_reference(close.double(), size, eps=0.0)
    assert ((found - exact).abs() <= 1e-3 * exact.abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_leave_one_out_has_no_residue(backend):
    """Seven of eight rewards .35: with a running difference, the odd one out explodes."""
    device = require(backend)
    rewards = torch.tensor([0.35] * 7 + [1.35], device=device)
    found = ops.grouped_advantage(rewards, 8, baseline="loo", scale="none", backend=backend)
    torch.testing.assert_close(found.cpu(), torch.tensor([-1 / 7] * 7 + [1.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_masked_has_no_say_even_as_nan(backend):
    device = require(backend)
    rewards = torch.tensor([1.0, math.nan, 3.0, math.inf, 5.0, 5.0], device=device)
    mask = torch.tensor([1, 0, 1, 0, 1, 1], device=device).float()
    for scale in SCALES:
        found = ops.grouped_advantage(rewards, 3, scale=scale, mask=mask, backend=backend)
        assert found.isfinite().all() and found[[1, 3, 4, 5]].tolist() == [0, 0, 0, 0]
        assert float(found[0]) == -float(found[2]) < 0


def test_nan_stays_in_its_group():
    rewards = torch.tensor([1.0, math.nan, 3.0, 4.0])
    for backend in ("reference", "cpu"):
        require(backend)
        found = ops.grouped_advantage(rewards, 2, backend=backend)
        assert found[:2].isnan().all() and found[2:].isfinite().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_views_are_read_as_they_look(backend):
    rewards = torch.randn(12, device=require(backend))
    expected = ops.grouped_advantage(rewards, 4, backend=backend)
    spread = torch.stack([rewards, rewards + 9], 1)[:, 0]
    for view in (spread, (-rewards)._neg_view()):
        assert torch.equal(ops.grouped_advantage(view, 4, backend=backend), expected)


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_on_every_repeat(backend):
    device = require(backend)
    for kind in KINDS:
        rewards, kw = groups(kind, 0)
        rewards, kw = rewards.to(device), moved(kw, device) | {"backend": backend}
        first = ops.grouped_advantage(rewards, **kw)
        assert all(torch.equal(ops.grouped_advantage(rewards, **kw), first) for _ in range(3))


@pytest.mark.parametrize("change, error, message", [
    ({"group_size": None}, ValueError, "group_size, offsets, ids: expected exactly one of them, "
                                       "got none"),
    ({"ids": torch.zeros(6).long()}, ValueError, "group_size, offsets, ids: expected exactly one "
                                                 "of them, got group_size and ids"),
    ({"group_size": 4}, ValueError, "group_size: expected a divisor of 6, got 4"),
    ({"group_size": 0}, ValueError, "group_size: expected a divisor of 6, got 0"),
    ({"group_size": 2.0}, TypeError, "group_size: expected an int, got float"),
    ({"group_size": None, "offsets": torch.tensor([0, 7])}, ValueError,
     "offsets: expected to go from 0 to 6"),
    ({"group_size": None, "offsets": torch.tensor([0, 4, 2, 6])}, ValueError,
     "offsets: expected numbers that do not fall"),
    ({"group_size": None, "offsets": torch.tensor([0.0, 6.0])}, TypeError, "offsets: expected int"),
    ({"group_size": None, "ids": torch.zeros(5).long()}, ValueError, r"ids: expected shape \(6,\)"),
    ({"rewards": torch.zeros(6).long()}, TypeError, "rewards: expected float32"),
    ({"rewards": torch.zeros(2, 3)}, ValueError, r"rewards: expected shape \(N\)"),
    ({"baseline": "median"}, ValueError, "baseline: expected one of mean, loo, none, got 'median'"),
    ({"scale": "iqr"}, ValueError, "scale: expected one of std, batch, none, got 'iqr'"),
    ({"eps": -1.0}, ValueError, "eps: expected a finite number"),
    ({"mask": torch.full((6,), 0.5)}, ValueError, "mask: expected only 0 and 1"),
])  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    right = {"rewards": torch.zeros(6), "group_size": 3}
    with pytest.raises(error, match=f"^{message}"):
        ops.grouped_advantage(**(right | change))


def test_a_value_that_came_is_shown():
    with pytest.raises(ValueError, match="got 7$"):
        ops.grouped_advantage(torch.zeros(6), offsets=torch.tensor([0, 7]))


def test_nothing_gives_nothing():
    for kw in ({"group_size": 3}, {"offsets": torch.tensor([0])}, {"offsets": torch.zeros(4).long()},
               {"ids": torch.zeros(0).long()}):
        for backend in ("reference", "cpu"):
            require(backend)
            assert ops.grouped_advantage(torch.zeros(0), **kw, backend=backend).shape == (0,)
