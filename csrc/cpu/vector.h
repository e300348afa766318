// Sixteen floats that the compiler keeps in registers: one, or as many as the machine needs.
#pragma once

#include <cstring>

namespace alignkit {

constexpr int kVector = 16;

typedef float Vector __attribute__((vector_size(kVector * sizeof(float))));
typedef float Half __attribute__((vector_size(kVector * sizeof(float) / 2)));
typedef float Quarter __attribute__((vector_size(kVector * sizeof(float) / 4)));

// By reference: how wide registers are returned depends on the machine.
inline void load(const float* from, Vector& x) { std::memcpy(&x, from, sizeof x); }
inline void store(const Vector& x, float* to) { std::memcpy(to, &x, sizeof x); }

inline float total(const Vector& x) {
  Half halves[2];
  std::memcpy(halves, &x, sizeof x);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter quarter = quarters[0] + quarters[1];
  float four[4];
  std::memcpy(four, &quarter, sizeof quarter);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace alignkit
