"""`ops.decoder`: a layer read in portions against the formula over all tokens in float64."""

import multiprocessing
import os
from dataclasses import dataclass

import pytest
import torch
from ops_cases import poisoned, require
from torch.nn import functional as F

from alignkit.ops import dispatch
from alignkit.ops.attention import RotaryCache, rotary_attention_reference
from alignkit.ops.decoder import LayerWeights, PackedLayer, Product, decoder_layer_reference, fits

SHAPES = [(1, 1, 16, 16, 1, 1, 16), (5, 9, 48, 80, 4, 2, 16), (37, 6, 64, 32, 2, 2, 32),
          (3, 40, 32, 64, 3, 1, 48)]  # B, n, W, F, H, G, D


@dataclass
class Case:
    weights: LayerWeights
    x: torch.Tensor  # (B, n, W)
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None
    kv_heads: int

    def cache(self, B):
        return RotaryCache(B, self.kv_heads, self.cos.shape[2], self.x.shape[1])

    def read(self, layer, rows, portions):
        "The tokens of these rows, so many at a time."
        found, start, cache = [], 0, self.cache(len(rows))
        some = [0] if len(self.cos) == 1 else rows
        for n in portions:
            end = start + n
            mask = None if self.mask is None else self.mask[rows, :end]
            found.append(layer(self.x[rows, start:end], self.cos[some, start:end],
                               self.sin[some, start:end], cache, mask))
            start = end
        return torch.cat(found, 1)


def case(B, n, W, width, H, G, D, bias=True, padded=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def product(E, K):
        return Product(normal(E, K) * K**-0.5, normal(E) if bias else None)

    angles = normal(B if padded else 1, n, D // 2).repeat(1, 1, 2)
    weights = LayerWeights([normal(W), normal(W)], 1e-5, product((H + 2 * G) * D, W), product(W, H * D),
                           product(width, W), product(width, W), product(W, width), H, D**-0.5)
    mask = torch.arange(n) >= torch.arange(B)[:, None] * n // (2 * B) if padded else None
    return Case(weights, normal(B, n, W), angles.cos(), angles.sin(), mask, G)


def exactly(case):
    "All tokens at once, in float64."
    def double(x):
        return None if x is None else x.double()

    def linear(x, product):
        return F.linear(x, *map(double, product))

    w, x, cos, sin = case.weights, case.x.double(), case.cos.double(), case.sin.double()

    def norm(x, weight):
        return x / (x.square().mean(-1, True) + w.eps).sqrt() * weight.double()

    qkv = linear(norm(x, w.norms[0]), w.qkv).unflatten(2, (-1, cos.shape[2]))
    x = x + linear(rotary_attention_reference(qkv, cos, sin, heads=w.heads, scale=w.scale,
                                              mask=case.mask).flatten(2), w.out)
    gate, up = (linear(norm(x, w.norms[1]), product) for product in (w.gate, w.up))
    return x + linear(gate * gate.sigmoid() * up, w.down)


def halves(n):
    "A prompt, then a token at a time."
    return [n - n // 2, *[1] * (n // 2)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_agrees_with_float64(backend, shape, padded, bias):
    require(backend)
    x = case(*shape, bias=bias, padded=padded)
    layer = PackedLayer(x.weights) if backend == "cpu" else \
        lambda read, *rest: decoder_layer_reference(read, x.weights, *rest)
    with poisoned():
        found = x.read(layer, range(shape[0]), halves(shape[1]))
    torch.testing.assert_close(found.double(), exactly(x), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_a_row_has_the_same_bits_whoever_reads_it(monkeypatch, threads):
    "Alone or among others, in one portion or several, by any number of threads."
    require("cpu")
    x = case(37, 6, 48, 80, 4, 2, 16, padded=True)
    layer = PackedLayer(x.weights)
    together = x.read(layer, range(37), halves(6))
    monkeypatch.setattr(dispatch, "PARALLEL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(x.read(layer, range(37), halves(6)), together)
    assert torch.equal(x.read(layer, range(37), [1] * 6), together)
    for row in (0, 17, 36):
        assert torch.equal(x.read(layer, [row], halves(6)), together[row : row + 1])


def _answers(layer, x, expected):
    os._exit(0 if torch.equal(x.read(layer, range(len(x.x)), [1, 1]), expected) else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork in a process with threads
def test_a_fork_has_no_workers_to_wait_for(monkeypatch):
    require("cpu")
    monkeypatch.setattr(dispatch, "PARALLEL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = case(5, 2, 48, 80, 4, 2, 16)
    layer = PackedLayer(x.weights)
    expected = x.read(layer, range(5), [1, 1])  # the parent's workers run from now on
    child = multiprocessing.get_context("fork").Process(target=_answers, args=(layer, x, expected))
    child.start()
    child.join(timeout=5)
    hung = child.is_alive()
    child.kill()
    assert not hung and child.exitcode == 0


def test_what_the_kernel_does_not_read():
    require("cpu")
    sizes = {"B": 1, "n": 1, "W": 32, "width": 32, "H": 1, "G": 1, "D": 16}
    assert fits(case(**sizes).weights, 16)
    for odd in ({"W": 24}, {"width": 40}, {"D": 8}, {"W": 1024, "width": 1024}):
        changed = sizes | odd
        assert not fits(case(**changed).weights, changed["D"])
    double = case(**sizes).weights._replace(qkv=Product(torch.zeros(48, 32, dtype=torch.float64)))
    assert not fits(double, 16)


def test_the_binding_refuses_what_it_cannot_read():
    require("cpu")
    x = case(2, 1, 32, 32, 1, 1, 16)
    layer, cache = PackedLayer(x.weights), x.cache(2)
    layer.F = 40
    with pytest.raises(ValueError, match="W and F must be multiples of 16"):
        layer(x.x, x.cos, x.sin, cache)
    layer, cache = PackedLayer(x.weights), x.cache(2)
    cache.filled = 16
    with pytest.raises(ValueError, match="room"):
        layer(x.x, x.cos, x.sin, cache)
    assert dispatch.problem("cpu") == ""
