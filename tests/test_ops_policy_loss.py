"""`clipped_policy_loss`: every backend, estimator and reduction against float64."""

import itertools
import math

import pytest
import torch
from ops_cases import BACKENDS, assert_as_good_as_torch, layouts, move, poisoned, require

from alignkit import ops
from alignkit.ops import dispatch
from alignkit.ops.policy_loss import ESTIMATORS, REDUCTIONS, policy_loss_gradient

SIZES = [(1, 1), (3, 5), (2, 33), (1, 513), (2, 600)]
LOSSES = [b for b in BACKENDS if b in ("reference", "cpu", "triton")]
COMPILED = LOSSES[1:]
COLUMNS = "logps", "old_logps", "advantages", "ref_logps"


def case(B, T, seed, per_row=False):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g)
    x = {"old_logps": old, "logps": old + 0.4 * torch.randn(B, T, generator=g),
         "ref_logps": old + 0.3 * torch.randn(B, T, generator=g)}  # fmt: skip
    x["advantages"] = torch.randn(*((B,) if per_row else (B, T)), generator=g)
    x["mask"] = torch.rand(B, T, generator=g) < 0.7
    x["mask"][-1] = B == 1  # a row of which nothing counts
    return x


def as_dtype(x, dtype):
    return {k: v.to(dtype) if k in COLUMNS and v is not None else v for k, v in x.items()}


def run(x, op=ops.clipped_policy_loss, **kw):
    """Loss and figures as one tensor, and the gradient."""
    logps = x["logps"].clone().requires_grad_()
    loss, figures = op(**(x | {"logps": logps}), **kw)
    (grad,) = torch.autograd.grad(3 * loss, logps)
    return torch.stack([loss.detach(), *figures]), grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kl", [None, *ESTIMATORS])
@pytest.mark.parametrize("backend", LOSSES)
def test_agrees_with_float64(backend, kl, reduction):
    device, values, grads = require(backend), [], []
    kw = {"reduction": reduction, "eps_low": 0.2, "eps_high": 0.28}
    kw |= {"beta": 0.3, "kl": kl} if kl else {}
    for seed, ((B, T), dtype, masked) in enumerate(
        itertools.product(SIZES, (torch.float32, torch.bfloat16), (True, False))):  # fmt: skip
        x = as_dtype(case(B, T, seed, per_row=seed % 2 == 1), dtype)
        x |= {"mask": x["mask"] if masked else None, "ref_logps": x["ref_logps"] if kl else None}
        with poisoned():
            value, grad = run(move(x, device), backend=backend, **kw)
        assert value.dtype == torch.float32 and grad.dtype == dtype
        op = ops.clipped_policy_loss_reference
        torchs, exact = run(x, op, **kw), run(as_dtype(x, torch.float64), op, **kw)
        size = value.abs().max().cpu().clamp(min=1)
        values.append((value.cpu() / size, torchs[0] / size, exact[0] / size))
        grads.append((grad, torchs[1], exact[1]))
    assert_as_good_as_torch(values)
    assert_as_good_as_torch(grads)


def by_the_formula(x, low, high, beta, kl, reduction):
    """Loss and figures, step by step in Python."""
    losses, figures = [[] for _ in x["logps"]], []
    for b, t in x["mask"].nonzero().tolist():
        new, old, ref, a = (float(x[name][b, t]) for name in
                            ("logps", "old_logps", "ref_logps", "advantages"))  # fmt: skip
        ratio, d = math.exp(new - old), ref - new
        estimate = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl]
        surrogate = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        losses[b].append(beta * estimate - surrogate)
        held = surrogate != ratio * a
        figures.append((held and ratio < 1, held and ratio > 1, estimate, old - new))
    flat = [loss for row in losses for loss in row]
    total = {"sum": sum(flat), "token": sum(flat) / len(flat),
             "sequence": sum(sum(row) / len(row) for row in losses if row) / len(losses)}[reduction]
    return [total, *(sum(column) / len(flat) for column in zip(*figures, strict=True))]


@pytest.mark.parametrize("kl", ESTIMATORS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reference_is_the_formula(kl, reduction):
    x = as_dtype(case(6, 7, 2), torch.float64)
    expected = by_the_formula(x, 0.3, 0.1, 0.5, kl, reduction)
    found, _ = run(x, eps_low=0.3, eps_high=0.1, beta=0.5, kl=kl, reduction=reduction)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kl", ESTIMATORS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_the_reference(kl, reduction):
    x = as_dtype(case(3, 4, 1), torch.float64)
    logps = x.pop("logps").requires_grad_()
    x["mask"][-1] = True

    def loss(logps):
        return ops.clipped_policy_loss_reference(logps, **x, beta=0.3, kl=kl,
                                                 reduction=reduction)[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (logps,))
    written = policy_loss_gradient(logps.detach(), x["old_logps"], x["advantages"], x["mask"],
                                   x["ref_logps"], 0.2, 0.2, 0.3, kl)  # fmt: skip
    if reduction == "sum":
        (found,) = torch.autograd.grad(loss(logps), logps)
        torch.testing.assert_close(written, found)


@pytest.mark.parametrize("backend", LOSSES)
def test_what_is_masked_does_no_harm(backend):
    device = require(backend)
    x = case(3, 6, 0)
    hole = ~x["mask"]
    clean = run(move(x, device), backend=backend, beta=0.1)
    for name in COLUMNS:
        for poison in (math.nan, math.inf, -math.inf):
            broken = x | {name: x[name].masked_fill(hole, poison)}
            for ours, theirs in zip(run(move(broken, device), backend=backend, beta=0.1), clean,
                                    strict=True):  # fmt: skip
                assert torch.equal(ours, theirs), name
    nothing = x | {"mask": torch.zeros(3, 6)}
    for reduction in REDUCTIONS:
        value, grad = run(move(nothing, device), backend=backend, reduction=reduction)
        assert not value.any() and not grad.any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_step_that_is_not_a_number_shows(backend):
    require(backend)
    x = case(2, 4, 0) | {"mask": None}
    for name in COLUMNS:
        broken = x | {name: x[name].index_fill(1, torch.tensor([2]), math.nan)}
        assert run(broken, backend=backend, beta=0.1)[0][0].isnan(), name
    far = x | {"logps": torch.zeros(2, 4), "old_logps": torch.full((2, 4), -200.0)}
    far["advantages"] = torch.tensor([1.0, -1.0])
    value, _ = run(far, backend=backend)
    assert value[0] == math.inf and value[2] == 0.5


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_a_small_distance_is_not_rounded_away(backend, kl):
    device = require(backend)
    ref = torch.tensor([[1e-4, -1e-4, 3e-3, 0.0999, 0.1001, -0.0999]])
    x = {"logps": torch.zeros(1, 6), "old_logps": torch.zeros(1, 6),
         "advantages": torch.zeros(1), "ref_logps": ref}  # fmt: skip
    for i in range(6):
        one = {k: v if k == "advantages" else v[:, i : i + 1] for k, v in x.items()}
        found, grad = run(move(one, device), backend=backend, beta=1.0, kl=kl)
        exact, slope = run(as_dtype(one, torch.float64), beta=1.0, kl=kl)
        torch.testing.assert_close(found[3].double().cpu(), exact[3], rtol=2e-6, atol=0)
        torch.testing.assert_close(grad.double().cpu(), slope, rtol=2e-6, atol=0)


def test_triton_adds_up_blocks(monkeypatch):
    require("triton")
    monkeypatch.setattr(dispatch.extension("triton.policy_loss"), "block_size", lambda T: 64)
    test_agrees_with_float64("triton", "k3", "sequence")


@pytest.mark.parametrize("backend", COMPILED)
def test_views_are_read_as_they_look(backend):
    x = move(case(4, 6, 0), require(backend))
    expected = run(x, beta=0.1, backend=backend)
    for name in (*COLUMNS, "mask"):
        for kind, view in layouts(x[name]):
            got = run(x | {name: view}, beta=0.1, backend=backend)
            assert all(map(torch.equal, got, expected)), (name, kind)


@pytest.mark.parametrize("backend", COMPILED)
def test_same_bits_on_every_repeat(backend):
    x = move(case(2, 600, 3), require(backend))
    first, again = (run(x, beta=0.1, backend=backend) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_same_bits_with_more_threads():
    require("cpu")
    x, before = case(5, 3000, 3), torch.get_num_threads()
    first = run(x, beta=0.1)
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(run(x, beta=0.1), first, strict=True))
    torch.set_num_threads(before)


def test_no_gradient_is_computed_that_nobody_wants():
    x = case(2, 3, 0)
    loss, figures = ops.clipped_policy_loss(**x)
    assert not loss.requires_grad
    x["logps"].requires_grad_()
    with torch.no_grad():
        assert not ops.clipped_policy_loss(**x)[0].requires_grad
    loss, figures = ops.clipped_policy_loss(**x)
    assert loss.requires_grad and not any(f.requires_grad for f in figures)


@pytest.mark.parametrize("change, error, message", [
    ({"old_logps": torch.zeros(2, 4)}, ValueError, r"old_logps: expected shape \(2, 3\)"),
    ({"advantages": torch.zeros(3)}, ValueError, r"advantages: expected shape \(2,\)"),
    ({"advantages": torch.zeros(2, 1)}, ValueError, r"advantages: expected shape \(2, 3\)"),
    ({"advantages": torch.zeros(2, 3).long()}, TypeError, "advantages: expected float32"),
    ({"mask": torch.full((2, 3), 0.5)}, ValueError, "mask: expected only 0 and 1"),
    ({"eps_low": 1.5}, ValueError, r"eps_low: expected a finite number in \[0, 1\], got 1.5"),
    ({"eps_high": -0.1}, ValueError, "eps_high: expected a finite number"),
    ({"beta": 0.1}, ValueError, "ref_logps: expected a tensor because beta is 0.1, got None"),
    ({"beta": 0.1, "ref_logps": torch.zeros(3)}, ValueError, "ref_logps: expected shape"),
    ({"kl": "k4"}, ValueError, "kl: expected one of k1, k2, k3, got 'k4'"),
    ({"reduction": "mean"}, ValueError, "reduction: expected one of token, sequence, sum"),
    ({"backend": "cuda"}, ValueError, "backend: expected None or one of"),
])  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    right = {"logps": torch.zeros(2, 3), "old_logps": torch.zeros(2, 3),
             "advantages": torch.zeros(2)}  # fmt: skip
    with pytest.raises(error, match=f"^{message}"):
        ops.clipped_policy_loss(**(right | change))
