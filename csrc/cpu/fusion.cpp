// Attention of a few queries over visual and tactile tokens, each token read once.
//
// The key and value projections are absorbed into the queries and the result (see
// nbs/kernels/07_fusion.ipynb), so that tokens are scored and averaged as they are. They come in
// tiles that fit the first cache; a tile is two small matrix products, scores = queries tokens^T
// and context += attention tokens, with the running maximum of the scores between them.
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

constexpr int kTile = 16;   // tokens at a time
constexpr int kBlock = 4;   // tokens, and queries, whose products stay in registers
constexpr int kWidth = 2 * kVector;  // rows are padded to a multiple of it

// products[q * kTile + t] = queries[q] . tokens[t], for Q queries and kBlock tokens.
//
// Where tokens are read first, those of the next tile, which mostly stand one tile further, are
// fetched meanwhile: a row is too short for the processor to see them coming.
template <int Q>
void products_of_block(const float* queries, const float* const* tokens, std::int64_t width,
                       std::int64_t fetched, float* products) {
  Vector sums[Q][kBlock] = {};
  for (std::int64_t d = 0; d < width; d += kVector) {
    Vector token[kBlock];
    for (int t = 0; t < kBlock; ++t) {
      load(tokens[t] + d, token[t]);
      __builtin_prefetch(tokens[t] + d + fetched);
    }
    for (int q = 0; q < Q; ++q) {
      Vector query;
      load(queries + q * width + d, query);
      for (int t = 0; t < kBlock; ++t) sums[q][t] += query * token[t];
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int t = 0; t < kBlock; ++t) products[q * kTile + t] = total(sums[q][t]);
}

// These two are compiled for themselves, because each is called in several places.
ALIGNKIT_WIDE void products(const float* queries, std::int64_t H, const float* const* tokens,
                            std::int64_t width, float* out) {
  const auto ahead = [=](std::int64_t q) { return q == 0 ? kTile * width : 0; };
  std::int64_t q = 0;
  for (; q + kBlock <= H; q += kBlock)
    for (int t = 0; t < kTile; t += kBlock)
      products_of_block<kBlock>(queries + q * width, tokens + t, width, ahead(q),
                                out + q * kTile + t);
  for (; q < H; ++q)
    for (int t = 0; t < kTile; t += kBlock)
      products_of_block<1>(queries + q * width, tokens + t, width, ahead(q), out + q * kTile + t);
}

// out[i] += sum over k of factors[i * step_i + k * step_k] rows[k], for I rows of `out`.
template <int I>
void add_block(float* out, const float* factors, std::int64_t step_i, std::int64_t step_k,
               const float* const* rows, std::int64_t K, std::int64_t width) {
  for (std::int64_t d = 0; d < width; d += kWidth) {
    Vector low[I], high[I];
    for (int i = 0; i < I; ++i) {
      load(out + i * width + d, low[i]);
      load(out + i * width + d + kVector, high[i]);
    }
    for (std::int64_t k = 0; k < K; ++k) {
      Vector row_low, row_high;
      load(rows[k] + d, row_low);
      load(rows[k] + d + kVector, row_high);
      for (int i = 0; i < I; ++i) {
        const float factor = factors[i * step_i + k * step_k];
        low[i] += factor * row_low;
        high[i] += factor * row_high;
      }
    }
    for (int i = 0; i < I; ++i) {
      store(low[i], out + i * width + d);
      store(high[i], out + i * width + d + kVector);
    }
  }
}

ALIGNKIT_WIDE void add(float* out, std::int64_t rows_out, const float* factors,
                       std::int64_t step_i, std::int64_t step_k, const float* const* rows,
                       std::int64_t K, std::int64_t width) {
  std::int64_t i = 0;
  for (; i + kBlock <= rows_out; i += kBlock)
    add_block<kBlock>(out + i * width, factors + i * step_i, step_i, step_k, rows, K, width);
  for (; i < rows_out; ++i)
    add_block<1>(out + i * width, factors + i * step_i, step_i, step_k, rows, K, width);
}

// Tokens of a row that count, as padded floats.
struct Tile {
  const float* tokens[kTile];
  std::int64_t index[kTile];  // among visual, then tactile
  int size = 0;
};

inline bool counts(const FusionTokens& x, std::int64_t b, std::int64_t n) {
  const bool seen = n < x.Nv;
  const std::uint8_t* mask = seen ? x.visual_mask : x.tactile_mask;
  return !mask || mask[seen ? b * x.Nv + n : b * x.Nt + n - x.Nv];
}

// Where token n of row b stands in an array like the tokens.
template <class T, class Visual, class Tactile>
T* token_of(const FusionTokens& x, Visual* visual, Tactile* tactile, std::int64_t b,
            std::int64_t n) {
  return n < x.Nv ? static_cast<T*>(visual) + (b * x.Nv + n) * x.D
                  : static_cast<T*>(tactile) + (b * x.Nt + n - x.Nv) * x.D;
}

// What a thread works with, allocated once.
struct Scratch {
  std::int64_t width;
  std::vector<float> queries, context, copies, scores, products, grad_context, grad_tokens;
  std::vector<float> top;
  std::vector<double> mass;  // (H, 2) sums of e^(score - top) by modality
  std::vector<const float*> query_rows, grad_rows;

  explicit Scratch(const FusionTokens& x) : width((x.D + kWidth - 1) / kWidth * kWidth) {
    queries.resize(x.H * width);
    context.resize(x.H * width);
    copies.resize(kTile * width);
    scores.resize(x.H * kTile);
    top.resize(x.H);
    mass.resize(2 * x.H);
  }
};

void pad_rows(const float* rows, std::int64_t count, std::int64_t D, std::int64_t width,
              float* padded) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::copy_n(rows + i * D, D, padded + i * width);
    std::fill(padded + i * width + D, padded + (i + 1) * width, 0.0f);
  }
}

template <class T>
void copy_token(const T* token, std::int64_t D, std::int64_t width, float* copy) {
  for (std::int64_t d = 0; d < D; ++d) copy[d] = widen(token[d]);
  std::fill(copy + D, copy + width, 0.0f);
}

// The next tokens that count, from n on; returns where to go on.
std::int64_t fill(const FusionTokens& x, std::int64_t b, std::int64_t n, Scratch& s, Tile& tile) {
  const std::int64_t N = x.Nv + x.Nt;
  for (tile.size = 0; n < N && tile.size < kTile; ++n) {
    if (!counts(x, b, n)) continue;
    float* copy = s.copies.data() + tile.size * s.width;
    if (x.bfloat16) {
      copy_token(token_of<const bfloat16>(x, x.visual, x.tactile, b, n), x.D, s.width, copy);
      tile.tokens[tile.size] = copy;
    } else {
      const float* token = token_of<const float>(x, x.visual, x.tactile, b, n);
      if (s.width != x.D) copy_token(token, x.D, s.width, copy);
      tile.tokens[tile.size] = s.width == x.D ? token : copy;
    }
    tile.index[tile.size++] = n;
  }
  for (int t = tile.size; t < kTile && tile.size > 0; ++t) tile.tokens[t] = tile.tokens[0];
  return n;
}

// Turns the scores of a tile into e^(score - top), and raises `top`.
void attend(const FusionTokens& x, const Tile& tile, Scratch& s) {
  for (std::int64_t h = 0; h < x.H; ++h) {
    float* scores = s.scores.data() + h * kTile;
    float top = s.top[h];
    for (int t = 0; t < tile.size; ++t) top = scores[t] > top ? scores[t] : top;
    if (top > s.top[h]) {
      if (s.top[h] > -kInf) {
        const float scale = std::exp(s.top[h] - top);
        float* context = s.context.data() + h * s.width;
        for (std::int64_t d = 0; d < s.width; ++d) context[d] *= scale;
        s.mass[2 * h] *= scale;
        s.mass[2 * h + 1] *= scale;
      }
      s.top[h] = top;
    }
    const float base = top > -kInf ? top : 0.0f;
    for (int t = 0; t < kTile; ++t) scores[t] = exp_negative(scores[t] - base);
    for (int t = 0; t < tile.size; ++t) s.mass[2 * h + (tile.index[t] >= x.Nv)] += scores[t];
  }
}

void forward_row(const FusionTokens& x, const FusionResults& out, std::int64_t b, Scratch& s) {
  pad_rows(x.queries + b * x.H * x.D, x.H, x.D, s.width, s.queries.data());
  std::fill(s.context.begin(), s.context.end(), 0.0f);
  std::fill(s.top.begin(), s.top.end(), -kInf);
  std::fill(s.mass.begin(), s.mass.end(), 0.0);
  Tile tile;
  for (std::int64_t n = 0; n < x.Nv + x.Nt;) {
    n = fill(x, b, n, s, tile);
    if (!tile.size) break;
    products(s.queries.data(), x.H, tile.tokens, s.width, s.scores.data());
    attend(x, tile, s);
    add(s.context.data(), x.H, s.scores.data(), kTile, 1, tile.tokens, tile.size, s.width);
  }
  for (std::int64_t h = 0; h < x.H; ++h) {
    const std::int64_t row = b * x.H + h;
    const double all = s.mass[2 * h] + s.mass[2 * h + 1];
    const double share = all == 0.0 ? 0.0 : 1.0 / all;  // nothing to attend to: zeros
    const auto scale = static_cast<float>(share);
    for (std::int64_t d = 0; d < x.D; ++d)
      out.context[row * x.D + d] = scale * s.context[h * s.width + d];
    out.weights[2 * row] = static_cast<float>(share * s.mass[2 * h]);
    out.weights[2 * row + 1] = static_cast<float>(share * s.mass[2 * h + 1]);
    out.log_sum[row] = static_cast<float>(s.top[h] + std::log(all));
  }
}

// attention, and d loss / d score = attention (grad_context . token + grad_weight - its mean)
void score_gradients(const FusionTokens& x, const FusionGradients& g, std::int64_t b,
                     const Tile& tile, Scratch& s) {
  for (std::int64_t h = 0; h < x.H; ++h) {
    const std::int64_t row = b * x.H + h;
    float* attention = s.scores.data() + h * kTile;
    float* slopes = s.products.data() + h * kTile;
    float by_modality[kTile] = {};
    for (int t = 0; t < tile.size; ++t)
      by_modality[t] = g.grad_weights[2 * row + (tile.index[t] >= x.Nv)];
    for (int t = 0; t < kTile; ++t) {
      attention[t] = exp_negative(attention[t] - g.log_sum[row]);
      slopes[t] = attention[t] * (slopes[t] + by_modality[t] - g.mean_grad[row]);
    }
  }
}

// Writes the gradient of token n of row b; none: zeros.
template <class T>
void write_gradient(const FusionTokens& x, const FusionGradients& g, std::int64_t b,
                    std::int64_t n, const float* from) {
  T* grad = token_of<T>(x, g.grad_visual, g.grad_tactile, b, n);
  for (std::int64_t d = 0; d < x.D; ++d) narrow(from ? from[d] : 0.0f, grad[d]);
}

void write_gradient(const FusionTokens& x, const FusionGradients& g, std::int64_t b,
                    std::int64_t n, const float* from) {
  if (x.bfloat16) write_gradient<bfloat16>(x, g, b, n, from);
  else write_gradient<float>(x, g, b, n, from);
}

void backward_row(const FusionTokens& x, const FusionGradients& g, std::int64_t b, Scratch& s) {
  const std::int64_t first = b * x.H * x.D;
  pad_rows(x.queries + first, x.H, x.D, s.width, s.queries.data());
  pad_rows(g.grad_context + first, x.H, x.D, s.width, s.grad_context.data());
  std::fill(s.context.begin(), s.context.end(), 0.0f);
  for (std::int64_t n = 0; n < x.Nv + x.Nt; ++n)
    if (!counts(x, b, n)) write_gradient(x, g, b, n, nullptr);
  Tile tile;
  for (std::int64_t n = 0; n < x.Nv + x.Nt;) {
    n = fill(x, b, n, s, tile);
    if (!tile.size) break;
    products(s.queries.data(), x.H, tile.tokens, s.width, s.scores.data());
    products(s.grad_context.data(), x.H, tile.tokens, s.width, s.products.data());
    score_gradients(x, g, b, tile, s);
    add(s.context.data(), x.H, s.products.data(), kTile, 1, tile.tokens, tile.size, s.width);
    std::fill(s.grad_tokens.begin(), s.grad_tokens.end(), 0.0f);
    add(s.grad_tokens.data(), tile.size, s.scores.data(), 1, kTile, s.grad_rows.data(), x.H,
        s.width);
    add(s.grad_tokens.data(), tile.size, s.products.data(), 1, kTile, s.query_rows.data(), x.H,
        s.width);
    for (int t = 0; t < tile.size; ++t)
      write_gradient(x, g, b, tile.index[t], s.grad_tokens.data() + t * s.width);
  }
  for (std::int64_t h = 0; h < x.H; ++h)
    std::copy_n(s.context.data() + h * s.width, x.D, g.grad_queries + first + h * x.D);
}

// Does rows [begin, end).
ALIGNKIT_WIDE void forward_rows(const FusionTokens& x, const FusionResults& out,
                                std::int64_t begin, std::int64_t end) {
  Scratch s(x);
  for (std::int64_t b = begin; b < end; ++b) forward_row(x, out, b, s);
}

ALIGNKIT_WIDE void backward_rows(const FusionTokens& x, const FusionGradients& g,
                                 std::int64_t begin, std::int64_t end) {
  Scratch s(x);
  s.products.resize(x.H * kTile);
  s.grad_context.resize(x.H * s.width);
  s.grad_tokens.resize(kTile * s.width);
  for (std::int64_t h = 0; h < x.H; ++h) {
    s.query_rows.push_back(s.queries.data() + h * s.width);
    s.grad_rows.push_back(s.grad_context.data() + h * s.width);
  }
  for (std::int64_t b = begin; b < end; ++b) backward_row(x, g, b, s);
}

}  // namespace

void attention_fusion(const FusionTokens& x, const FusionResults& out, int threads) {
  in_threads(x.B, threads, [&](auto begin, auto end) { forward_rows(x, out, begin, end); });
}

void attention_fusion_backward(const FusionTokens& x, const FusionGradients& g, int threads) {
  in_threads(x.B, threads, [&](auto begin, auto end) { backward_rows(x, g, begin, end); });
}

}  // namespace alignkit
