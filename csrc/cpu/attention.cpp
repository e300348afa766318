// Causal attention of rotated queries over rotated keys, for rows of a few dozen tokens.
//
// Each key-value head of each row is done by itself, in the first cache. Its turned keys lie as
// columns, so that the scores of a query are sums of whole vectors, and its values as rows, so that
// their average is one too. The backward pass finds the scores again from the same input.
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

using Arguments = RotaryAttentionArguments;

constexpr int kMaxWidth = 256;  // of a head
constexpr int kColumns = 4;  // vectors of scores whose sums are independent

std::int64_t whole(std::int64_t n) { return (n + kVector - 1) / kVector * kVector; }

const float* head_of(const Arguments& x, const float* qkv, std::int64_t token, std::int64_t head) {
  return qkv + (token * (x.H + 2 * x.G) + head) * x.D;
}

// Rotary position embedding of a head; back turns the other way.
void turn(const Arguments& x, const float* __restrict head, std::int64_t b, std::int64_t i, bool back,
          float* __restrict out) {
  const float* cos = x.cos + b * x.rotary_stride + i * x.D;
  const float* sin = x.sin + b * x.rotary_stride + i * x.D;
  const std::int64_t half = x.D / 2;
  if (back) {
    for (std::int64_t d = 0; d < half; ++d) {
      const float low = head[d], high = head[d + half];
      out[d] = low * cos[d] + high * sin[d + half];
      out[d + half] = high * cos[d + half] - low * sin[d];
    }
  } else {
    for (std::int64_t d = 0; d < half; ++d) {
      const float low = head[d], high = head[d + half];
      out[d] = low * cos[d] - high * sin[d];
      out[d + half] = high * cos[d + half] + low * sin[d + half];
    }
  }
}

// products[j] = row . column j, for C vectors of columns.
template <int C>
void products_of(const float* row, const float* columns, std::int64_t room, std::int64_t D,
                 float* products) {
  Vector sums[C] = {};
  for (std::int64_t d = 0; d < D; ++d)
    for (int c = 0; c < C; ++c) {
      Vector column;
      load(columns + d * room + c * kVector, column);
      sums[c] += row[d] * column;
    }
  for (int c = 0; c < C; ++c) store(sums[c], products + c * kVector);
}

// Of the first `count` columns, a multiple of kVector.
void products(const float* row, const float* columns, std::int64_t room, std::int64_t D,
              std::int64_t count, float* out) {
  std::int64_t j = 0;
  for (; j + kColumns * kVector <= count; j += kColumns * kVector)
    products_of<kColumns>(row, columns + j, room, D, out + j);
  switch ((count - j) / kVector) {
    case 3: return products_of<3>(row, columns + j, room, D, out + j);
    case 2: return products_of<2>(row, columns + j, room, D, out + j);
    case 1: return products_of<1>(row, columns + j, room, D, out + j);
  }
}

// out = scale times the sum over j of factors[j] rows[j].
void combine(const float* factors, const float* rows, std::int64_t count, std::int64_t D,
             float scale, float* out) {
  constexpr int kSums = 4;
  for (std::int64_t d = 0; d < D; d += kVector) {
    Vector sums[kSums] = {}, row;
    std::int64_t j = 0;
    for (; j + kSums <= count; j += kSums)
      for (int k = 0; k < kSums; ++k) {
        load(rows + (j + k) * D + d, row);
        sums[k] += factors[j + k] * row;
      }
    for (; j < count; ++j) {
      load(rows + j * D + d, row);
      sums[0] += factors[j] * row;
    }
    store(((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale, out + d);
  }
}

// rows[j] += factors[j] row
void add_outer(const float* factors, const float* row, std::int64_t count, std::int64_t D,
               float* rows) {
  for (std::int64_t d = 0; d < D; d += kVector) {
    Vector add;
    load(row + d, add);
    for (std::int64_t j = 0; j < count; ++j) {
      Vector sum;
      load(rows + j * D + d, sum);
      sum += factors[j] * add;
      store(sum, rows + j * D + d);
    }
  }
}

// What one head works with.
struct Head {
  std::int64_t room;                          // tokens
  std::vector<float> key_columns, values;     // (D, room) turned, and (room, D)
  std::vector<float> turned, scores;          // (D,), and (room,)
  std::vector<float> keys, value_columns, grad_keys, grad_values, slopes, grad;  // backward

  explicit Head(const Arguments& x)
      : room(x.keys ? x.room : whole(x.n)), turned(x.D), scores(room) {
    if (x.keys) return;
    key_columns.resize(x.D * room);
    values.resize(room * x.D);
  }

  void for_backward(std::int64_t D) {
    keys.resize(room * D);
    value_columns.resize(D * room);
    grad_keys.resize(room * D);
    grad_values.resize(room * D);
    slopes.resize(room);
    grad.resize(D);
  }
};

void as_columns(const float* rows, std::int64_t count, std::int64_t D, std::int64_t room,
                float* columns) {
  for (std::int64_t j = 0; j < count; ++j)
    for (std::int64_t d = 0; d < D; ++d) columns[d * room + j] = rows[j * D + d];
}

// Products become scores of what the query may see, -inf elsewhere; `count` of them.
void score(const Arguments& x, std::int64_t b, std::int64_t seen, std::int64_t count,
           float* scores) {
  for (std::int64_t j = 0; j < count; ++j) scores[j] *= x.scale;
  std::fill(scores + seen, scores + count, -kInf);
  if (!x.mask) return;
  const std::uint8_t* mask = x.mask + b * (x.start + x.n);
  for (std::int64_t j = 0; j < seen; ++j) scores[j] = mask[j] ? scores[j] : -kInf;
}

float largest(const float* x, std::int64_t count) {
  Vector top, next;
  load(x, top);
  for (std::int64_t j = kVector; j < count; j += kVector) {
    load(x + j, next);
    top = next > top ? next : top;
  }
  float lanes[kVector];
  store(top, lanes);
  for (int width = kVector / 2; width; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] = lanes[l + width] > lanes[l] ? lanes[l + width] : lanes[l];
  return lanes[0];
}

float added(const float* x, std::int64_t count) {
  Vector sum = {}, next;
  for (std::int64_t j = 0; j < count; j += kVector) {
    load(x + j, next);
    sum += next;
  }
  return total(sum);
}

// Turns the new keys and copies the new values.
void take_in(const Arguments& x, std::int64_t b, std::int64_t g, float* key_columns, float* values,
             Head& s) {
  for (std::int64_t i = 0; i < x.n; ++i) {
    const std::int64_t token = b * x.n + i, j = x.start + i;
    turn(x, head_of(x, x.qkv, token, x.H + g), b, i, false, s.turned.data());
    as_columns(s.turned.data(), 1, x.D, s.room, key_columns + j);
    std::copy_n(head_of(x, x.qkv, token, x.H + x.G + g), x.D, values + j * x.D);
  }
}

void forward_head(const Arguments& x, std::int64_t b, std::int64_t g, Head& s) {
  const std::int64_t place = (b * x.G + g) * x.room * x.D, group = x.H / x.G;
  float* key_columns = x.keys ? x.keys + place : s.key_columns.data();
  float* values = x.keys ? x.values + place : s.values.data();
  float* weights = s.scores.data();
  take_in(x, b, g, key_columns, values, s);
  for (std::int64_t i = 0; i < x.n; ++i) {
    const std::int64_t token = b * x.n + i, seen = x.start + i + 1, count = whole(seen);
    for (std::int64_t h = g * group; h < (g + 1) * group; ++h) {
      turn(x, head_of(x, x.qkv, token, h), b, i, false, s.turned.data());
      products(s.turned.data(), key_columns, s.room, x.D, count, weights);
      score(x, b, seen, count, weights);
      const float top = largest(weights, count), base = top > -kInf ? top : 0.0f;
      for (std::int64_t j = 0; j < count; ++j) weights[j] = exp_negative(weights[j] - base);
      const float all = added(weights, count), share = all > 0.0f ? 1.0f / all : 0.0f;
      combine(weights, values, seen, x.D, share, x.out + (token * x.H + h) * x.D);  // or zeros
      if (x.log_sum) x.log_sum[token * x.H + h] = all > 0.0f ? top + std::log(all) : kInf;
    }
  }
}

void backward_head(const Arguments& x, const float* grad_out, float* grad_qkv, std::int64_t b,
                   std::int64_t g, Head& s) {
  const std::int64_t group = x.H / x.G;
  take_in(x, b, g, s.key_columns.data(), s.values.data(), s);
  as_columns(s.key_columns.data(), x.D, s.room, x.D, s.keys.data());
  as_columns(s.values.data(), x.n, x.D, s.room, s.value_columns.data());
  std::fill(s.grad_keys.begin(), s.grad_keys.end(), 0.0f);
  std::fill(s.grad_values.begin(), s.grad_values.end(), 0.0f);
  float* weights = s.scores.data();
  for (std::int64_t i = 0; i < x.n; ++i) {
    const std::int64_t token = b * x.n + i, seen = i + 1, count = whole(seen);
    for (std::int64_t h = g * group; h < (g + 1) * group; ++h) {
      const std::int64_t at = token * x.H + h;
      turn(x, head_of(x, x.qkv, token, h), b, i, false, s.turned.data());
      products(s.turned.data(), s.key_columns.data(), s.room, x.D, count, weights);
      score(x, b, seen, count, weights);
      products(grad_out + at * x.D, s.value_columns.data(), s.room, x.D, count, s.slopes.data());
      for (std::int64_t j = 0; j < count; ++j) {
        weights[j] = exp_negative(weights[j] - x.log_sum[at]);
        s.slopes[j] *= weights[j];
      }
      const float mean = added(s.slopes.data(), count);
      for (std::int64_t j = 0; j < count; ++j)
        s.slopes[j] = x.scale * (s.slopes[j] - mean * weights[j]);
      combine(s.slopes.data(), s.keys.data(), seen, x.D, 1.0f, s.grad.data());
      turn(x, s.grad.data(), b, i, true,
           grad_qkv + (token * (x.H + 2 * x.G) + h) * x.D);
      add_outer(s.slopes.data(), s.turned.data(), seen, x.D, s.grad_keys.data());
      add_outer(weights, grad_out + at * x.D, seen, x.D, s.grad_values.data());
    }
  }
  for (std::int64_t i = 0; i < x.n; ++i) {
    float* grad = grad_qkv + ((b * x.n + i) * (x.H + 2 * x.G) + x.H + g) * x.D;
    turn(x, s.grad_keys.data() + i * x.D, b, i, true, grad);
    std::copy_n(s.grad_values.data() + i * x.D, x.D, grad + x.G * x.D);
  }
}

// Does rows [begin, end).
ALIGNKIT_WIDE void forward_rows(const Arguments& x, std::int64_t begin, std::int64_t end) {
  Head s(x);
  for (std::int64_t b = begin; b < end; ++b)
    for (std::int64_t g = 0; g < x.G; ++g) forward_head(x, b, g, s);
}

ALIGNKIT_WIDE void backward_rows(const Arguments& x, const float* grad_out, float* grad_qkv,
                                 std::int64_t begin, std::int64_t end) {
  Head s(x);
  s.for_backward(x.D);
  for (std::int64_t b = begin; b < end; ++b)
    for (std::int64_t g = 0; g < x.G; ++g) backward_head(x, grad_out, grad_qkv, b, g, s);
}

}  // namespace

void rotary_attention(const Arguments& x, int threads) {
  in_threads(x.B, threads, [&](auto begin, auto end) { forward_rows(x, begin, end); });
}

void rotary_attention_backward(const Arguments& x, const float* grad_out, float* grad_qkv,
                               int threads) {
  in_threads(x.B, threads,
             [&](auto begin, auto end) { backward_rows(x, grad_out, grad_qkv, begin, end); });
}

}  // namespace alignkit
