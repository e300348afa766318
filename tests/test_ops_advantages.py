"""`gae` and `supported_gae`: every backend against float64, a definition and hand-made rows."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    BACKENDS,
    KERNELS,
    assert_as_good_as_torch,
    double,
    layouts,
    move,
    poisoned,
    require,
)

from alignkit import ops
from alignkit.ops import dispatch

# ---- meaning -------------------------------------------------------------------------------


def by_definition(rewards, values, terminated, gamma, lam, truncated, bootstrap, mask):
    """A_t = sum over the rest of its episode of (gamma lam)^k delta_{t+k}: no recurrence."""
    counted = [t for t in range(len(rewards)) if mask[t]]
    after = dict(zip(counted, [values[t] for t in counted[1:]] + [values[-1]], strict=False))
    advantages = [0.0] * len(rewards)
    for k, t in enumerate(counted):
        for power, s in enumerate(counted[k:]):
            value = bootstrap[s] if truncated[s] else after[s]
            delta = rewards[s] + gamma * (0.0 if terminated[s] else value) - values[s]
            advantages[t] += (gamma * lam) ** power * delta
            if terminated[s] or truncated[s]:
                break
    return advantages


def supported_by_definition(rewards, values, supported, v_min, gamma, lam, terminated, mask):
    """bspo.md section 4, steps 3 to 5, with the successor's value written out for each case."""
    counted = [t for t in range(len(rewards)) if mask[t]]
    advantages, targets = [0.0] * len(rewards), [0.0] * len(rewards)
    for k in reversed(range(len(counted))):
        t, last = counted[k], k + 1 == len(counted)
        if not supported[t]:
            advantages[t] = gamma * v_min - values[t]
        elif terminated[t]:
            advantages[t] = rewards[t] - values[t]
        else:
            after = values[-1] if last else values[counted[k + 1]]
            later = 0.0 if last else advantages[counted[k + 1]]
            advantages[t] = rewards[t] + gamma * after - values[t] + gamma * lam * later
        entered_by_unsupported = k > 0 and not supported[counted[k - 1]]
        targets[t] = v_min if entered_by_unsupported else advantages[t] + values[t]
    return advantages, targets


bits = st.booleans()
numbers = st.floats(-10, 10, width=32)


@st.composite
def rows(draw):
    T = draw(st.integers(0, 12))
    column = lambda of: draw(st.lists(of, min_size=T, max_size=T))  # noqa: E731
    return {
        "rewards": column(numbers),
        "values": column(numbers) + [draw(numbers)],
        "flags": [column(bits) for _ in range(3)],
        "bootstrap": column(numbers),
        "gamma": draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])),
        "lam": draw(st.sampled_from([0.0, 0.95, 1.0])),
    }


def row(x, dtype=torch.float64):
    return torch.tensor([x], dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=150, deadline=None)
@given(x=rows())
def test_gae_is_the_sum_of_its_definition(backend, x):
    require(backend)
    terminated, truncated, mask = x["flags"]
    expected = by_definition(
        x["rewards"], x["values"], terminated, x["gamma"], x["lam"], truncated, x["bootstrap"],
        mask,
    )  # fmt: skip
    dtype = torch.float64 if backend == "reference" else torch.float32
    got = ops.gae(
        row(x["rewards"], dtype), row(x["values"], dtype), row(terminated, torch.bool),
        x["gamma"], x["lam"], truncated=row(truncated, torch.bool),
        bootstrap=row(x["bootstrap"], dtype), mask=row(mask, torch.bool), backend=backend,
    )  # fmt: skip
    tolerance = 1e-12 if backend == "reference" else 1e-6
    torch.testing.assert_close(got.double(), row(expected), rtol=tolerance, atol=200 * tolerance)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@settings(max_examples=150, deadline=None)
@given(x=rows(), ends=bits)
def test_supported_gae_is_its_definition(backend, x, ends):
    require(backend)
    terminated, supported, mask = x["flags"]
    last = max((t for t, m in enumerate(mask) if m), default=None)
    implied = [t == last for t in range(len(mask))]
    expected = supported_by_definition(
        x["rewards"], x["values"], supported, -3.0, x["gamma"], x["lam"],
        terminated if ends else implied, mask,
    )  # fmt: skip
    dtype = torch.float64 if backend == "reference" else torch.float32
    got = ops.supported_gae(
        row(x["rewards"], dtype), row(x["values"], dtype), row(supported, torch.bool), -3.0,
        x["gamma"], x["lam"], terminated=row(terminated, torch.bool) if ends else None,
        mask=row(mask, torch.bool), backend=backend,
    )  # fmt: skip
    tolerance = 1e-12 if backend == "reference" else 1e-6
    for ours, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(
            ours.double(), row(exact), rtol=tolerance, atol=200 * tolerance
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_example_computed_by_hand(backend):
    device = require(backend)
    rewards = torch.tensor([[0.0, 0.0, 1.0]], device=device)
    values = torch.tensor([[0.5, 0.2, 0.4, math.nan]], device=device)
    supported = torch.tensor([[1.0, 0.0, 1.0]], device=device)
    for terminated in (torch.tensor([[0.0, 0.0, 1.0]], device=device), None):
        advantages, targets = ops.supported_gae(
            rewards, values, supported, -2, 1.0, 0.5, terminated=terminated, backend=backend
        )
        torch.testing.assert_close(advantages.cpu(), torch.tensor([[-1.4, -2.2, 0.6]]))
        torch.testing.assert_close(targets.cpu(), torch.tensor([[-0.9, -2.0, -2.0]]))


# ---- every backend against float64 ---------------------------------------------------------


def gae_case(B, T, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    flag = lambda p: torch.rand(B, T, generator=g) < p  # noqa: E731
    mask = flag(0.7)
    mask[1::2] = torch.arange(T) < 0.6 * T  # and rows that are counted, then padding
    return {
        "rewards": torch.randn(B, T, generator=g).to(dtype),
        "values": torch.randn(B, T + 1, generator=g).to(dtype),
        "terminated": flag(0.1),
        "truncated": flag(0.1),
        "bootstrap": torch.randn(B, T, generator=g).to(dtype),
        "mask": mask,
        "supported": flag(0.8),
    }


GAE_OPTIONS = [(), ("truncated",), ("truncated", "bootstrap"), ("mask",),
               ("mask", "truncated"), ("mask", "truncated", "bootstrap")]  # fmt: skip
SUPPORTED_OPTIONS = [(), ("terminated",), ("mask",), ("mask", "terminated")]
SHAPES = {
    "cpu": [(1, 0), (0, 5), (1, 1), (3, 1), (2, 3), (2, 4), (2, 5), (3, 7), (3, 8), (3, 9),
            (1, 255), (2, 256), (2, 257), (5, 515), (16, 64)],
    "triton": [(1, 0), (0, 5), (1, 1), (3, 1), (2, 7), (2, 8), (2, 9), (1, 33)],
    "cuda": [(1, 0), (0, 5), (1, 1), (3, 1), (2, 31), (2, 32), (2, 33), (1, 64), (5, 65),
             (700, 129)],
}  # fmt: skip
SHAPES["reference"] = SHAPES["cpu"]
if torch.cuda.is_available():  # the interpreter would take minutes
    SHAPES["triton"] += [(3, 1023), (2, 1024), (2, 1025), (700, 129)]


def run_gae(x, options, backend=None, op=ops.gae, **extra):
    if backend is not None:
        extra["backend"] = backend
    chosen = {k: x[k] for k in options}
    return op(x["rewards"], x["values"], x["terminated"], 0.97, 0.9, **chosen, **extra)


def run_supported(x, options, backend=None, op=ops.supported_gae, **extra):
    if backend is not None:
        extra["backend"] = backend
    chosen = {k: x[k] for k in options}
    return op(x["rewards"], x["values"], x["supported"], -2.5, 0.97, 0.9, **chosen, **extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("options", GAE_OPTIONS, ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_agrees_with_float64(backend, options, dtype):
    device, cases = require(backend), []
    for seed, (B, T) in enumerate(SHAPES[backend]):
        x = gae_case(B, T, seed, dtype)
        with poisoned():
            ours = run_gae(move(x, device), options, backend)
        assert ours.shape == (B, T) and ours.dtype == torch.float32
        assert ours.device.type == device.type
        torchs = run_gae(x, options, op=ops.gae_reference)
        cases.append((ours, torchs, run_gae(double(x), options, op=ops.gae_reference)))
    assert_as_good_as_torch(cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("options", SUPPORTED_OPTIONS, ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_supported_gae_agrees_with_float64(backend, options, dtype):
    device, cases = require(backend), []
    for seed, (B, T) in enumerate(SHAPES[backend]):
        x = gae_case(B, T, seed, dtype)
        with poisoned():
            ours = run_supported(move(x, device), options, backend)
        torchs = run_supported(x, options, op=ops.supported_gae_reference)
        exact = run_supported(double(x), options, op=ops.supported_gae_reference)
        assert all(o.shape == (B, T) and o.dtype == torch.float32 for o in ours)
        cases += zip(ours, torchs, exact, strict=True)
    assert_as_good_as_torch(cases)


def dual_case(B, T, seed, dtype=torch.float32):
    cost, x = gae_case(B, T, seed + 100, dtype), gae_case(B, T, seed, dtype)
    return x | {"costs": cost["rewards"], "cost_values": cost["values"]}


def run_dual(x, options, op=ops.dual_gae, multiplier=0.7, **extra):
    chosen = {k: x[k] for k in options}
    columns = (x[k] for k in ("rewards", "costs", "values", "cost_values", "terminated"))
    return op(*columns, 0.97, 0.9, multiplier, **chosen, **extra)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("options", [o for o in GAE_OPTIONS if "bootstrap" not in o], ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_gae_is_gae_twice_and_their_combination(backend, options, dtype):
    device, cases = require(backend), []
    for seed, (B, T) in enumerate(SHAPES[backend]):
        x = dual_case(B, T, seed, dtype)
        with poisoned():
            ours = run_dual(move(x, device), options, backend=backend)
        assert all(o.shape == (B, T) and o.dtype == torch.float32 for o in ours)
        torchs, exact = (run_dual(y, options, op=ops.dual_gae_reference) for y in (x, double(x)))
        cases += zip(ours, torchs, exact, strict=True)
        costs = x | {"rewards": x["costs"], "values": x["cost_values"]}
        for found, alone in zip(ours, (x, costs), strict=False):
            assert torch.equal(found, run_gae(move(alone, device), options, backend))
    assert_as_good_as_torch(cases)


@pytest.mark.parametrize("options", [(), ("mask", "truncated")], ids="-".join)
def test_triton_carries_what_it_knows_from_block_to_block(monkeypatch, options):
    require("triton")
    monkeypatch.setattr(dispatch.extension("triton.advantages"), "block_size", lambda T: 8)
    test_gae_agrees_with_float64("triton", options, torch.float32)
    test_dual_gae_is_gae_twice_and_their_combination("triton", options, torch.float32)
    test_supported_gae_agrees_with_float64("triton", options[:1], torch.float32)


@pytest.mark.parametrize("change, message", [
    ({"costs": torch.zeros(2, 4)}, r"costs: expected shape \(2, 3\), got \(2, 4\)"),
    ({"cost_values": torch.zeros(2, 3)}, r"cost_values: expected shape \(2, 4\), got \(2, 3\)"),
    ({"multiplier": -0.1}, "multiplier: expected a finite number"),
    ({"mask": torch.full((2, 3), 0.5)}, "mask: expected only 0 and 1"),
])  # fmt: skip
def test_bad_input_of_dual_gae_is_refused_by_name(change, message):
    right = {"rewards": torch.zeros(2, 3), "costs": torch.zeros(2, 3),
             "values": torch.zeros(2, 4), "cost_values": torch.zeros(2, 4),
             "terminated": torch.zeros(2, 3), "gamma": 1.0, "lam": 1.0,
             "multiplier": 1.0}  # fmt: skip
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.dual_gae(**(right | change))


@pytest.mark.parametrize("backend", KERNELS)
def test_all_masked_gives_zeros(backend):
    device = require(backend)
    x = gae_case(2, 9, 0) | {"mask": torch.zeros(2, 9)}
    x |= {"rewards": torch.full((2, 9), math.nan), "values": torch.full((2, 10), math.nan)}
    with poisoned():
        assert (run_gae(move(x, device), ("mask",), backend) == 0).all()
        for out in run_supported(move(x, device), ("mask",), backend):
            assert (out == 0).all()


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_on_every_repeat(backend):
    device = require(backend)
    x, other = (move(gae_case(3, 60, seed), device) for seed in (1, 2))
    for run, options in ((run_gae, GAE_OPTIONS[-1]), (run_supported, SUPPORTED_OPTIONS[-1])):
        first = run(x, options, backend)
        run(other, options, backend)
        again = run(x, options, backend)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


def test_same_bits_from_many_threads():
    require("cpu")
    x = gae_case(64, 300, 3)
    expected = run_gae(x, GAE_OPTIONS[-1], "cpu")
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: run_gae(x, GAE_OPTIONS[-1], "cpu"), range(32))
        assert all(torch.equal(r, expected) for r in results)


@pytest.mark.parametrize("backend", KERNELS)
def test_views_are_read_as_what_they_show(backend):
    device = require(backend)
    x = move(gae_case(4, 11, 4), device)
    options = GAE_OPTIONS[-1]
    expected = run_gae(x, options, backend)
    expected_supported = run_supported(x, ("mask",), backend)
    for name in ("rewards", "values", "bootstrap", "terminated", "mask", "supported"):
        for layout, view in layouts(x[name]):
            got = run_gae(x | {name: view}, options, backend)
            assert torch.equal(got, expected), (name, layout)
            got = run_supported(x | {name: view}, ("mask",), backend)
            assert all(map(torch.equal, got, expected_supported)), (name, layout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float_flags_equal_bool_flags(backend):
    device = require(backend)
    x = move(gae_case(3, 9, 5), device)
    flags = {k: x[k].float() for k in ("terminated", "truncated", "mask", "supported")}
    options = GAE_OPTIONS[-1]
    assert torch.equal(run_gae(x, options, backend), run_gae(x | flags, options, backend))
    got = run_supported(x | flags, SUPPORTED_OPTIONS[-1], backend)
    assert all(map(torch.equal, run_supported(x, SUPPORTED_OPTIONS[-1], backend), got))


# ---- where others went wrong ---------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu", KERNELS[-1]])
def test_long_undiscounted_rows_stay_accurate(backend):
    device = require(backend)
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(1, 16384, generator=g), torch.randn(1, 16385, generator=g)
    never = torch.zeros(1, 16384, dtype=torch.bool)
    exact = ops.gae_reference(rewards.double(), values.double(), never, 1.0, 1.0)
    found = ops.gae(*(x.to(device) for x in (rewards, values, never)), 1.0, 1.0, backend=backend)
    assert (found.cpu() - exact).abs().max() / exact.abs().max() <= 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_step_is_not_forgotten(backend):
    device = require(backend)
    zeros = torch.zeros(2, 5, device=device)
    rewards = zeros.clone()
    rewards[:, -1] = 1
    advantages = ops.gae(rewards, torch.zeros(2, 6, device=device), zeros, backend=backend)
    assert (advantages[:, -1] == 1).all() and (advantages[:, 0] > 0).all()
    bootstrapped = ops.gae(zeros, torch.ones(2, 6, device=device), zeros, 0.5, 0, backend=backend)
    assert (bootstrapped == -0.5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_termination_truncation_and_mask_are_three_things(backend):
    device = require(backend)
    tensor = lambda *xs: torch.tensor([xs], dtype=torch.float32, device=device)  # noqa: E731
    rewards, values = tensor(0, 0, 0), tensor(1, 2, 4, 8)
    none, middle = tensor(0, 0, 0), tensor(0, 1, 0)
    run = lambda *a, **kw: ops.gae(*a, 1.0, 1.0, backend=backend, **kw)[0].tolist()  # noqa: E731
    assert run(rewards, values, none) == [7, 6, 4]
    assert run(rewards, values, middle) == [-1, -2, 4]
    assert run(rewards, values, none, truncated=middle) == [3, 2, 4]
    assert run(rewards, values, none, truncated=middle, bootstrap=10 * middle) == [9, 8, 4]
    assert run(rewards, values, middle, truncated=middle, bootstrap=10 * middle) == [-1, -2, 4]
    assert run(rewards, values, none, mask=1 - middle) == [7, 0, 4]
    # cut before a skipped step: the value after the cut is the skipped state's own
    cut = tensor(1, 0, 0)
    assert run(rewards, values, none, truncated=cut, mask=1 - middle) == [1, 0, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_floor_belongs_to_the_state_after(backend):
    """With exact values, a supported step before an unsupported one is not charged for it."""
    device = require(backend)
    gamma, v_min, p = 0.9, -4.0, 0.25  # p: probability of the unsupported step in state 1
    v1 = p * gamma * v_min + (1 - p) * 2.0
    v0 = 0.3
    rewards = torch.tensor([[1.0, 0.0], [1.0, 2.0]], device=device)
    values = torch.tensor([[v0, v1, 0.0]] * 2, device=device)
    supported = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=device)
    run = lambda lam: ops.supported_gae(  # noqa: E731
        rewards, values, supported, v_min, gamma, lam, backend=backend
    )[0][:, 0].cpu()
    q = 1.0 + gamma * v1
    torch.testing.assert_close(run(0.0), torch.tensor([q - v0, q - v0]))
    expected = (run(0.95) * torch.tensor([p, 1 - p])).sum()
    torch.testing.assert_close(expected, torch.tensor(q - v0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_after_an_unsupported_step_reaches_back(backend):
    device = require(backend)
    x = move(gae_case(1, 12, 6), device)
    x["supported"] = torch.ones(1, 12, device=device)
    x["supported"][0, 5] = 0
    before = run_supported(x, (), backend)
    changed = {k: x[k].clone() for k in ("rewards", "values")}
    changed["rewards"][0, 5:] += 100  # the unsupported step's own reward does not count either
    changed["values"][0, 6:] = math.nan
    after = run_supported(x | changed, (), backend)
    assert torch.equal(before[0][0, :6], after[0][0, :6])
    assert torch.equal(before[1][0, :6], after[1][0, :6])
    assert before[1][0, 6] == after[1][0, 6] == -2.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_reaches_the_steps_that_see_it_and_no_other(backend):
    device = require(backend)
    x = move(gae_case(1, 12, 7), device)
    x["terminated"] = torch.zeros(1, 12, dtype=torch.bool, device=device)
    x["terminated"][0, 3] = True
    x["rewards"][0, 8] = math.nan
    seen = run_gae(x, (), backend).isnan()[0].tolist()
    assert seen == [4 <= t <= 8 for t in range(12)]
    x["mask"] = torch.ones(1, 12, device=device)
    x["mask"][0, 8] = 0
    x["values"][0, 8] = math.nan
    assert not run_gae(x, ("mask",), backend).isnan().any()


def test_v_min_must_be_finite():
    x = gae_case(1, 3, 0)
    with pytest.raises(ValueError, match="v_min.*finite.*-inf"):  # r_min / (1 - gamma) at gamma = 1
        ops.supported_gae(x["rewards"], x["values"], x["supported"], -math.inf, 1.0)


# ---- gradients and contract ----------------------------------------------------------------


def test_the_references_differentiate_and_the_operators_do_not():
    x = double(gae_case(2, 5, 8))
    rewards, values = x["rewards"].requires_grad_(), x["values"].requires_grad_()
    chosen = {k: x[k] for k in GAE_OPTIONS[-1]}
    f = lambda r, v: ops.gae_reference(r, v, x["terminated"], **chosen)  # noqa: E731
    g = lambda r, v: ops.supported_gae_reference(r, v, x["supported"], -1.0)  # noqa: E731
    assert torch.autograd.gradcheck(f, (rewards, values))
    assert torch.autograd.gradcheck(g, (rewards, values))
    assert not ops.gae(rewards, values, x["terminated"]).requires_grad
    assert not any(o.requires_grad for o in ops.supported_gae(rewards, values, x["supported"], 0))


BAD = {
    "rewards: expected a torch.Tensor, got list": {"rewards": [[1.0]]},
    r"rewards: expected shape \(B, T\), got \(3,\)": {"rewards": torch.zeros(3)},
    "rewards: expected float32, bfloat16, float64, got torch.int64": {
        "rewards": torch.zeros(2, 3, dtype=torch.int64)
    },
    "rewards: expected .*, got torch.float16": {"rewards": torch.zeros(2, 3).half()},
    "rewards: expected .*, got torch.complex64": {"rewards": torch.zeros(2, 3) * 1j},
    r"values: expected shape \(2, 4\), got \(2, 3\)": {"values": torch.zeros(2, 3)},
    r"values: expected shape \(2, 4\), got \(1, 4\)": {"values": torch.zeros(1, 4)},
    "values: expected .*, got torch.int32": {"values": torch.zeros(2, 4).int()},
    "values: expected a tensor on cpu, got one on meta": {
        "values": torch.zeros(2, 4, device="meta")
    },
    r"terminated: expected shape \(2, 3\), got \(3,\)": {"terminated": torch.zeros(3)},
    "terminated: expected bool, .*, got torch.int64": {"terminated": torch.zeros(2, 3).long()},
    "terminated: expected only 0 and 1, got 0.5": {"terminated": torch.full((2, 3), 0.5)},
    "truncated: expected only 0 and 1, got nan": {"truncated": torch.full((2, 3), math.nan)},
    r"truncated: expected shape \(2, 3\), got \(2, 4\)": {"truncated": torch.zeros(2, 4)},
    "mask: expected only 0 and 1": {"mask": torch.full((2, 3), -1.0)},
    r"mask: expected shape \(2, 3\), got \(2, 1\)": {"mask": torch.zeros(2, 1)},
    "bootstrap: expected together with truncated": {"bootstrap": torch.zeros(2, 3)},
    "bootstrap: expected .*, got torch.bool": {
        "truncated": torch.zeros(2, 3), "bootstrap": torch.zeros(2, 3).bool()
    },
    r"gamma: expected a finite number in \[0, 1\], got 1.1": {"gamma": 1.1},
    "gamma: expected a finite number .*, got nan": {"gamma": math.nan},
    r"lam: expected a finite number in \[0, 1\], got -0.1": {"lam": -0.1},
    "gamma: expected a number, got str": {"gamma": "0.9"},
    "lam: expected a number, got NoneType": {"lam": None},
    "lam: expected a number, got Tensor": {"lam": torch.tensor(0.9)},
    "backend: expected None or one of .*, got 'opencl'": {"backend": "opencl"},
    "backend: 'cpu' takes float32 and bfloat16": {
        "rewards": torch.zeros(2, 3).double(), "backend": "cpu"
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    require("cpu")
    x = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 4), "terminated": torch.zeros(2, 3)}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.gae(**(x | BAD[message]))


BAD_SUPPORT = {
    r"supported: expected shape \(2, 3\), got \(2, 4\)": {"supported": torch.zeros(2, 4)},
    "supported: expected only 0 and 1": {"supported": torch.full((2, 3), 2.0)},
    "v_min: expected a finite number, got nan": {"v_min": math.nan},
    "v_min: expected a number, got Tensor": {"v_min": torch.zeros(2, 3)},
    "rewards: expected .*, got torch.int64": {"rewards": torch.zeros(2, 3).long()},
    r"values: expected shape \(2, 4\), got \(2, 3\)": {"values": torch.zeros(2, 3)},
    r"terminated: expected shape \(2, 3\), got \(2,\)": {"terminated": torch.zeros(2)},
    "mask: expected bool, .*, got torch.int32": {"mask": torch.zeros(2, 3).int()},
}


@pytest.mark.parametrize("message", BAD_SUPPORT)
def test_bad_input_of_supported_gae_is_refused_by_name(message):
    x = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 4), "supported": torch.ones(2, 3)}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.supported_gae(**({"v_min": -1.0} | x | BAD_SUPPORT[message]))
