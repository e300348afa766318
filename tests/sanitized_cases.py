"""Many small calls of every operator, to be watched by a sanitizer.

    sanitized_cases.py KERNELS CASES [SECONDS]

KERNELS is a compiled module to take the C++ kernels from (test_sanitize.py builds one for AddressSanitizer), or "cuda"
for what serves a GPU (benchmarks/gpu_check.sh). After SECONDS no further case begins. Shapes are drawn around what the
kernels treat specially: nothing, one, a register, a chunk, a tile and one more.
"""

import functools
import importlib.util
import random
import sys
import time

import torch

from alignkit import ops
from alignkit.ops import dispatch
from alignkit.ops.attention import RotaryCache, rotary_attention
from alignkit.ops.decoder import LayerWeights, PackedLayer, Product

EDGES = [0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33]
LONG = [255, 256, 257, 511, 512, 513, 1023, 1024, 1025]
PARALLEL = dispatch.PARALLEL


def load(path):
    spec = importlib.util.spec_from_file_location("_cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    usual = dispatch.extension
    dispatch.extension = lambda name: module if name == "cpu" else usual(name)


def size(least=0):
    edges = LONG if random.random() < 0.05 else EDGES
    return max(least, random.choice(edges))


def maybe(x):
    return x if random.random() < 0.5 else None


def floats(*shape):
    return torch.randn(*shape).to(random.choice([torch.float32, torch.bfloat16]))


def flags(*shape):
    return torch.rand(*shape) < random.choice([0.0, 0.3, 0.9, 1.0])


def advantages():
    B, T = random.choice([0, 1, 3]), size()
    steps = [floats(B, T), floats(B, T + 1)]
    truncated, mask, ends = maybe(flags(B, T)), maybe(flags(B, T)), flags(B, T)
    bootstrap = None if truncated is None else maybe(floats(B, T))
    ops.gae(*steps, ends, truncated=truncated, bootstrap=bootstrap, mask=mask)
    ops.supported_gae(*steps, flags(B, T), -1.0, terminated=maybe(ends), mask=mask)
    ops.dual_gae(steps[0], floats(B, T), steps[1], floats(B, T + 1), ends, 0.9, 0.9, 1.0,
                 truncated=truncated, mask=mask)


def groups():
    n, G = size(1), random.choice([0, 1, 3])
    options = {"baseline": random.choice(["mean", "loo", "none"]),
               "scale": random.choice(["std", "batch", "none"])}
    ops.grouped_advantage(floats(n * G), n, mask=maybe(flags(n * G)), **options)
    sizes = torch.tensor([size() for _ in range(random.choice([0, 1, 4]))], dtype=torch.int64)
    starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    N = int(sizes.sum())
    ops.grouped_advantage(floats(N), offsets=starts, mask=maybe(flags(N)), **options)


def comparisons():
    P, n = random.choice([0, 1, 3]), random.choice([0, 1, 2, 5, 17])
    ops.grouped_comparison(floats(P, n, n, 2), complete=maybe(flags(P, n)))


@functools.cache
def far_apart():
    """Room for rows of 1025 whose third begins past 2**31; only what is written takes memory."""
    return torch.empty(2**31 + 1025, dtype=torch.bfloat16)


def logits():
    N, V = random.choice([0, 1, 3]), size(1)
    x, ids = floats(N, V), torch.randint(V, (N,))
    if x.device.type == "cpu" and random.random() < 0.05:
        x = far_apart().as_strided((N, V), (2**30, 1)).copy_(x)
    out = ops.token_logps(x.requires_grad_(), torch.where(flags(N), ids, -100))
    (out.logps.sum() + out.entropy.sum()).backward()
    ops.sample_tokens(x.detach(), torch.rand(N))


def losses():
    B, T = random.choice([0, 1, 3]), size()
    ref = maybe(floats(B, T))
    loss, _ = ops.clipped_policy_loss(
        floats(B, T).requires_grad_(), floats(B, T), floats(B, T) if flags(1) else floats(B),
        mask=maybe(flags(B, T)), ref_logps=ref, beta=0.0 if ref is None else 0.1,
        kl=random.choice(["k1", "k2", "k3"]),
        reduction=random.choice(["token", "sequence", "sum"]))
    loss.backward()


def fusions():
    B, Nv, Nt, heads = random.choice([0, 1, 3]), size(), size(), random.choice([1, 2, 3, 4, 5])
    D = heads * random.choice([1, 3, 8, 16, 32])
    x = [floats(B, D), floats(B, Nv, D), floats(B, Nt, D), *(floats(D, D) for _ in range(3))]
    fused, weights = ops.attention_fusion(
        *(y.requires_grad_() for y in x), heads=heads, visual_mask=maybe(flags(B, Nv)),
        tactile_mask=maybe(flags(B, Nt)))
    (fused.sum() + weights[..., 0].sum()).backward()


def attentions():
    B, n, G, shared = random.choice([0, 1, 3]), size(), random.choice([1, 2]), random.choice([1, 3])
    D, later = random.choice([2, 16, 48]), random.choice([0, 1, 20])
    qkv, angles = floats(B, n, (shared + 2) * G, D), floats(random.choice([1, max(B, 1)]) if B else 1, n, D)
    rotary, options = (angles.cos(), angles.sin()), {"heads": shared * G, "scale": 0.3}
    rotary_attention(qkv.requires_grad_(), *rotary, mask=maybe(flags(B, n)), **options).sum().backward()
    cache, qkv = RotaryCache(B, G, D, n + later), qkv.detach()
    cache.attend(qkv, *rotary, **options)
    for t in range(min(later, n)):
        cache.attend(qkv[:, t : t + 1], *(x[:, t : t + 1] for x in rotary), **options)


def layers():
    B, n, G, shared = random.choice([0, 1, 3, 40]), random.choice(EDGES), random.choice([1, 2]), random.choice([1, 3])
    D, W, width = random.choice([16, 48]), random.choice([16, 48]), random.choice([16, 80])
    heads, later = shared * G, random.choice([0, 1, 20])
    shapes = [((heads + 2 * G) * D, W), (W, heads * D), (width, W), (width, W), (W, width)]
    layer = PackedLayer(LayerWeights(
        [torch.randn(W), torch.randn(W)], 1e-6,
        *(Product(torch.randn(shape), maybe(torch.randn(shape[0]))) for shape in shapes), heads, 0.3))
    cache, angles = RotaryCache(B, G, D, n + later), torch.randn(random.choice([1, max(B, 1)]) if B else 1, n + later, D)
    for start, end in ((0, n), *((t, t + 1) for t in range(n, n + later))):
        layer(floats(B, end - start, W), angles[:, start:end].cos(), angles[:, start:end].sin(), cache,
              maybe(flags(B, end)))


KINDS = [advantages, groups, comparisons, logits, losses, fusions, attentions, layers]


def draw_threads():
    """Some calls are shared out, however small they are; torch's own stay with one thread."""
    dispatch.PARALLEL = 1 if random.random() < 0.1 else PARALLEL
    count = random.choice([2, 3, 8])
    torch.get_num_threads = lambda: count


def main(kernels, cases, seconds=float("inf")):
    start = time.monotonic()
    if kernels == "cuda":
        torch.set_default_device("cuda")
    else:
        load(kernels)
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    done = 0
    while done < cases and time.monotonic() - start < seconds:
        draw_threads()
        KINDS[done % len(KINDS)]()
        done += 1
    if kernels == "cuda":
        torch.cuda.synchronize()
    print(f"{done} cases")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
