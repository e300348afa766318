// Rows of logits, read in chunks that fit the first cache, and the exponential they need.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>

#include "layout.h"

namespace alignkit {

constexpr int kChunk = 1024;
constexpr int kLanes = 32;  // independent partial sums: what a compiler can vectorise
constexpr float kInf = std::numeric_limits<float>::infinity();

using bfloat16 = std::uint16_t;  // the upper half of a float

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline float widen(float x) { return x; }
inline float widen(bfloat16 x) { return bits<float>(std::uint32_t{x} << 16); }

inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, bfloat16& y) {  // to nearest, ties to even; a NaN stays one
  const std::uint32_t u = bits<std::uint32_t>(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  y = static_cast<bfloat16>(x == x ? rounded : (u >> 16) | 0x40u);
}

// e^x for x <= 0: 2^n e^r with |r| <= log(2) / 2 and a polynomial for e^r, interpolated at
// Chebyshev nodes (relative error 1e-8). Adding 1.5 * 2^23 rounds to an integer that then
// stands in the low bits. Below e^-86, where floats end, it is 0; NaN stays NaN.
constexpr float kLowest = -86.0f;

inline float exp_negative(float x) {
  const float y = x < kLowest ? kLowest : x;
  const float shifted = y * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  const float q =
      (((0.00139262135f * r + 0.00836320297f) * r + 0.0416665544f) * r + 0.166665769f) * r + 0.5f;
  const float p = 1.0f + (r + r * r * q);
  const std::uint32_t scaled = bits<std::uint32_t>(p) + (bits<std::uint32_t>(shifted) << 23);
  return x < kLowest ? 0.0f : bits<float>(scaled);
}

// `n` is a multiple of kLanes. NaN is passed over; it shows in the sums.
inline float maximum(const float* x, int n) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -kInf);
  for (int i = 0; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
  return *std::max_element(lanes, lanes + kLanes);
}

// `n` is a multiple of kLanes.
inline double sum(const float* x, int n) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += x[i + l];
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

// Copies a chunk as floats and fills it up with -inf, which adds nothing.
template <class T>
int load(const T* row, std::int64_t left, float* chunk) {
  const int n = static_cast<int>(std::min<std::int64_t>(kChunk, left));
  for (int i = 0; i < n; ++i) chunk[i] = widen(row[i]);
  const int padded = (n + kLanes - 1) / kLanes * kLanes;
  std::fill(chunk + n, chunk + padded, -kInf);
  return padded;
}

}  // namespace alignkit
