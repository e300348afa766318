"""`token_logps`: every backend against float64, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    BACKENDS,
    KERNELS,
    assert_as_good_as_torch,
    layouts,
    poisoned,
    require,
)
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit import ops
from alignkit.ops import dispatch, logprobs
from alignkit.ops.logprobs import IGNORE

SIZES = [(0, 5), (1, 1), (3, 1), (2, 2), (3, 15), (3, 16), (3, 17), (5, 31), (5, 33), (3, 1023),
         (3, 1024), (3, 1025), (2, 5000)]  # fmt: skip
LOGPS = [b for b in BACKENDS if b in ("reference", "cpu", "triton")]
COMPILED = [b for b in KERNELS if b in ("cpu", "triton")]


def case(N, V, seed, dtype=torch.float32, scale=4.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(N, V, generator=g) * scale).to(dtype)
    return logits, torch.randint(0, V, (N,), generator=g)


def with_gradient(f, logits, ids, weights, **kw):
    """Outputs of f, and the gradient of a random combination of log-probability and entropy."""
    logits = logits.detach().clone().requires_grad_()
    out = f(logits, ids, **kw)
    ((out.logps * weights[0]).sum() + (out.entropy * weights[1]).sum()).backward()
    return out.logps.detach(), out.entropy.detach(), logits.grad


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("backend", LOGPS)
def test_agrees_with_float64(backend, dtype, temperature):
    device, outputs, gradients = require(backend), [], []
    for seed, (N, V) in enumerate(SIZES):
        logits, ids = case(N, V, seed, dtype)
        weights = torch.randn(2, N, generator=torch.Generator().manual_seed(seed))
        kw = {"temperature": temperature}
        with poisoned():
            ours = with_gradient(ops.token_logps, logits.to(device), ids.to(device),
                                 weights.to(device), backend=backend, **kw)  # fmt: skip
        torchs = with_gradient(ops.token_logps_reference, logits, ids, weights, **kw)
        exact = with_gradient(
            ops.token_logps_reference, logits.double(), ids, weights.double(), **kw
        )
        assert ours[0].shape == ours[1].shape == (N,) and ours[2].dtype == dtype
        assert ours[0].dtype == ours[1].dtype == torch.float32
        *results, gradient = zip(ours, torchs, exact, strict=True)
        outputs += results
        gradients.append(gradient)
    assert_as_good_as_torch(outputs)
    assert_as_good_as_torch(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("backend", COMPILED)
def test_the_gradient_points_the_right_way(backend, dtype):
    device = require(backend)
    logits, ids = case(6, 500, 1, dtype)
    weights = torch.randn(2, 6)
    *_, ours = with_gradient(ops.token_logps, logits.to(device), ids.to(device), weights.to(device),
                             backend=backend)  # fmt: skip
    *_, exact = with_gradient(ops.token_logps_reference, logits.double(), ids, weights.double())
    ours, exact = ours.double().cpu().flatten(), exact.flatten()
    rounding = torch.finfo(dtype).eps
    assert torch.cosine_similarity(ours, exact, 0) > 1 - rounding
    assert abs(ours.norm() / exact.norm() - 1) < rounding


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-100, 100, width=32) | st.just(-math.inf), min_size=2, max_size=40),
    data=st.data(),
)
def test_any_row_agrees_with_float64(logits, data):
    require("cpu")
    logits[data.draw(st.integers(0, len(logits) - 1))] = 0.0  # not all of them -inf
    ids = torch.tensor([data.draw(st.integers(0, len(logits) - 1))])
    x = torch.tensor([logits])
    ours = ops.token_logps(x, ids, backend="cpu")
    torchs = ops.token_logps_reference(x, ids)
    exact = ops.token_logps_reference(x.double(), ids)
    assert torch.equal(ours.logps.isinf(), exact.logps.isinf())
    assert_as_good_as_torch(zip(ours[:2], torchs[:2], exact[:2], strict=True))


@pytest.mark.parametrize("backend", LOGPS)
def test_a_row_computed_by_hand(backend):
    device = require(backend)
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, 1.0]], device=device)
    ids = torch.tensor([1, 0], dtype=torch.int32, device=device)
    out = ops.token_logps(logits, ids, eps_beta=0.6, backend=backend)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    torch.testing.assert_close(out.logps.cpu(), torch.tensor([math.log(0.75), math.log(0.5)]))
    torch.testing.assert_close(out.entropy.cpu(), torch.tensor([entropy, math.log(2.0)]))
    assert out.supported.tolist() == [True, False]
    assert ops.token_logps(logits, ids, backend=backend).supported is None


@pytest.mark.parametrize("backend", LOGPS)
def test_ignored_ids_give_zero_zero_true_and_no_gradient(backend):
    device = require(backend)
    logits = torch.full((2, 3), math.nan, device=device, requires_grad=True)
    ids = torch.full((2,), -100, device=device)
    out = ops.token_logps(logits, ids, eps_beta=0.9, backend=backend)
    assert out.logps.tolist() == out.entropy.tolist() == [0, 0]
    assert out.supported.all()
    (out.logps + out.entropy).sum().backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("backend", LOGPS)
def test_infinities_and_nan_do_what_log_softmax_does(backend):
    device = require(backend)
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[-inf, 0, 1], [inf, 0, 1], [-inf, -inf, -inf], [nan, 0, 1], [0, -1e30, 1]])
    for chosen in range(3):
        ids = torch.full((5,), chosen)
        out = ops.token_logps(rows.to(device), ids.to(device), backend=backend)
        expected = torch.log_softmax(rows, -1)[:, chosen]
        torch.testing.assert_close(out.logps.cpu(), expected, equal_nan=True)
        assert out.entropy.isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("backend", COMPILED)
def test_masked_vocabulary_has_finite_gradients(backend):
    device = require(backend)
    logits, ids = case(4, 40, 2)
    logits[:, ::3] = -math.inf
    logits[:, 1] = torch.finfo(torch.float32).min
    ids = torch.tensor([1, 2, 4, 5])
    weights = torch.tensor([[1.0, -2.0, 0.5, 1.0], [1.0, 1.0, -1.0, 0.0]])
    ours = with_gradient(ops.token_logps, logits.to(device), ids.to(device), weights.to(device),
                         backend=backend)  # fmt: skip
    exact = with_gradient(ops.token_logps_reference, logits.double(), ids, weights.double())
    assert ours[2].isfinite().all()
    torch.testing.assert_close(ours[2].double().cpu(), exact[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", LOGPS)
def test_a_masked_beginning_does_not_overflow(backend):
    """The lowest float divided by a temperature below 1 is -inf, a block before the others."""
    device = require(backend)
    logits, ids = case(2, 5000, 9)
    logits[:, :4200] = torch.finfo(torch.float32).min
    ids[:] = 4500
    out = ops.token_logps(logits.to(device), ids.to(device), temperature=0.5, backend=backend)
    exact = ops.token_logps_reference(logits.double(), ids, temperature=0.5)
    torch.testing.assert_close(out.logps.double().cpu(), exact.logps, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out.entropy.double().cpu(), exact.entropy, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", LOGPS)
def test_large_vocabularies_in_bfloat16_keep_their_support(backend):
    device = require(backend)
    N = 4 if backend == "triton" else 64
    logits, ids = case(N, 32000, 3, torch.bfloat16, scale=3.0)
    exact = ops.token_logps_reference(logits.double(), ids).logps
    eps_beta = exact.exp().median().item()
    out = ops.token_logps(logits.to(device), ids.to(device), eps_beta=eps_beta, backend=backend)
    assert (out.logps.double().cpu() - exact).abs().max() <= 1e-5
    clear = (exact - math.log(eps_beta)).abs() > 1e-5
    assert torch.equal(out.supported.cpu()[clear], (exact > math.log(eps_beta))[clear])
    assert 0 < out.supported.sum() < N


def test_entropy_of_large_logits_does_not_cancel():
    logits = torch.tensor([[1e4, 1e4 - 1, 1e4 - 2]])
    exact = ops.token_logps_reference(logits.double(), torch.tensor([0])).entropy
    got = ops.token_logps(logits, torch.tensor([0])).entropy
    assert (got - exact).abs() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", COMPILED)
def test_views_are_read_as_what_they_show(backend):
    device = require(backend)
    logits, ids = (x.to(device) for x in case(4, 40, 4))
    expected = ops.token_logps(logits, ids, backend=backend)
    rows_apart = torch.full((4, 2, 40), math.nan, device=device)
    rows_apart[:, 1] = logits
    views = [*layouts(logits), ("rows apart", rows_apart[:, 1]), ("ids", logits)]
    for name, view in views:
        got = ops.token_logps(view, ids, backend=backend)
        assert torch.equal(got.logps, expected.logps), name
        assert torch.equal(got.entropy, expected.entropy), name
        view = view.detach().requires_grad_()
        ops.token_logps(view, ids, backend=backend).logps.sum().backward()
        assert torch.isfinite(view.grad).all(), name
    strided_ids = torch.stack([ids, -ids - 1], 1)[:, 0]
    assert torch.equal(ops.token_logps(logits, strided_ids, backend=backend).logps, expected.logps)


@pytest.mark.parametrize("backend", COMPILED)
def test_same_bits_on_every_repeat(backend):
    device = require(backend)
    (logits, ids), (other, _) = case(5, 3000, 5), case(5, 3000, 6)
    weights = torch.ones(2, 5, device=device)
    run = lambda x: with_gradient(  # noqa: E731
        ops.token_logps, x.to(device), ids.to(device), weights, backend=backend
    )
    first, _, again = run(logits), run(other), run(logits)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_from_any_number_of_threads(monkeypatch, dtype):
    require("cpu")
    logits, ids = case(7, 3000, 5, dtype)
    run = lambda: with_gradient(ops.token_logps, logits, ids, torch.ones(2, 7), backend="cpu")  # noqa: E731
    alone = run()
    monkeypatch.setattr(dispatch, "PARALLEL", 1)
    for threads in (2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert all(map(torch.equal, alone, run()))


@pytest.mark.parametrize("wanted", ["logps", "entropy"])
@pytest.mark.parametrize("backend", COMPILED)
def test_one_output_alone_has_a_gradient(backend, wanted):
    device = require(backend)
    logits, ids = case(3, 20, 7)
    exact = logits.double().requires_grad_()
    ours = logits.to(device).requires_grad_()
    getattr(ops.token_logps(ours, ids.to(device), backend=backend), wanted).sum().backward()
    getattr(ops.token_logps_reference(exact, ids), wanted).sum().backward()
    torch.testing.assert_close(ours.grad.double().cpu(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [ops.token_logps_reference, ops.token_logps])
def test_gradcheck(op):
    logits, ids = case(3, 7, 8, torch.float64)
    ids[1] = -100
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op(x, ids, temperature=0.7)[:2], (logits,))


BAD = {
    r"logits: expected shape \(N, V\), got \(2, 3, 4\)": {"logits": torch.zeros(2, 3, 4)},
    "logits: expected float32, .*, got torch.int64": {"logits": torch.zeros(2, 4).long()},
    "logits: expected at least one token a row": {"logits": torch.zeros(2, 0)},
    r"ids: expected shape \(2,\), got \(3,\)": {"ids": torch.zeros(3).long()},
    "ids: expected int64, int32, got torch.float32": {"ids": torch.zeros(2)},
    "ids: expected -100 or 0 <= id < 4, got 4": {"ids": torch.tensor([0, 4])},
    "ids: expected -100 or 0 <= id < 4, got -1": {"ids": torch.tensor([0, -1])},
    "ids: expected a tensor on cpu, got one on meta": {"ids": torch.zeros(2, device="meta").long()},
    "temperature: expected > 0, got 0": {"temperature": 0},
    "temperature: expected a finite number, got inf": {"temperature": math.inf},
    "eps_beta: expected below 1": {"eps_beta": 1.0},
    r"eps_beta: expected a finite number in \[0, 1\], got 1.5": {"eps_beta": 1.5},
    r"eps_beta: expected a finite number in \[0, 1\], got nan": {"eps_beta": math.nan},
    "backend: expected None or one of .*, got 'cuda'": {"backend": "cuda"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    x = {"logits": torch.zeros(2, 4), "ids": torch.zeros(2).long()} | BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        ops.token_logps(**x)


# ---- from hidden states ----------------------------------------------------------------


class Largest(TorchDispatchMode):
    "Remembers the largest tensor that anything produced."

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def linear_case(N=50, D=6, V=40, dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, D, dtype=dtype, requires_grad=True) for n in (N, V))
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    ids = torch.randint(V, (N,))
    ids[::7] = IGNORE
    return hidden, weight, bias, ids


@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_in_chunks_it_is_the_operator_on_the_logits(monkeypatch, rows):
    monkeypatch.setattr(logprobs, "CHUNK", 40 * rows)
    hidden, weight, bias, ids = linear_case()
    options = {"bias": bias, "temperature": 0.7, "eps_beta": 0.02}
    grad = torch.randn(2, 50, dtype=torch.float64)
    results = []
    for f in (ops.linear_token_logps, ops.linear_token_logps_reference):
        found = f(hidden, weight, ids, **options)
        loss = (grad * torch.stack([found.logps, found.entropy])).sum()
        results.append([*found, *torch.autograd.grad(loss, (hidden, weight, bias))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    assert results[0][2][::7].all() and not results[0][2].all()


def test_float32_is_as_exact_as_torch_and_frozen_weights_get_no_gradient():
    hidden, weight, _, ids = linear_case(V=5000, D=64, dtype=torch.float32)
    exact = ops.linear_token_logps_reference(hidden.double(), weight.double(), ids)
    weight.requires_grad_(False)
    found = ops.linear_token_logps(hidden, weight, ids)
    plain = torch.log_softmax(hidden @ weight.T, -1).gather(
        1, ids.clamp(min=0)[:, None])[:, 0].where(ids != IGNORE, 0)
    ours, theirs = ((x.double() - exact.logps).abs().max() for x in (found.logps, plain))
    assert ours <= 2 * theirs
    found.logps.sum().backward()
    assert weight.grad is None and hidden.grad[1].any() and not hidden.grad[0].any()


def test_the_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", 8 * 4000)
    hidden, weight, _, ids = linear_case(N=512, V=4000, dtype=torch.float32)
    with Largest() as seen:
        found = ops.linear_token_logps(hidden, weight.detach(), ids)
        (found.logps.sum() + found.entropy.sum()).backward()
    assert 4000 <= seen.numel <= max(8 * 4000, weight.numel())


def test_nothing_chosen_anywhere():
    hidden, weight, _, ids = linear_case(dtype=torch.float32)
    found = ops.linear_token_logps(hidden, weight, ids.fill_(IGNORE), eps_beta=0.1)
    assert not found.logps.any() and not found.entropy.any() and found.supported.all()


@pytest.mark.parametrize("change, name", [
    ({"hidden": torch.randn(50)}, "hidden"), ({"weight": torch.randn(40, 5)}, "weight"),
    ({"weight": torch.randn(40, 6).bfloat16()}, "weight"), ({"bias": torch.randn(6)}, "bias"),
    ({"ids": torch.zeros(49).long()}, "ids"), ({"ids": torch.full((50,), 40)}, "ids"),
    ({"temperature": 0.0}, "temperature"), ({"eps_beta": 1.0}, "eps_beta")])
def test_out_of_contract_hidden_states_are_refused_by_name(change, name):
    hidden, weight, bias, ids = linear_case(dtype=torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "ids": ids, "bias": bias} | change
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        ops.linear_token_logps(**arguments)
