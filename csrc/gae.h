// What the C++ and the CUDA kernels of `gae`, `supported_gae` and `dual_gae` receive.
#pragma once

#include <cstdint>

#include "layout.h"

namespace alignkit {

// Row-major, without gaps. (B, T) except values, which is (B, T+1). A null pointer is an
// argument that was not given; `supported` makes the difference between the two operators.
struct GaeArguments {
  const float* rewards;
  const float* values;
  const std::uint8_t* terminated;  // null: a row ends after its last counted step
  const std::uint8_t* truncated;
  const float* bootstrap;
  const std::uint8_t* mask;
  const std::uint8_t* supported;
  float v_min;  // value of the state after an unsupported step
  float gamma;
  float decay;        // gamma * lam
  float* advantages;  // (B, T)
  float* targets;     // (B, T), null without `supported`
  std::int64_t B;
  std::int64_t T;
};

// Rewards and costs of the same steps, with a critic each; combined = (A - multiplier * A_cost) /
// (1 + multiplier).
struct DualGaeArguments {
  GaeArguments reward;
  GaeArguments cost;  // the same flags
  float multiplier;
  float* combined;  // (B, T)
};

// c * x, where c = 0 means that the trace stops: what lies behind is not seen, NaN included.
ALIGNKIT_HOST_DEVICE inline float carried(float c, float x) { return c == 0.0f ? 0.0f : c * x; }

}  // namespace alignkit
