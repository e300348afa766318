// Log-probability of a chosen token, entropy, and their gradient, reading the logits once.
//
// The forward pass keeps a running maximum m and, relative to it, sum e^d and sum d e^d with
// d = (logit - m) / temperature. A row comes in chunks that fit the first cache: the maximum
// of a chunk first, one rescaling if it grew, then one exponential an element. Sums are float
// inside a chunk and double across chunks.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "softmax.h"
#include "threads.h"
#include "wide.h"

namespace alignkit {
namespace {

constexpr std::int64_t kIgnore = -100;

struct Sums {
  double exps;      // sum e^d
  double weighted;  // sum d e^d
};

constexpr int kVector = 16;
typedef float Vector __attribute__((vector_size(kVector * sizeof(float))));
typedef std::uint32_t VectorBits __attribute__((vector_size(sizeof(Vector))));

// The lines of kLanes logits.
template <class T>
void prefetch(const T* logits) {
  constexpr std::size_t kLine = 64;
  for (std::size_t at = 0; at < kLanes * sizeof(T); at += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(logits) + at);
}

// In vectors by hand: compilers do not add floats in another order, and what is added at once
// need not be stored first. `n` is a multiple of kLanes, which are two vectors.
//
// What is read next is fetched meanwhile: the search for its maximum would wait for it.
template <class T>
Sums sums(const float* x, int n, float top, float inverse_temperature, const T* next) {
  static_assert(kLanes == 2 * kVector);
  const Vector lowest = Vector{} + kLowest;
  Vector exps[2] = {}, weighted[2] = {};
  for (int i = 0; i < n; i += kLanes) {
    prefetch(next + i);
    for (int half = 0; half < 2; ++half) {
      Vector d, e;
      std::memcpy(&d, x + i + half * kVector, sizeof d);
      d = (d - top) * inverse_temperature;
      exp_negative<VectorBits>(d, e);
      exps[half] += e;
      weighted[half] += e * (d < lowest ? lowest : d);  // 0 * -inf would be NaN
    }
  }
  float lanes[kLanes];
  std::memcpy(lanes, exps, sizeof lanes);
  const double sum = folded(lanes, plus);
  std::memcpy(lanes, weighted, sizeof lanes);
  return {sum, folded(lanes, plus)};
}

template <class T>
void forward_row(const TokenLogpsArguments& x, std::int64_t row) {
  const T* logits = static_cast<const T*>(x.logits) + row_start(row, x.stride);
  const float inverse = 1.0f / x.temperature;
  float buffer[kChunk];
  float top = -kInf;
  Sums total{0.0, 0.0};
  for (std::int64_t start = 0; start < x.V; start += kChunk) {
    const auto [chunk, n] = floats(logits + start, x.V - start, buffer);
    const float highest = maximum(chunk, n);
    if (highest > top) {
      if (top > -kInf) {  // e^(d + shift) = e^shift e^d
        const double shift = (double{top} - highest) / x.temperature;
        const double scale = std::exp(shift);
        total.weighted = scale * (total.weighted + shift * total.exps);
        total.exps *= scale;
      }
      top = highest;
    }
    const Sums part =
        sums(chunk, n, top > -kInf ? top : 0.0f, inverse, logits + start + kChunk);
    total.exps += part.exps;
    total.weighted += part.weighted;
  }
  const double log_sum = std::log(total.exps);
  const std::int64_t id = x.ids[row];
  x.top[row] = top;
  x.log_sum[row] = static_cast<float>(log_sum);
  if (id == kIgnore) {
    x.logps[row] = x.entropy[row] = 0.0f;
    return;
  }
  const double d = (double{widen(logits[id])} - top) / x.temperature;
  x.logps[row] = static_cast<float>(d - log_sum);
  x.entropy[row] = static_cast<float>(log_sum - total.weighted / total.exps);
}

// d logp / d logit_j = (1[j = id] - p_j) / temperature
// d entropy / d logit_j = -p_j (log p_j + entropy) / temperature
template <class T>
void backward_row(const TokenLogpsArguments& x, float grad_logp, float grad_entropy,
                  std::int64_t row, T* grad) {
  grad += row_start(row, x.V);
  const std::int64_t id = x.ids[row];
  if (id == kIgnore) {
    std::fill_n(grad, x.V, T{0});
    return;
  }
  const T* logits = static_cast<const T*>(x.logits) + row_start(row, x.stride);
  const float inverse = 1.0f / x.temperature;
  const float top = x.top[row], log_sum = x.log_sum[row], entropy = x.entropy[row];
  for (std::int64_t j = 0; j < x.V; ++j) {
    float logp = (widen(logits[j]) - top) * inverse - log_sum;
    const float p = exp_negative(logp);
    logp = logp < kLowest ? kLowest : logp;
    narrow(-p * (grad_logp + grad_entropy * (logp + entropy)) * inverse, grad[j]);
  }
  const float d = (widen(logits[id]) - top) * inverse - log_sum;
  const float p = exp_negative(d);
  const float surprise = (d < kLowest ? kLowest : d) + entropy;
  narrow((grad_logp * (1.0f - p) - grad_entropy * p * surprise) * inverse, grad[id]);
}

ALIGNKIT_WIDE void forward_rows(const TokenLogpsArguments& x, std::int64_t begin,
                                std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    if (x.dtype == Dtype::float32) forward_row<float>(x, row);
    else forward_row<bfloat16>(x, row);
  }
}

ALIGNKIT_WIDE void backward_rows(const TokenLogpsArguments& x, const float* grad_logps,
                                 const float* grad_entropy, void* grad, std::int64_t begin,
                                 std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    if (x.dtype == Dtype::float32)
      backward_row(x, grad_logps[row], grad_entropy[row], row, static_cast<float*>(grad));
    else
      backward_row(x, grad_logps[row], grad_entropy[row], row, static_cast<bfloat16*>(grad));
  }
}

}  // namespace

void token_logps(const TokenLogpsArguments& x, int threads) {
  in_threads(x.N, threads, [&](auto begin, auto end) { forward_rows(x, begin, end); });
}

void token_logps_backward(const TokenLogpsArguments& x, const float* grad_logps,
                          const float* grad_entropy, void* grad, int threads) {
  in_threads(x.N, threads, [&](auto begin, auto end) {
    backward_rows(x, grad_logps, grad_entropy, grad, begin, end);
  });
}

}  // namespace alignkit
