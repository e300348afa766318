// What the C++ and the CUDA kernels of `attention_fusion` receive.
#pragma once

#include <cstdint>

#include "layout.h"

namespace alignkit {

// Tokens are (B, Nv, D) and (B, Nt, D), float or the upper halves of floats; queries, already
// multiplied with the key projection and the scale, are (B, H, D). A null mask: all count.
struct FusionTokens {
  const float* queries;
  const void* visual;
  const void* tactile;
  const std::uint8_t* visual_mask;   // (B, Nv)
  const std::uint8_t* tactile_mask;  // (B, Nt)
  bool bfloat16;
  std::int64_t B;
  std::int64_t H;
  std::int64_t D;
  std::int64_t Nv;
  std::int64_t Nt;
};

struct FusionResults {
  float* context;  // (B, H, D) tokens weighted by attention
  float* weights;  // (B, H, 2) attention on each modality
  float* log_sum;  // (B, H) log of the softmax's denominator
};

struct FusionGradients {
  const float* log_sum;       // (B, H) of the forward pass
  const float* grad_context;  // (B, H, D)
  const float* grad_weights;  // (B, H, 2)
  const float* mean_grad;     // (B, H) sum over the tokens of attention times its gradient
  float* grad_queries;        // (B, H, D)
  void* grad_visual;          // of the shape and kind of the tokens
  void* grad_tactile;
};

// What one CUDA kernel of the backward pass hands to the other.
struct FusionWorkspace {
  float* attention;    // (B, H, Nv + Nt)
  float* grad_scores;  // (B, H, Nv + Nt)
};

constexpr std::int64_t kMostColumns = 1024;  // D of the CUDA kernels

}  // namespace alignkit
