// What the pybind11 modules _cpu and _cuda share: addresses in, checked arguments out. Python
// has checked the tensors (alignkit/ops/dispatch.py); this catches a caller that went past it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fusion.h"
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

inline FusionTokens fusion_tokens(std::uintptr_t queries, std::uintptr_t visual,
                                  std::uintptr_t tactile, std::uintptr_t visual_mask,
                                  std::uintptr_t tactile_mask, bool bfloat16, std::int64_t B,
                                  std::int64_t H, std::int64_t D, std::int64_t Nv,
                                  std::int64_t Nt) {
  require_sizes(B, H);
  require_sizes(Nv, Nt);
  if (H == 0 || D <= 0) throw std::invalid_argument("H and D must be positive");
  if (B > 0) {
    require(queries, "queries");
    if (Nv > 0) require(visual, "visual");
    if (Nt > 0) require(tactile, "tactile");
  }
  return {at<const float>(queries),
          at<const void>(visual),
          at<const void>(tactile),
          at<const std::uint8_t>(visual_mask),
          at<const std::uint8_t>(tactile_mask),
          bfloat16,
          B,
          H,
          D,
          Nv,
          Nt};
}

inline FusionResults fusion_results(const FusionTokens& x, std::uintptr_t context,
                                    std::uintptr_t weights, std::uintptr_t log_sum) {
  if (x.B > 0) {
    require(context, "context");
    require(weights, "weights");
    require(log_sum, "log_sum");
  }
  return {at<float>(context), at<float>(weights), at<float>(log_sum)};
}

inline FusionGradients fusion_gradients(const FusionTokens& x, std::uintptr_t log_sum,
                                        std::uintptr_t grad_context,
                                        std::uintptr_t grad_weights, std::uintptr_t mean_grad,
                                        std::uintptr_t grad_queries, std::uintptr_t grad_visual,
                                        std::uintptr_t grad_tactile) {
  if (x.B > 0) {
    require(log_sum, "log_sum");
    require(grad_context, "grad_context");
    require(grad_weights, "grad_weights");
    require(mean_grad, "mean_grad");
    require(grad_queries, "grad_queries");
    if (x.Nv > 0) require(grad_visual, "grad_visual");
    if (x.Nt > 0) require(grad_tactile, "grad_tactile");
  }
  return {at<const float>(log_sum),   at<const float>(grad_context),
          at<const float>(grad_weights), at<const float>(mean_grad),
          at<float>(grad_queries),    at<void>(grad_visual),
          at<void>(grad_tactile)};
}

}  // namespace alignkit
