"""Attention fusion: agreement, gradients, masks, layouts, refusals."""

import itertools
import math

import pytest
import torch
from ops_cases import BACKENDS, KERNELS, assert_as_good_as_torch, layouts, move, poisoned, require

from alignkit import ops
from alignkit.ops import fusion
from alignkit.ops.fusion import attend_gradient, attend_reference

TENSORS = ("query", "visual", "tactile", "w_q", "w_k", "w_v")
# (B, Nv, Nt, D, heads): the paper's two tokens, one sense alone, full and partial tiles, padding
SIZES = [(3, 1, 1, 8, 1), (1, 0, 3, 4, 2), (2, 17, 5, 12, 3), (2, 16, 16, 32, 4), (1, 37, 1, 40, 5),
         (2, 3, 30, 96, 2)]  # fmt: skip


def case(B, Nv, Nt, D, heads, seed=0, masked=True):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, D), (B, Nv, D), (B, Nt, D), (D, D), (D, D), (D, D)
    x = {name: torch.randn(shape, generator=g) for name, shape in zip(TENSORS, shapes, strict=True)}
    for name in ("w_q", "w_k", "w_v"):
        x[name] *= D**-0.5
    if masked:
        x["visual_mask"] = torch.rand(B, Nv, generator=g) < 0.7
        x["tactile_mask"] = torch.rand(B, Nt, generator=g) < 0.7
        if Nt:
            x["tactile_mask"][:, 0] = True
    return x


def as_dtype(x, dtype):
    return {k: v.to(dtype) if k in TENSORS else v for k, v in x.items()}


def run(x, heads, op=ops.attention_fusion, **kw):
    """Fused, weights, and the gradient of a weighted sum of both by every tensor."""
    leaves = {k: v.detach().clone().requires_grad_() if k in TENSORS else v for k, v in x.items()}
    fused, weights = op(**leaves, heads=heads, **kw)
    g = torch.Generator().manual_seed(9)
    loss = sum((y * torch.randn(y.shape, generator=g).to(y)).sum() for y in (fused, weights))
    return fused.detach(), weights.detach(), *torch.autograd.grad(loss, [leaves[k] for k in TENSORS])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_float64(backend, dtype, masked):
    device, cases = require(backend), [[] for _ in range(8)]
    for seed, (*size, heads) in enumerate(SIZES):
        x = as_dtype(case(*size, heads, seed, masked), dtype)
        with poisoned():
            found = run(move(x, device), heads, backend=backend)
        assert found[0].dtype == found[1].dtype == torch.float32
        assert all(g.dtype == dtype for g in found[2:])
        op = ops.attention_fusion_reference
        torchs, exact = run(x, heads, op), run(as_dtype(x, torch.float64), heads, op)
        for name, ours, theirs, truth in zip(cases, found, torchs, exact, strict=True):
            name.append((ours.cpu(), theirs, truth))
    for name in cases:
        assert_as_good_as_torch(name)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_point_where_the_reference_s_do(backend):
    device = require(backend)
    for *size, heads in SIZES[2:]:
        x = case(*size, heads)
        found = run(move(x, device), heads, backend=backend)[2:]
        exact = run(as_dtype(x, torch.float64), heads, ops.attention_fusion_reference)[2:]
        for ours, truth in zip(found, exact, strict=True):
            a, b = ours.double().cpu().flatten(), truth.flatten()
            assert torch.cosine_similarity(a, b, 0) > 1 - 1e-9
            assert (a - b).norm() < 1e-5 * b.norm()


def test_the_two_tokens_of_the_paper():
    x = as_dtype(case(5, 1, 1, 6, 1, masked=False), torch.float64)
    q, k = x["query"] @ x["w_q"].T, [x[n][:, 0] @ x["w_k"].T for n in ("visual", "tactile")]
    v = [x[n][:, 0] @ x["w_v"].T for n in ("visual", "tactile")]
    scores = [(q * key).sum(-1) / math.sqrt(6) for key in k]
    touch = torch.sigmoid(scores[1] - scores[0])
    fused, weights = ops.attention_fusion(**x)
    torch.testing.assert_close(weights[:, 0], torch.stack([1 - touch, touch], -1))
    torch.testing.assert_close(fused, (1 - touch)[:, None] * v[0] + touch[:, None] * v[1])


@pytest.mark.parametrize("heads", [1, 4])
def test_the_reference_is_multi_head_attention(heads):
    x = as_dtype(case(3, 6, 4, 16, heads), torch.float64)
    attention = torch.nn.MultiheadAttention(16, heads, bias=False, batch_first=True).double()
    attention.in_proj_weight.data = torch.cat([x["w_q"], x["w_k"], x["w_v"]])
    attention.out_proj.weight.data = torch.eye(16).double()
    tokens = torch.cat([x["visual"], x["tactile"]], 1)
    hidden = ~torch.cat([x["visual_mask"], x["tactile_mask"]], 1)
    expected, share = attention(x["query"][:, None], tokens, tokens, key_padding_mask=hidden,
                                average_attn_weights=False)  # fmt: skip
    fused, weights = ops.attention_fusion_reference(**x, heads=heads)
    torch.testing.assert_close(fused, expected[:, 0])
    torch.testing.assert_close(weights[..., 0], share[:, :, 0, :6].sum(-1))


def test_gradient_of_the_reference():
    x = as_dtype(case(2, 3, 2, 4, 2), torch.float64)
    masks = {k: x.pop(k) for k in ("visual_mask", "tactile_mask")}
    leaves = [x[k].requires_grad_() for k in TENSORS]
    assert torch.autograd.gradcheck(
        lambda *args: ops.attention_fusion_reference(*args, heads=2, **masks), leaves)


@pytest.mark.parametrize("masked", [False, True])
def test_the_written_gradient_is_autograd_s(masked):
    x = as_dtype(case(2, 5, 4, 6, 3, masked=masked), torch.float64)
    tokens = [torch.randn(2, 3, 6, dtype=torch.float64), x["visual"], x["tactile"]]
    tokens = [t.requires_grad_() for t in tokens]
    masks = x.get("visual_mask"), x.get("tactile_mask")
    context, weights, log_sum = attend_reference(*tokens, *masks)
    grads = torch.randn_like(context), torch.randn_like(weights)
    expected = torch.autograd.grad((context, weights), tokens, grads)
    mean = (grads[0] * context).sum(-1) + (grads[1] * weights).sum(-1)
    found = attend_gradient(log_sum, *grads, mean, *tokens, *masks)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_masked_does_no_harm(backend):
    device, x = require(backend), case(3, 6, 5, 8, 2)
    clean = run(move(x, device), 2, backend=backend)
    for name, poison in itertools.product(("visual", "tactile"), (math.nan, math.inf, -math.inf)):
        broken = x | {name: x[name].masked_fill(~x[f"{name}_mask"][..., None], poison)}
        found = run(move(broken, device), 2, backend=backend)
        for ours, theirs in zip(found, clean, strict=True):
            assert torch.equal(ours, theirs), name
    for name, position in (("visual", 3), ("tactile", 4)):
        assert not clean[position][~x[f"{name}_mask"].to(device)].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("Nv, Nt", [(3, 2), (0, 0)])
def test_where_nothing_is_left_the_result_is_zero(backend, Nv, Nt):
    device, x = require(backend), case(2, Nv, Nt, 8, 2)
    x["visual_mask"][0], x["tactile_mask"][0] = False, False
    fused, weights, *grads = run(move(x, device), 2, backend=backend)
    assert not fused[0].any() and not weights[0].any()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_neither_overflow_nor_vanish(backend):
    device, x = require(backend), case(2, 20, 20, 8, 1, masked=False)
    x["query"] *= 1e4
    fused, weights, *_ = run(move(x, device), 1, backend=backend)
    exact = ops.attention_fusion_reference(**as_dtype(x, torch.float64))
    assert weights.sum(-1).allclose(torch.ones((), device=device))
    torch.testing.assert_close(weights.double().cpu(), exact[1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_token_that_is_not_a_number_shows(backend):
    device, x = require(backend), case(2, 4, 3, 8, 2, masked=False)
    x["visual"][0, 2, 5] = math.nan
    fused, weights = ops.attention_fusion(**move(x, device), heads=2, backend=backend)
    assert fused[0].isnan().all() and weights[0].isnan().all() and fused[1].isfinite().all()


def test_views_are_read_as_they_look():
    require("cpu")
    x = case(4, 6, 5, 8, 2)
    expected = run(x, 2)
    rounding = {"atol": 1e-6, "rtol": 1e-6}  # torch multiplies a transposed matrix in another order
    for name in (*TENSORS, "visual_mask", "tactile_mask"):
        exactly = {"atol": 0, "rtol": 0} if name.startswith(("visual", "tactile")) else rounding
        for _, view in layouts(x[name].reshape(len(x[name]), -1)):
            view = view.unflatten(1, x[name].shape[1:])
            found = ops.attention_fusion(**(x | {name: view}), heads=2)
            for ours, theirs in zip(found, expected[:2], strict=True):
                torch.testing.assert_close(ours, theirs, **exactly)


def test_same_bits_on_every_repeat_and_with_more_threads():
    require("cpu")
    x, before = case(9, 1500, 500, 64, 4), torch.get_num_threads()
    tokens = torch.randn(9, 4, 64), x["visual"], x["tactile"], x["visual_mask"], x["tactile_mask"]
    assert fusion._threads(tokens) == before

    def both():
        context, weights, log_sum = torch.ops.alignkit.attend(*tokens, "cpu")
        given = log_sum, torch.ones_like(context), torch.ones_like(weights), log_sum
        grads = torch.ops.alignkit.attend_backward(*given, *tokens, "cpu")
        return context, weights, log_sum, *grads

    try:
        torch.set_num_threads(1)
        first = both()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(both(), first, strict=True))
    finally:
        torch.set_num_threads(before)


def test_tokens_of_two_kinds():
    require("cpu")
    x = case(2, 4, 3, 8, 2)
    expected = run(x | {"visual": x["visual"].bfloat16().float()}, 2)
    found = run(x | {"visual": x["visual"].bfloat16()}, 2)
    assert found[3].dtype == torch.bfloat16 and found[4].dtype == torch.float32
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=2e-2 if ours is found[3] else 1e-6,
                                   rtol=1e-2 if ours is found[3] else 1e-6)  # fmt: skip


@pytest.mark.parametrize("change, error, message", [
    ({"query": torch.zeros(2, 3, 4)}, ValueError, r"query: expected shape \(B, D\)"),
    ({"visual": torch.zeros(2, 4)}, ValueError, r"visual: expected shape \(B, N, D\)"),
    ({"visual": torch.zeros(2, 3, 5)}, ValueError, r"visual: expected shape \(2, 3, 4\)"),
    ({"tactile": torch.zeros(1, 3, 4)}, ValueError, r"tactile: expected shape \(2, 3, 4\)"),
    ({"tactile": torch.zeros(2, 3, 4).long()}, TypeError, "tactile: expected float32"),
    ({"w_k": torch.zeros(4, 3)}, ValueError, r"w_k: expected shape \(4, 4\)"),
    ({"visual_mask": torch.ones(2, 4)}, ValueError, r"visual_mask: expected shape \(2, 3\)"),
    ({"tactile_mask": torch.full((2, 1), 0.5)}, ValueError, "tactile_mask: expected only 0 and 1"),
    ({"heads": 3}, ValueError, "heads: expected a divisor of 4, got 3"),
    ({"heads": 0}, ValueError, "heads: expected a divisor of 4, got 0"),
    ({"backend": "metal"}, ValueError, "backend: expected None or one of"),
])  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    right = {"query": torch.zeros(2, 4), "visual": torch.zeros(2, 3, 4),
             "tactile": torch.zeros(2, 1, 4)} | {k: torch.zeros(4, 4) for k in TENSORS[3:]}  # fmt: skip
    with pytest.raises(error, match=f"^{message}"):
        ops.attention_fusion(**(right | change))
