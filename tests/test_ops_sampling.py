"""`sample_tokens`: every backend draws what float64 draws, and only what can be drawn."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import BACKENDS, assert_as_good_as_torch, layouts, poisoned, require

from alignkit import ops

SIZES = [(0, 5), (1, 1), (3, 1), (2, 2), (3, 31), (3, 33), (3, 1023), (3, 1024), (3, 1025),
         (2, 5000)]  # fmt: skip
DRAWS = [b for b in BACKENDS if b in ("reference", "cpu", "triton")]


def case(N, V, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(N, V, generator=g)).to(dtype), torch.rand(N, generator=g)


def assert_drawn_right(ids, logits, uniforms, temperature=1.0):
    """The id that float64 draws, but where the number lies within rounding of a boundary."""
    probs = (logits.double().cpu() / temperature).softmax(-1)
    after = probs.cumsum(-1).gather(1, ids.cpu()[:, None])[:, 0]
    drawn = probs.gather(1, ids.cpu()[:, None])[:, 0]
    assert (drawn > 0).all()
    assert (uniforms.cpu() < after + 1e-5).all() and (uniforms.cpu() > after - drawn - 1e-5).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("backend", DRAWS)
def test_agrees_with_float64(backend, dtype, temperature):
    device, logps = require(backend), []
    for seed, (N, V) in enumerate(SIZES):
        logits, uniforms = case(N, V, seed, dtype)
        with poisoned():
            ids, found = ops.sample_tokens(logits.to(device), uniforms.to(device),
                                           temperature=temperature, backend=backend)  # fmt: skip
        assert ids.shape == found.shape == (N,)
        assert ids.dtype == torch.int64 and found.dtype == torch.float32
        assert_drawn_right(ids, logits, uniforms, temperature)
        torchs, exact = (
            (x / temperature).log_softmax(-1).gather(1, ids.cpu()[:, None])[:, 0]
            for x in (logits.float(), logits.double()))
        logps.append((found, torchs, exact))
    assert_as_good_as_torch(logps)


@pytest.mark.parametrize("backend", DRAWS)
def test_pieces_of_the_interval_by_hand(backend):
    device = require(backend)
    uniforms = torch.tensor([0.0, 0.249, 0.25, 0.499, 0.5, 0.999, 1 - 2**-24], device=device)
    logits = torch.tensor([[0.25, 0.25, 0.0, 0.5]], device=device).log().expand(7, 4)
    ids, logps = ops.sample_tokens(logits, uniforms, backend=backend)
    assert ids.tolist() == [0, 0, 1, 1, 3, 3, 3]
    expected = torch.tensor([0.25] * 4 + [0.5] * 3).log()
    torch.testing.assert_close(logps.cpu(), expected)


@pytest.mark.parametrize("backend", DRAWS)
def test_what_cannot_be_drawn_is_never_drawn(backend):
    device = require(backend)
    V = 300 if backend == "triton" else 3000
    logits = torch.full((3, V), -math.inf)
    possible = [0, V // 2, V - 2]
    logits[torch.arange(3), torch.tensor(possible)] = torch.tensor([-50.0, 0.0, 80.0])
    for u in (0.0, 0.5, 1 - 2**-24):
        ids, logps = ops.sample_tokens(logits.to(device), torch.full((3,), u, device=device),
                                       backend=backend)  # fmt: skip
        assert ids.tolist() == possible and logps.tolist() == [0, 0, 0]


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-100, 100, width=32) | st.just(-math.inf), min_size=1, max_size=40),
    u=st.floats(0, 1, width=32, exclude_max=True),
    data=st.data(),
)
def test_any_row_draws_what_it_may(logits, u, data):
    require("cpu")
    logits[data.draw(st.integers(0, len(logits) - 1))] = 0.0  # not all of them -inf
    x, uniforms = torch.tensor([logits]), torch.tensor([u])
    for backend in ("cpu", "reference"):
        ids, _ = ops.sample_tokens(x, uniforms, backend=backend)
        before = x.double().softmax(-1).cumsum(-1)[0]
        i = int(ids[0])
        assert logits[i] > -math.inf
        assert (before[i - 1] if i else 0) - 1e-5 < u < before[i] + 1e-5


@pytest.mark.parametrize("backend", DRAWS)
def test_views_are_read_as_they_look(backend):
    device = require(backend)
    logits, uniforms = (x.to(device) for x in case(4, 6, 0))
    expected = ops.sample_tokens(logits, uniforms, backend=backend)
    for name, view in layouts(logits):
        for ours, theirs in zip(ops.sample_tokens(view, uniforms, backend=backend), expected,
                                strict=True):  # fmt: skip
            assert torch.equal(ours, theirs), name
    spread = torch.stack([uniforms, uniforms + 0.5], 1)[:, 0]
    assert torch.equal(ops.sample_tokens(logits, spread, backend=backend)[0], expected[0])


@pytest.mark.parametrize("backend", DRAWS)
def test_same_bits_on_every_repeat(backend):
    device = require(backend)
    logits, uniforms = (x.to(device) for x in case(5, 5000, 3))
    first, again = (ops.sample_tokens(logits, uniforms, backend=backend) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_same_bits_with_more_threads():
    require("cpu")
    logits, uniforms = case(16, 20_000, 3)
    first = ops.sample_tokens(logits, uniforms, backend="cpu")
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        again = ops.sample_tokens(logits, uniforms, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", DRAWS)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_row_without_a_distribution_is_refused(backend, broken):
    device = require(backend)
    if device.type == "cuda":
        pytest.skip("a GPU asserts, and is then of no use to the other tests")
    logits, uniforms = torch.zeros(2, 5), torch.full((2,), 0.5)
    logits[1, 3] = broken
    for wrong in (logits, torch.full((2, 5), -math.inf)):
        with pytest.raises(ValueError, match="^logits: expected rows with a finite log-sum-exp"):
            ops.sample_tokens(wrong, uniforms, backend=backend)


@pytest.mark.parametrize("change, error, message", [
    ({"uniforms": torch.tensor([0.5, 1.0])}, ValueError, r"uniforms: expected numbers in \[0, 1\)"),
    ({"uniforms": torch.tensor([0.5, math.nan])}, ValueError, "uniforms: expected numbers"),
    ({"uniforms": torch.tensor([0.5])}, ValueError, r"uniforms: expected shape \(2,\)"),
    ({"uniforms": torch.tensor([0.5, 0.5]).bfloat16()}, TypeError, "uniforms: expected float32"),
    ({"logits": torch.zeros(3)}, ValueError, r"logits: expected shape \(N, V\)"),
    ({"logits": torch.zeros(2, 0)}, ValueError, "logits: expected at least one token"),
    ({"logits": torch.zeros(2, 3).long()}, TypeError, "logits: expected float32"),
    ({"temperature": 0.0}, ValueError, "temperature: expected > 0"),
    ({"backend": "cuda"}, ValueError, "backend: expected None or one of"),
])  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    right = {"logits": torch.zeros(2, 3), "uniforms": torch.rand(2), "temperature": 1.0}
    with pytest.raises(error, match=f"^{message}"):
        ops.sample_tokens(**(right | change))


def test_a_draw_has_no_gradient():
    logits, uniforms = case(2, 4, 0)
    ids, logps = ops.sample_tokens(logits.requires_grad_(), uniforms)
    assert not ids.requires_grad and not logps.requires_grad


def test_rows_may_share_memory():
    require("cpu")
    logits = torch.zeros(1, 4).expand(2, 4)
    ids, _ = ops.sample_tokens(logits, torch.tensor([0.1, 0.9]), backend="cpu")
    assert ids.tolist() == [0, 3]
