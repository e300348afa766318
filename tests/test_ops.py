"""What holds for every operator: the registration, the choice of a backend, the compiler."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from ops_cases import DEVICES, require

import alignkit.ops.attention  # noqa: F401  registers `rotary_attention`
from alignkit import ops
from alignkit.ops import dispatch, logprobs

# products of torch's around a registered operator: `token_logps`, `attend`
COMPOSED = {"linear_token_logps", "attention_fusion"}
OPERATORS = [name for name in ops.__all__
             if f"{name}_reference" in ops.__all__ and name not in COMPOSED]
REGISTERED = [*OPERATORS, "token_logps_backward", "clipped_policy_loss_backward", "attend",
              "attend_backward", "rotary_attention", "rotary_attention_backward", "flags"]


def samples(name, kernel):
    """Arguments of the registered operator `alignkit::name`, every optional one given and not."""
    B, T, V = 3, 5, 7
    steps, values, flags = torch.randn(B, T), torch.randn(B, T + 1), torch.rand(B, T) < 0.5
    logits, ids = torch.randn(B, V), torch.tensor([0, -100, 6])
    if name == "gae":
        yield steps, values, flags, None, None, None, 0.9, 0.95, None
        yield steps, values.bfloat16(), flags, flags, steps, flags, 1.0, 1.0, "reference"
    if name == "supported_gae":
        yield steps, values, flags, None, None, -1.0, 0.9, 0.95, None
        yield steps.double(), values, flags, flags, flags, -1.0, 0.9, 0.95, None
    if name == "grouped_comparison":
        table = torch.randn(2, 3, 3, 2)
        yield table, None, None
        yield table.bfloat16(), torch.ones(2, 3).bool(), "reference"  # opcheck compares no NaN
    if name == "dual_gae":
        yield steps, steps, values, values, flags, None, None, 0.9, 0.95, 0.5, None
        yield (steps.bfloat16(), steps, values, values.bfloat16(), flags, flags, flags, 1.0, 1.0,
               0.0, "reference")  # fmt: skip
    if name == "grouped_advantage":
        rewards, starts = torch.randn(6), torch.tensor([0, 2, 2, 6])
        keys, mask = torch.tensor([3, 1, 3, 3, 0, 1]), torch.rand(6) < 0.5
        yield rewards, 3, None, None, "mean", "std", 1e-4, None, None
        yield rewards.bfloat16(), None, starts, None, "loo", "batch", 1e-4, mask, "reference"
        yield rewards, None, None, keys, "none", "none", 0.0, mask, kernel
    if name == "token_logps":
        yield logits, ids, 1.0, None
        yield logits.clone().requires_grad_(), ids.int(), 0.7, kernel
        yield logits.bfloat16().requires_grad_(), ids, 0.7, "reference"
    if name == "token_logps_backward":
        saved = logits.amax(1), (logits - logits.amax(1, True)).logsumexp(1)
        yield torch.randn(B), torch.randn(B), logits, ids, torch.rand(B), *saved, 1.0, None
    if name == "sample_tokens":
        yield logits, torch.rand(B), 1.0, None
        yield logits.bfloat16(), torch.rand(B), 0.7, kernel
        yield logits, torch.rand(B).double(), 0.7, "reference"
    if name == "clipped_policy_loss":
        some = torch.rand(B, T) < 0.5
        band = 0.2, 0.3
        yield steps, steps, steps[:, 0], None, None, *band, 0.0, "k3", "token", False, None
        yield (steps.clone().requires_grad_(), steps * 0.9, steps, some, steps * 1.1, *band, 0.1,
               "k3", "sequence", True, kernel)  # fmt: skip
        yield (steps.bfloat16().requires_grad_(), steps, steps[:, 0], some, steps, *band, 0.1,
               "k2", "sum", True, "reference")  # fmt: skip
    if name == "clipped_policy_loss_backward":
        yield steps, torch.rand(()), torch.tensor(3.0), None
        yield steps.T, torch.rand(()), torch.tensor(3.0), kernel
        yield steps.double(), torch.rand(()).double(), torch.tensor(3.0).double(), "reference"
    queries, seen, felt = torch.randn(B, 2, V), torch.randn(B, 4, V), torch.randn(B, 1, V)
    some = torch.tensor([True, False, True, True]).expand(B, 4)
    if name == "attend":
        leaves = [x.clone().requires_grad_() for x in (queries, seen, felt)]
        yield *leaves, None, None, None
        yield queries, seen.bfloat16().requires_grad_(), felt, some, some[:, :1], kernel
        yield queries, seen.double(), felt, some, None, "reference"
    if name == "attend_backward":
        saved = torch.randn(B, 2), torch.randn(B, 2, V), torch.randn(B, 2, 2), torch.randn(B, 2)
        yield *saved, queries, seen, felt, None, None, None
        yield *saved, queries, seen, felt.bfloat16(), some, None, "reference"
    qkv, angles = torch.randn(B, T, 8, 16), torch.randn(1, T, 16)
    rotary, backend = (angles.cos(), angles.sin()), kernel if kernel == "cpu" else None
    if name == "rotary_attention":
        yield qkv.clone().requires_grad_(), *rotary, None, 4, 0.25, backend
        yield (qkv[..., :6].bfloat16().requires_grad_(), *(x[..., :6] for x in rotary), flags, 4,
               1.0, None)  # fmt: skip
    if name == "rotary_attention_backward":
        yield torch.randn(B, T, 4, 16), qkv, *rotary, flags, torch.randn(B, T, 4), 4, 0.25, backend
    if name == "flags":
        yield flags.float(), "mask"


def test_the_list_of_operators_is_the_registry():
    assert set(OPERATORS) == {
        "gae", "supported_gae", "dual_gae", "token_logps", "sample_tokens", "grouped_advantage",
        "grouped_comparison", "clipped_policy_loss"}
    assert set(REGISTERED) == {n for n in dispatch._functions if "." not in n}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, device):
    kernel = "cpu" if device == "cpu" else "triton"
    require(kernel)
    op = getattr(torch.ops.alignkit, name).default
    with torch.device(device):
        cases = list(samples(name, kernel))
    for args in cases:
        torch.library.opcheck(op, args)


def compiled(f, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=True, backend=backend)


def all_operators(rewards, values, flags, logits, ids):
    advantages = ops.gae(rewards * 2, values, flags, 0.9, truncated=flags, mask=flags)
    floored, targets = ops.supported_gae(rewards, values, flags > 0, -2.0, mask=flags)
    both = ops.dual_gae(rewards, rewards * 2, values, values, flags, 0.9, 0.9, 0.5)[2]
    floored = floored + both
    out = ops.token_logps(logits * 0.5, ids, temperature=0.7, eps_beta=0.1)
    support = out.supported.float().sum()
    uniforms = torch.full(ids.shape, 0.5, device=ids.device)
    drawn, logps = ops.sample_tokens(logits, uniforms, temperature=0.7)
    support = support + drawn.float().sum() + logps.sum()
    compared = ops.grouped_advantage(rewards.flatten() * 2, ids=flags.flatten().long())
    pairs = rewards[:, :2].reshape(-1, 1, 1, 2) * 1.0
    support = support + ops.grouped_comparison(pairs)[1].float().sum()
    support = support + compared.sum() + ops.grouped_advantage(rewards[0], 1).sum()
    loss, figures = ops.clipped_policy_loss(out.logps[:, None], ids[:, None] * -1.0, out.entropy,
                                            mask=flags[:, :1])  # fmt: skip
    support = support + loss + figures.clipped_low
    query, square = logits[:, :2] * 1.0, logits[:2, :2] * 1.0
    fused, weights = ops.attention_fusion(query, query[:, None], query[:, None] * 2, square, square,
                                          square, heads=2, tactile_mask=flags[:, :1])  # fmt: skip
    support = support + fused.sum() + weights[..., 0].sum()
    return (advantages + floored + targets).sum() + (out.logps + out.entropy).sum() + support


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_serves_every_shape(device):
    require(device)
    f = compiled(all_operators)
    for B, T, V in [(2, 3, 5), (4, 9, 6), (3, 17, 11)]:
        with torch.device(device):
            x = (torch.randn(B, T), torch.randn(B, T + 1), (torch.rand(B, T) < 0.5).float())
            ids = torch.randint(0, V, (B,))
            logits = torch.randn(B, V).requires_grad_()
        same = logits.detach().clone().requires_grad_()
        expected, got = all_operators(*x, same, ids), f(*x, logits, ids)
        torch.testing.assert_close(got, expected)
        got.backward()
        expected.backward()
        torch.testing.assert_close(logits.grad, same.grad)
    if device == "cuda":  # it asserts, and is then of no use to the other tests
        return
    with pytest.raises(ValueError, match="mask: expected only 0 and 1|terminated: expected only"):
        f(x[0], x[1], x[2] + 0.5, logits, ids)


def head(hidden, weight, ids):
    out = ops.linear_token_logps(hidden * 2, weight, ids, temperature=0.7, eps_beta=0.1)
    return out.logps.sum() + out.entropy.sum() + out.supported.float().sum()


def test_a_head_read_in_chunks_compiles_as_one_graph(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", 18)  # several chunks
    f = compiled(head)
    for N, V, D in [(2, 5, 3), (7, 6, 9)]:
        ids = torch.randint(0, V, (N,))
        ids[0] = -100
        x = [torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_()]
        expected, got = head(*x, ids), f(*x, ids)
        torch.testing.assert_close(got, expected)
        for found, right in zip(*(torch.autograd.grad(y, x) for y in (got, expected)), strict=True):
            torch.testing.assert_close(found, right)


def test_meta_tensors_have_shapes_and_dtypes():
    meta = lambda *shape: torch.empty(*shape, device="meta", dtype=torch.bfloat16)  # noqa: E731
    flags = torch.empty(2, 3, device="meta", dtype=torch.bool)
    advantages = ops.gae(meta(2, 3), meta(2, 4), flags)
    assert advantages.shape == (2, 3) and advantages.dtype == torch.float32
    ids = torch.empty(2, device="meta", dtype=torch.int64)
    assert ops.token_logps(meta(2, 9), ids).entropy.shape == (2,)


@pytest.mark.parametrize("device", DEVICES)
def test_inductor_calls_the_kernels(device):
    require(device)
    f = compiled(lambda logits, ids: ops.token_logps(logits, ids).logps, "inductor")
    logits = torch.randn(3, 5, device=device).requires_grad_()
    ids = torch.randint(0, 5, (3,), device=device)
    f(logits, ids).sum().backward()
    (expected,) = torch.autograd.grad(ops.token_logps(logits, ids).logps.sum(), logits)
    assert torch.equal(logits.grad, expected)


def test_discount_may_change_under_the_compiler():
    f = compiled(lambda *x: ops.gae(*x))
    x = torch.randn(2, 3), torch.randn(2, 4), torch.zeros(2, 3)
    for gamma in (0.9, 0.8, 0.7):
        assert torch.equal(f(*x, gamma), ops.gae(*x, gamma))


def test_compiled_code_still_refuses_by_name():
    f = compiled(lambda logits, ids: ops.token_logps(logits, ids).logps)
    with pytest.raises(Exception, match=r"ids: expected -100 or 0 <= id < 4"):
        f(torch.zeros(2, 4), torch.tensor([0, 4]))


@pytest.fixture
def without(monkeypatch):
    """Make a compiled backend missing, as on a machine that could not build it."""
    caches = dispatch.extension, dispatch.problem, dispatch.warn_slow, dispatch._preferred

    def remove(name):
        monkeypatch.setitem(sys.modules, f"alignkit._{name}", None)
        for cache in caches:
            cache.cache_clear()

    yield remove
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_a_missing_extension_costs_time_and_one_warning(without):
    x = torch.randn(2, 3), torch.randn(2, 4), torch.zeros(2, 3)
    expected = ops.gae_reference(*x)
    without("cpu")
    with pytest.warns(RuntimeWarning, match=r"reference serves.*install a C\+\+ compiler"):
        assert torch.equal(ops.gae(*x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.gae(*x)
        ops.token_logps(torch.zeros(2, 3), torch.zeros(2).long())
        ops.gae(*x, backend="reference")
    with pytest.raises(RuntimeError, match="backend: 'cpu' is not usable here: not compiled"):
        ops.gae(*x, backend="cpu")
    problems = {b.name: b for b in ops.backends()}
    assert not problems["cpu"].usable and "install a C++ compiler" in problems["cpu"].problem
    assert problems["reference"].usable


def test_backends_say_why_not():
    assert [b.name for b in ops.backends()] == ["reference", "cpu", "cuda", "triton"]
    for backend in ops.backends():
        assert backend.usable or len(backend.problem) > 10


def test_float64_takes_the_reference():
    x = torch.randn(2, 3).double(), torch.randn(2, 4).double(), torch.zeros(2, 3)
    assert ops.gae(*x).dtype == torch.float64
    with pytest.raises(TypeError, match="backend: 'triton' takes float32 and bfloat16"):
        require("triton")
        ops.gae(*x, backend="triton")


def test_defining_an_operator_again_replaces_it():
    schema, fake = "test_again(Tensor x) -> Tensor", torch.empty_like
    dispatch.define(schema, lambda x: x + 1, fake)
    dispatch.define(schema, lambda x: x + 2, fake)
    assert torch.ops.alignkit.test_again(torch.zeros(1)) == 2
    del dispatch._functions["test_again"], dispatch._functions["test_again.fake"]


def python(code):
    """What a fresh interpreter prints, in which nobody has chosen Triton's interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout


def test_importing_operators_does_not_import_triton():
    assert python("import sys, alignkit.ops; print('triton' in sys.modules)").strip() == "False"


@pytest.mark.skipif(torch.cuda.is_available(), reason="only machines without a GPU interpret")
def test_triton_imported_too_early_is_explained():
    code = "from alignkit import ops; print(dict(ops.backends())['triton'])"
    assert "before alignkit's kernels" in python(f"import triton; {code}")
    assert python(code).strip() == ""
