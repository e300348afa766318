// Rows of logits, read in chunks that fit the first cache, and the exponential they need.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

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

// Of a float, or of a vector of them; Unsigned is an integer of that size. By reference: how
// wide vectors are passed depends on the machine.
template <class Unsigned, class Float>
void exp_negative(const Float& x, Float& e) {
  const Float lowest = Float{} + kLowest;
  const Float y = x < lowest ? lowest : x;
  const Float shifted = y * 1.44269504f + 12582912.0f;
  const Float n = shifted - 12582912.0f;
  const Float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  const Float q =
      (((0.00139262135f * r + 0.00836320297f) * r + 0.0416665544f) * r + 0.166665769f) * r + 0.5f;
  const Float p = 1.0f + (r + r * r * q);
  Unsigned power, exponent;
  std::memcpy(&power, &p, sizeof p);
  std::memcpy(&exponent, &shifted, sizeof shifted);
  power += exponent << 23;
  Float scaled;
  std::memcpy(&scaled, &power, sizeof power);
  e = x < lowest ? Float{} : scaled;
}

inline float exp_negative(float x) {
  float e;
  exp_negative<std::uint32_t>(x, e);
  return e;
}

// Joins lanes by halves: one after the other, each would wait for the one before it.
template <class Join>
float folded(float* lanes, Join join) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] = join(lanes[l], lanes[l + width]);
  return lanes[0];
}

inline float larger(float x, float y) { return x > y ? x : y; }
inline float plus(float x, float y) { return x + y; }

// `n` is a multiple of kLanes. NaN is passed over; it shows in the sums.
inline float maximum(const float* x, int n) {
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -kInf);
  for (int i = 0; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] = larger(x[i + l], lanes[l]);
  return folded(lanes, larger);
}

// `n` is a multiple of kLanes.
inline double sum(const float* x, int n) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += x[i + l];
  return folded(lanes, plus);
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

struct Floats {
  const float* chunk;
  int n;  // a multiple of kLanes
};

// The same, but whole chunks of floats are read where they are.
inline Floats floats(const float* row, std::int64_t left, float* buffer) {
  if (left >= kChunk) return {row, kChunk};
  return {buffer, load(row, left, buffer)};
}

inline Floats floats(const bfloat16* row, std::int64_t left, float* buffer) {
  return {buffer, load(row, left, buffer)};
}

}  // namespace alignkit
