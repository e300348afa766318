// A decoder layer of Llama's architecture, with weights so narrow that they stay in the cache.
//
// Some rows at a time go through the whole layer, so that what they become stays in the cache. A
// product's weights lie in panels of one vector of outputs: the bias, then what each input adds.
// Each output is summed in the order of its inputs, whichever rows come with it.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "softmax.h"
#include "threads.h"
#include "vector.h"
#include "wide.h"

namespace alignkit {
namespace {

using Arguments = DecoderLayerArguments;

constexpr std::int64_t kRows = 32;  // that go through the layer together

enum class Then { store, add };

// out = or += panel(x) for R rows.
template <int R, Then then>
void panel_of(const float* __restrict x, std::int64_t K, const float* __restrict panel,
              float* __restrict out, std::int64_t E) {
  Vector sums[R], weights;
  load(panel, weights);
  for (int r = 0; r < R; ++r) sums[r] = weights;
  for (std::int64_t k = 0; k < K; ++k) {
    load(panel + (k + 1) * kVector, weights);
    for (int r = 0; r < R; ++r) sums[r] += x[r * K + k] * weights;
  }
  for (int r = 0; r < R; ++r) {
    if (then == Then::add) {
      Vector old;
      load(out + r * E, old);
      sums[r] += old;
    }
    store(sums[r], out + r * E);
  }
}

// The same for any number of rows, R at a time.
template <int R, Then then>
void panel_of_rows(const float* x, std::int64_t rows, std::int64_t K, const float* panel,
                   float* out, std::int64_t E) {
  for (; rows >= R; rows -= R, x += R * K, out += R * E) panel_of<R, then>(x, K, panel, out, E);
  if constexpr (R > 1) panel_of_rows<R / 2, then>(x, rows, K, panel, out, E);
}

// (rows, K) times K to E features; returns where the next weights lie.
template <int R, Then then>
const float* product(const float* x, std::int64_t rows, std::int64_t K, const float* weights,
                     float* out, std::int64_t E) {
  for (std::int64_t e = 0; e < E; e += kVector, weights += (K + 1) * kVector)
    panel_of_rows<R, then>(x, rows, K, weights, out + e, E);
  return weights;
}

// RMSNorm.
const float* norm(const float* x, std::int64_t rows, std::int64_t W, const float* weights, float eps,
                  float* out) {
  for (std::int64_t r = 0; r < rows; ++r, x += W, out += W) {
    Vector squares = {}, part, weight;
    for (std::int64_t d = 0; d < W; d += kVector) {
      load(x + d, part);
      squares += part * part;
    }
    const float scale = 1.0f / std::sqrt(total(squares) / static_cast<float>(W) + eps);
    for (std::int64_t d = 0; d < W; d += kVector) {
      load(x + d, part);
      load(weights + d, weight);
      store(part * scale * weight, out + d);
    }
  }
  return weights + W;
}

// gate = silu(gate) up
void open(float* __restrict gate, const float* __restrict up, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = gate[i], e = exp_negative(x < 0.0f ? x : -x);
    gate[i] = x * (x < 0.0f ? e : 1.0f) / (1.0f + e) * up[i];
  }
}

struct Scratch {
  std::vector<float> normed, qkv, attended, gate, up;

  Scratch(const Arguments& x, std::int64_t rows)
      : normed(rows * x.W), qkv(rows * (x.attention.H + 2 * x.attention.G) * x.attention.D),
        attended(rows * x.attention.H * x.attention.D), gate(rows * x.F), up(rows * x.F) {}
};

// What `sequences` from the b-th on are to the attention.
RotaryAttentionArguments attention_of(const Arguments& x, std::int64_t b, std::int64_t sequences,
                                      Scratch& s) {
  RotaryAttentionArguments a = x.attention;
  const std::int64_t place = b * a.room * a.G * a.D;
  a.qkv = s.qkv.data();
  a.out = s.attended.data();
  a.cos += b * a.rotary_stride;
  a.sin += b * a.rotary_stride;
  if (a.mask) a.mask += b * (a.start + a.n);
  a.keys += place;
  a.values += place;
  a.B = sequences;
  return a;
}

// Does sequences [b, b + sequences).
template <int R>
void layer(const Arguments& x, std::int64_t b, std::int64_t sequences, Scratch& s) {
  const auto& a = x.attention;
  const std::int64_t rows = sequences * a.n, heads = a.H * a.D, E = heads + 2 * a.G * a.D;
  float* y = x.y + b * a.n * x.W;
  std::copy_n(x.x + b * a.n * x.W, rows * x.W, y);
  const float* weights = norm(y, rows, x.W, x.weights, x.eps, s.normed.data());
  weights = product<R, Then::store>(s.normed.data(), rows, x.W, weights, s.qkv.data(), E);
  rotary_attention(attention_of(x, b, sequences, s), 1);
  weights = product<R, Then::add>(s.attended.data(), rows, heads, weights, y, x.W);
  weights = norm(y, rows, x.W, weights, x.eps, s.normed.data());
  weights = product<R, Then::store>(s.normed.data(), rows, x.W, weights, s.gate.data(), x.F);
  weights = product<R, Then::store>(s.normed.data(), rows, x.W, weights, s.up.data(), x.F);
  open(s.gate.data(), s.up.data(), rows * x.F);
  product<R, Then::add>(s.gate.data(), rows, x.F, weights, y, x.W);
}

template <int R>
void some_sequences(const Arguments& x, std::int64_t begin, std::int64_t end) {
  const std::int64_t together = std::max<std::int64_t>(1, kRows / x.attention.n);
  Scratch s(x, together * x.attention.n);
  for (std::int64_t b = begin; b < end; b += together)
    layer<R>(x, b, std::min(together, end - b), s);
}

// As many rows as have their sums in registers.
#ifdef ALIGNKIT_V4
ALIGNKIT_V4 void by_eight(const Arguments& x, std::int64_t begin, std::int64_t end) {
  some_sequences<8>(x, begin, end);
}
#endif
ALIGNKIT_BELOW_V4 void by_four(const Arguments& x, std::int64_t begin, std::int64_t end) {
  some_sequences<4>(x, begin, end);
}

}  // namespace

void decoder_layer(const Arguments& x, int threads) {
  if (x.attention.n < 1) return;
  in_threads(x.attention.B, threads, [&](auto begin, auto end) {
#ifdef ALIGNKIT_V4
    if (has_v4()) return by_eight(x, begin, end);
#endif
    by_four(x, begin, end);
  });
}

}  // namespace alignkit
