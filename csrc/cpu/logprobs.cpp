// Log-probability of a chosen token, entropy, and their gradient, reading the logits once.
//
// The forward pass keeps a running maximum m and, relative to it, sum e^d and sum d e^d with
// d = (logit - m) / temperature. A row comes in chunks that fit the first cache: the maximum
// of a chunk first, one rescaling if it grew, then one exponential an element. Sums are float
// inside a chunk and double across chunks.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels.h"
#include "softmax.h"
#include "wide.h"

namespace alignkit {
namespace {

constexpr std::int64_t kIgnore = -100;

struct Sums {
  double exps;      // sum e^d
  double weighted;  // sum d e^d
};

// Overwrites the chunk. Elementwise loops and sums are apart: each is one that compilers
// vectorise.
Sums sums(float* x, int n, float top, float inverse_temperature) {
  float e[kChunk];
  for (int i = 0; i < n; ++i) {
    const float d = (x[i] - top) * inverse_temperature;
    e[i] = exp_negative(d);
    x[i] = e[i] * (d < kLowest ? kLowest : d);  // 0 * -inf would be NaN
  }
  float exps[kLanes] = {}, weighted[kLanes] = {};
  for (int i = 0; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      exps[l] += e[i + l];
      weighted[l] += x[i + l];
    }
  return {std::accumulate(exps, exps + kLanes, 0.0),
          std::accumulate(weighted, weighted + kLanes, 0.0)};
}

template <class T>
void forward_row(const TokenLogpsArguments& x, std::int64_t row) {
  const T* logits = static_cast<const T*>(x.logits) + row_start(row, x.stride);
  const float inverse = 1.0f / x.temperature;
  float chunk[kChunk];
  float top = -kInf;
  Sums total{0.0, 0.0};
  for (std::int64_t start = 0; start < x.V; start += kChunk) {
    const int n = load(logits + start, x.V - start, chunk);
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
    const Sums part = sums(chunk, n, top > -kInf ? top : 0.0f, inverse);
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

}  // namespace

ALIGNKIT_WIDE void token_logps(const TokenLogpsArguments& x) {
  for (std::int64_t row = 0; row < x.N; ++row) {
    if (x.dtype == Dtype::float32) forward_row<float>(x, row);
    else forward_row<bfloat16>(x, row);
  }
}

ALIGNKIT_WIDE void token_logps_backward(const TokenLogpsArguments& x, const float* grad_logps,
                          const float* grad_entropy, void* grad) {
  for (std::int64_t row = 0; row < x.N; ++row) {
    if (x.dtype == Dtype::float32)
      backward_row(x, grad_logps[row], grad_entropy[row], row, static_cast<float*>(grad));
    else
      backward_row(x, grad_logps[row], grad_entropy[row], row, static_cast<bfloat16*>(grad));
  }
}

}  // namespace alignkit
