// A token drawn by inverse CDF, and its log-probability.
//
// One pass over the logits keeps the sum of exponentials of each chunk. The caller's uniform
// number times the total then lies in one chunk, and only that one is read again. Sums are
// float inside a chunk and double across chunks.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "softmax.h"
#include "threads.h"
#include "wide.h"

namespace alignkit {
namespace {

struct Chunk {
  float top;    // largest logit of the row up to here
  double exps;  // of this chunk, relative to it
};

void exponentials(const float* x, int n, float top, float inverse_temperature, float* e) {
  for (int i = 0; i < n; ++i) e[i] = exp_negative((x[i] - top) * inverse_temperature);
}

// Fills `chunks`, the last of which then has the largest logit of the row.
template <class T>
void read_row(const T* logits, std::int64_t V, float inverse_temperature,
              std::vector<Chunk>& chunks) {
  float chunk[kChunk], e[kChunk];
  float top = -kInf;
  chunks.clear();
  for (std::int64_t start = 0; start < V; start += kChunk) {
    const int n = load(logits + start, V - start, chunk);
    top = std::max(top, maximum(chunk, n));
    exponentials(chunk, n, top > -kInf ? top : 0.0f, inverse_temperature, e);
    chunks.push_back({top, sum(e, n)});
  }
}

struct Place {
  std::int64_t index;
  double before;  // sum of the weights in front of it
};

// The first weight with which the running sum, from `before` on, exceeds the target. Rounding
// may leave the target past the end: then the last weight that is not zero.
template <class Weight>
Place locate(double target, double before, std::int64_t n, Weight weight) {
  Place found{0, before};
  for (std::int64_t i = 0; i < n; ++i) {
    const double w = weight(i);
    if (!(w > 0.0)) continue;
    found = {i, before};
    before += w;
    if (before > target) break;
  }
  return found;
}

template <class T>
void sample_row(const SampleTokensArguments& x, std::int64_t row, std::vector<Chunk>& chunks) {
  const T* logits = static_cast<const T*>(x.logits) + row_start(row, x.stride);
  const float inverse = 1.0f / x.temperature;
  read_row(logits, x.V, inverse, chunks);
  const float top = chunks.back().top;
  double total = 0.0;
  for (Chunk& c : chunks) {
    if (c.exps > 0.0) c.exps *= std::exp((double{c.top} - top) / x.temperature);
    total += c.exps;
  }
  const double target = double{x.uniforms[row]} * total;
  const Place in = locate(target, 0.0, static_cast<std::int64_t>(chunks.size()),
                          [&](std::int64_t i) { return chunks[i].exps; });

  float chunk[kChunk], e[kChunk];
  const std::int64_t start = in.index * kChunk;
  const int n = load(logits + start, x.V - start, chunk);
  exponentials(chunk, n, top, inverse, e);
  const Place drawn = locate(target, in.before, n, [&](std::int64_t i) { return e[i]; });
  x.ids[row] = start + drawn.index;
  const double d = (double{chunk[drawn.index]} - top) / x.temperature;
  x.logps[row] = static_cast<float>(d - std::log(total));
}

ALIGNKIT_WIDE void sample_rows(const SampleTokensArguments& x, std::int64_t begin,
                               std::int64_t end) {
  std::vector<Chunk> chunks;
  chunks.reserve(static_cast<std::size_t>(x.V / kChunk + 1));
  for (std::int64_t row = begin; row < end; ++row) {
    if (x.dtype == Dtype::float32) sample_row<float>(x, row, chunks);
    else sample_row<bfloat16>(x, row, chunks);
  }
}

}  // namespace

void sample_tokens(const SampleTokensArguments& x, int threads) {
  in_threads(x.N, threads, [&](auto begin, auto end) { sample_rows(x, begin, end); });
}

}  // namespace alignkit
