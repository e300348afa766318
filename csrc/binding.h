// What the pybind11 modules _cpu and _cuda share: addresses in, checked arguments out. Python
// has checked the tensors (alignkit/ops/dispatch.py); this catches a caller that went past it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "gae.h"
#include "grouped.h"

namespace alignkit {

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void require_sizes(std::int64_t rows, std::int64_t columns) {
  if (rows < 0 || columns < 0) throw std::invalid_argument("sizes must not be negative");
}

inline void require(std::uintptr_t address, const char* name) {
  if (!address) throw std::invalid_argument(std::string(name) + " must not be null");
}

inline GaeArguments gae_arguments(std::uintptr_t rewards, std::uintptr_t values,
                                  std::uintptr_t terminated, std::uintptr_t truncated,
                                  std::uintptr_t bootstrap, std::uintptr_t mask,
                                  std::uintptr_t supported, float v_min, float gamma, float lam,
                                  std::uintptr_t advantages, std::uintptr_t targets,
                                  std::int64_t B, std::int64_t T) {
  require_sizes(B, T);
  if (B > 0 && T > 0) {
    require(rewards, "rewards");
    require(values, "values");
    require(advantages, "advantages");
    if (supported) require(targets, "targets");
  }
  return {at<const float>(rewards),
          at<const float>(values),
          at<const std::uint8_t>(terminated),
          at<const std::uint8_t>(truncated),
          at<const float>(bootstrap),
          at<const std::uint8_t>(mask),
          at<const std::uint8_t>(supported),
          v_min,
          gamma,
          gamma * lam,
          at<float>(advantages),
          at<float>(targets),
          B,
          T};
}

inline DualGaeArguments dual_gae_arguments(
    std::uintptr_t rewards, std::uintptr_t costs, std::uintptr_t values,
    std::uintptr_t cost_values, std::uintptr_t terminated, std::uintptr_t truncated,
    std::uintptr_t mask, float gamma, float lam, float multiplier, std::uintptr_t advantages,
    std::uintptr_t cost_advantages, std::uintptr_t combined, std::int64_t B, std::int64_t T) {
  const auto of = [&](std::uintptr_t x, std::uintptr_t v, std::uintptr_t out) {
    return gae_arguments(x, v, terminated, truncated, 0, mask, 0, 0.0f, gamma, lam, out, 0, B, T);
  };
  if (B > 0 && T > 0) {
    require(costs, "costs");
    require(cost_values, "cost_values");
    require(cost_advantages, "cost_advantages");
    require(combined, "combined");
  }
  return {of(rewards, values, advantages), of(costs, cost_values, cost_advantages), multiplier,
          at<float>(combined)};
}

inline GroupedArguments grouped_arguments(std::uintptr_t rewards, std::uintptr_t mask,
                                          std::uintptr_t offsets, std::int64_t group_size,
                                          int baseline, int scale, std::uintptr_t batch_std,
                                          double eps, std::uintptr_t advantages,
                                          std::int64_t G) {
  require_sizes(G, group_size);
  if (baseline < 0 || baseline > 2 || scale < 0 || scale > 2)
    throw std::invalid_argument("baseline and scale must be 0, 1 or 2");
  if (G > 0) {
    require(rewards, "rewards");
    require(advantages, "advantages");
    if (scale == static_cast<int>(Scale::batch)) require(batch_std, "batch_std");
  }
  return {at<const float>(rewards),
          at<const std::uint8_t>(mask),
          at<const std::int64_t>(offsets),
          group_size,
          static_cast<Baseline>(baseline),
          static_cast<Scale>(scale),
          at<const double>(batch_std),
          eps,
          at<float>(advantages),
          G};
}

}  // namespace alignkit
