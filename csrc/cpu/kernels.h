// Entry points of the C++ kernels; bindings.cpp hands them to Python.
#pragma once

#include <cstdint>

#include "fusion.h"
#include "gae.h"
#include "grouped.h"

namespace alignkit {

void gae(const GaeArguments& args);

void dual_gae(const DualGaeArguments& args);

void grouped_advantage(const GroupedArguments& args);

// (P, n, n, 2) scores of the first and the second of each ordered pair, NaN where none was asked
// for; (P, n) of everything else.
struct ComparisonArguments {
  const float* scores;
  const std::uint8_t* complete;  // null: all answers are
  float* answer_scores;          // NaN where not judged
  std::uint8_t* judged;
  std::int64_t P;
  std::int64_t n;
};

void grouped_comparison(const ComparisonArguments& args);

enum class Dtype { float32, bfloat16 };

// (N, V) logits whose rows are `stride` elements apart, and (N,) of everything else.
struct TokenLogpsArguments {
  const void* logits;
  Dtype dtype;
  std::int64_t stride;
  const std::int64_t* ids;
  float temperature;
  float* logps;
  float* entropy;
  float* top;      // largest logit of the row
  float* log_sum;  // log sum exp((logit - top) / temperature)
  std::int64_t N;
  std::int64_t V;
};

void token_logps(const TokenLogpsArguments& args, int threads);

// From what the forward pass kept; `grad` is (N, V) without gaps, in the dtype of `logits`.
void token_logps_backward(const TokenLogpsArguments& kept, const float* grad_logps,
                          const float* grad_entropy, void* grad, int threads);

// (N, V) logits whose rows are `stride` elements apart, and (N,) of everything else.
struct SampleTokensArguments {
  const void* logits;
  Dtype dtype;
  std::int64_t stride;
  const float* uniforms;  // in [0, 1]
  float temperature;
  std::int64_t* ids;
  float* logps;  // of the drawn tokens; NaN where a row has no finite distribution
  std::int64_t N;
  std::int64_t V;
};

void sample_tokens(const SampleTokensArguments& args, int threads);

enum class Kl { k1, k2, k3 };

enum class Reduction { token, sequence, sum };

// What is logged of `clipped_policy_loss`, as means over the steps that count.
constexpr int kPolicyFigures = 4;  // clipped below, clipped above, kl, old - new

// (B, T) without gaps. A null pointer is an argument that was not given.
struct PolicyLossArguments {
  const float* logps;
  const float* old_logps;
  const float* advantages;
  bool advantage_per_row;  // advantages are (B,)
  const std::uint8_t* mask;
  const float* ref_logps;
  float eps_low;
  float eps_high;
  float beta;
  Kl kl;
  Reduction reduction;
  float* loss;
  float* figures;  // (kPolicyFigures,)
  float* divisor;  // of the sum over rows
  float* grad;     // of that sum by `logps`; null: not wanted
  std::int64_t B;
  std::int64_t T;
};

void clipped_policy_loss(const PolicyLossArguments& args);

// `n` numbers times a factor, on the thread that calls: torch's multiplication wakes others.
void clipped_policy_loss_backward(const float* grad, float factor, float* out,
                                  std::int64_t n);

void attention_fusion(const FusionTokens& tokens, const FusionResults& results, int threads);

void attention_fusion_backward(const FusionTokens& tokens, const FusionGradients& gradients,
                               int threads);

// Queries, keys and values of new tokens side by side, arrays without gaps. D is a multiple of 16.
struct RotaryAttentionArguments {
  const float* qkv;  // (B, n, H + 2G, D)
  const float* cos;  // (B, n, D), or (n, D) where rotary_stride is 0
  const float* sin;
  std::int64_t rotary_stride;
  const std::uint8_t* mask;  // (B, start + n) 1 = may be seen; null: all may
  float* keys;               // (B, G, D, room) turned, of the tokens before; gets the new ones
  float* values;             // (B, G, room, D). Both null: nothing was before
  std::int64_t room;         // a multiple of 16
  float* out;                // (B, n, H, D)
  float* log_sum;            // (B, n, H) log sum e^score; inf: saw nothing. Null: not wanted
  float scale;               // of scores
  std::int64_t B;
  std::int64_t n;
  std::int64_t start;  // tokens before
  std::int64_t H;
  std::int64_t G;  // divides H
  std::int64_t D;
};

void rotary_attention(const RotaryAttentionArguments& args, int threads);

// Of tokens that nothing was before; `grad_qkv` is like `qkv`.
void rotary_attention_backward(const RotaryAttentionArguments& kept, const float* grad_out,
                               float* grad_qkv, int threads);

struct DecoderLayerArguments {
  const float* x;        // (B, n, W)
  const float* weights;  // norm (W), products qkv and out, norm (W), products gate, up and down
  float* y;              // (B, n, W)
  float eps;             // of both norms
  std::int64_t W;        // a multiple of 16
  std::int64_t F;        // width of the MLP, a multiple of 16
  RotaryAttentionArguments attention;  // with keys and values; without qkv and out
};

void decoder_layer(const DecoderLayerArguments& args, int threads);

}  // namespace alignkit
