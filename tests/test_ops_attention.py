"""`ops.attention`: operator and cache against the formula in float64."""

import pytest
import torch
from ops_cases import poisoned, require

from alignkit.ops.attention import RotaryCache, rotary_attention, rotary_attention_reference

BACKENDS = ["reference", "cpu"]
SHAPES = [(1, 1, 1, 1, 16), (3, 17, 4, 2, 16), (2, 33, 6, 2, 48), (2, 64, 3, 1, 64)]  # B, n, H, G, D


def inputs(B, n, H, G, D, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randn(rows, n, D // 2, generator=generator).repeat(1, 1, 2)
    return {"qkv": torch.randn(B, n, H + 2 * G, D, generator=generator), "cos": angles.cos(),
            "sin": angles.sin(), "heads": H, "scale": D**-0.5}


def left_padding(B, n):
    return torch.arange(n) >= torch.arange(B)[:, None] * n // (2 * B)


def as_dtype(x, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in x.items()}


def out_and_gradient(f, x, grad_out, **options):
    leaf = x["qkv"].detach().requires_grad_()
    out = f(**(x | {"qkv": leaf}), **options)
    return out, torch.autograd.grad(out, leaf, grad_out.to(out.dtype))[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_float64(backend, shape, padded):
    require(backend)
    B, n, H, G, D = shape
    x = inputs(*shape, rows=B if padded else 1)
    x |= {"mask": left_padding(B, n)} if padded else {}
    grad_out = torch.randn(B, n, H, D)
    exact = out_and_gradient(rotary_attention_reference, as_dtype(x, torch.float64), grad_out)
    with poisoned():
        found = out_and_gradient(rotary_attention, x, grad_out, backend=backend)
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), wanted, atol=2e-5, rtol=1e-5)


def test_the_formula_by_hand():
    "Two tokens of one head, turned by 0 and by a right angle: the second sees e^0 and e^1."
    qkv = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [3.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [0.0, 5.0]]]])
    cos, sin = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    out = rotary_attention(qkv, cos, sin, heads=1, scale=1.0)[0, :, 0]
    share = 1 / (1 + torch.tensor(1.0).exp())
    torch.testing.assert_close(out, torch.stack([torch.tensor([3.0, 0.0]),
                                                 torch.stack([3 * share, 5 * (1 - share)])]))


def test_who_may_see_nothing_reads_zeros():
    x = inputs(2, 5, 2, 1, 16) | {"mask": torch.tensor([[False] * 5, [False, False, True, True, True]])}
    out, grad = out_and_gradient(rotary_attention, x, torch.ones(2, 5, 2, 16))
    assert not out[0].any() and not out[1, :2].any() and out[1, 2:].any()
    assert not grad[0].any() and grad.isfinite().all()


def test_every_number_of_threads_gives_the_same_bits(monkeypatch):
    x, grad_out = inputs(8, 33, 4, 4, 16), torch.randn(8, 33, 4, 16)
    alone = out_and_gradient(rotary_attention, x, grad_out)
    monkeypatch.setattr("alignkit.ops.dispatch.PARALLEL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for one, three in zip(alone, out_and_gradient(rotary_attention, x, grad_out), strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("shape", [(3, 80, 4, 2, 16), (2, 80, 2, 2, 6)])  # 6: not the kernel's
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_read_in_portions(shape, padded):
    B, n, H, G, D = shape
    x = inputs(*shape)
    mask = left_padding(B, n) if padded else None
    wanted = rotary_attention_reference(**x, mask=mask)
    cache, found, rows = RotaryCache(B, G, D, n), [], torch.arange(B)
    for start, end in ((0, 70), (70, 71), (71, 79), (79, 80)):
        found.append(cache.attend(
            x["qkv"][rows, start:end], x["cos"][:, start:end], x["sin"][:, start:end], heads=H,
            scale=x["scale"], mask=None if mask is None else mask[rows, :end]))
        expected = wanted[rows, start:end]
        seen = torch.ones_like(expected, dtype=torch.bool)
        if padded:
            seen = mask[rows, start:end, None, None].expand_as(expected)
        torch.testing.assert_close(found[-1][seen], expected[seen], atol=2e-5, rtol=0)
        rows = rows[[1, 0, 1]] if start == 70 else rows
        if start == 70:
            cache.select(torch.tensor([1, 0, 1]))


def test_no_rows_are_read_token_by_token():
    x, cache = inputs(0, 3, 4, 2, 16), RotaryCache(0, 2, 16, 3)
    for t in range(3):
        out = cache.attend(x["qkv"][:, t : t + 1], x["cos"][:, t : t + 1], x["sin"][:, t : t + 1], heads=4,
                           scale=1.0)
        assert out.shape == (0, 1, 4, 16)


@pytest.mark.parametrize("change, message", [
    ({"heads": 3}, r"heads: expected H of the 8 = H \+ 2G heads in qkv, a multiple of G, got 3"),
    ({"cos": torch.zeros(1, 4, 16)}, r"cos: expected shape \(1, 5, 16\), got \(1, 4, 16\)"),
    ({"qkv": torch.zeros(2, 5, 16)}, r"qkv: expected shape \(B, n, H \+ 2G, D\)"),
    ({"mask": torch.ones(2, 4)}, r"mask: expected shape \(2, 5\), got \(2, 4\)")])
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        rotary_attention(**(inputs(2, 5, 4, 2, 16) | change))
