// The module alignkit._cpu. Tensors arrive as addresses, which costs a quarter of a
// microsecond and works for every dtype; Python has checked them (alignkit/ops/dispatch.py).
#include <pybind11/pybind11.h>

#include "binding.h"
#include "kernels.h"

namespace py = pybind11;
using namespace alignkit;

namespace {

void bound_gae(std::uintptr_t rewards, std::uintptr_t values, std::uintptr_t terminated,
               std::uintptr_t truncated, std::uintptr_t bootstrap, std::uintptr_t mask,
               std::uintptr_t supported, float v_min, float gamma, float lam,
               std::uintptr_t advantages, std::uintptr_t targets, std::int64_t B,
               std::int64_t T) {
  gae(gae_arguments(rewards, values, terminated, truncated, bootstrap, mask, supported, v_min,
                    gamma, lam, advantages, targets, B, T));
}

void bound_dual_gae(std::uintptr_t rewards, std::uintptr_t costs, std::uintptr_t values,
                    std::uintptr_t cost_values, std::uintptr_t terminated,
                    std::uintptr_t truncated, std::uintptr_t mask, float gamma, float lam,
                    float multiplier, std::uintptr_t advantages, std::uintptr_t cost_advantages,
                    std::uintptr_t combined, std::int64_t B, std::int64_t T) {
  dual_gae(dual_gae_arguments(rewards, costs, values, cost_values, terminated, truncated, mask,
                              gamma, lam, multiplier, advantages, cost_advantages, combined, B,
                              T));
}

void bound_grouped(std::uintptr_t rewards, std::uintptr_t mask, std::uintptr_t offsets,
                   std::int64_t group_size, int baseline, int scale, std::uintptr_t batch_std,
                   double eps, std::uintptr_t advantages, std::int64_t G) {
  grouped_advantage(grouped_arguments(rewards, mask, offsets, group_size, baseline, scale,
                                      batch_std, eps, advantages, G));
}

void bound_comparison(std::uintptr_t scores, std::uintptr_t complete,
                      std::uintptr_t answer_scores, std::uintptr_t judged, std::int64_t P,
                      std::int64_t n) {
  require_sizes(P, n);
  if (P > 0 && n > 0) {
    require(scores, "scores");
    require(answer_scores, "answer_scores");
    require(judged, "judged");
  }
  grouped_comparison({at<const float>(scores), at<const std::uint8_t>(complete),
                      at<float>(answer_scores), at<std::uint8_t>(judged), P, n});
}

TokenLogpsArguments token_arguments(std::uintptr_t logits, bool bfloat16, std::int64_t stride,
                                    std::uintptr_t ids, float temperature, std::uintptr_t logps,
                                    std::uintptr_t entropy, std::uintptr_t top,
                                    std::uintptr_t log_sum, std::int64_t N, std::int64_t V) {
  require_sizes(N, V);
  if (N > 0) {
    require(logits, "logits");
    require(ids, "ids");
  }
  return {at<const void>(logits),
          bfloat16 ? Dtype::bfloat16 : Dtype::float32,
          stride,
          at<const std::int64_t>(ids),
          temperature,
          at<float>(logps),
          at<float>(entropy),
          at<float>(top),
          at<float>(log_sum),
          N,
          V};
}

void bound_token_logps(std::uintptr_t logits, bool bfloat16, std::int64_t stride,
                       std::uintptr_t ids, float temperature, std::uintptr_t logps,
                       std::uintptr_t entropy, std::uintptr_t top, std::uintptr_t log_sum,
                       std::int64_t N, std::int64_t V, int threads) {
  token_logps(token_arguments(logits, bfloat16, stride, ids, temperature, logps, entropy, top,
                              log_sum, N, V),
              threads);
}

void bound_token_logps_backward(std::uintptr_t grad_logps, std::uintptr_t grad_entropy,
                                std::uintptr_t logits, bool bfloat16, std::int64_t stride,
                                std::uintptr_t ids, float temperature, std::uintptr_t entropy,
                                std::uintptr_t top, std::uintptr_t log_sum, std::int64_t N,
                                std::int64_t V, std::uintptr_t grad, int threads) {
  token_logps_backward(token_arguments(logits, bfloat16, stride, ids, temperature, 0, entropy,
                                       top, log_sum, N, V),
                       at<const float>(grad_logps), at<const float>(grad_entropy),
                       at<void>(grad), threads);
}

void bound_sample_tokens(std::uintptr_t logits, bool bfloat16, std::int64_t stride,
                         std::uintptr_t uniforms, float temperature, std::uintptr_t ids,
                         std::uintptr_t logps, std::int64_t N, std::int64_t V, int threads) {
  require_sizes(N, V);
  if (N > 0) {
    if (V == 0) throw std::invalid_argument("V must be positive");
    require(logits, "logits");
    require(uniforms, "uniforms");
    require(ids, "ids");
    require(logps, "logps");
  }
  sample_tokens({at<const void>(logits), bfloat16 ? Dtype::bfloat16 : Dtype::float32, stride,
                 at<const float>(uniforms), temperature, at<std::int64_t>(ids),
                 at<float>(logps), N, V},
                threads);
}

void bound_policy_loss(std::uintptr_t logps, std::uintptr_t old_logps, std::uintptr_t advantages,
                       bool advantage_per_row, std::uintptr_t mask, std::uintptr_t ref_logps,
                       float eps_low, float eps_high, float beta, int kl, int reduction,
                       std::uintptr_t loss, std::uintptr_t figures, std::uintptr_t divisor,
                       std::uintptr_t grad, std::int64_t B, std::int64_t T) {
  require_sizes(B, T);
  require(loss, "loss");
  require(figures, "figures");
  require(divisor, "divisor");
  if (kl < 0 || kl > 2 || reduction < 0 || reduction > 2)
    throw std::invalid_argument("kl and reduction must be 0, 1 or 2");
  if (B > 0 && T > 0) {
    require(logps, "logps");
    require(old_logps, "old_logps");
    require(advantages, "advantages");
  }
  clipped_policy_loss({at<const float>(logps), at<const float>(old_logps),
                       at<const float>(advantages), advantage_per_row,
                       at<const std::uint8_t>(mask), at<const float>(ref_logps), eps_low,
                       eps_high, beta, static_cast<Kl>(kl), static_cast<Reduction>(reduction),
                       at<float>(loss), at<float>(figures), at<float>(divisor), at<float>(grad),
                       B, T});
}

void bound_policy_loss_backward(std::uintptr_t grad, float factor, std::uintptr_t out,
                                std::int64_t n) {
  require_sizes(n, 0);
  if (n > 0) {
    require(grad, "grad");
    require(out, "out");
  }
  clipped_policy_loss_backward(at<const float>(grad), factor, at<float>(out), n);
}

void bound_fusion(std::uintptr_t queries, std::uintptr_t visual, std::uintptr_t tactile,
                  std::uintptr_t visual_mask, std::uintptr_t tactile_mask, bool bfloat16,
                  std::int64_t B, std::int64_t H, std::int64_t D, std::int64_t Nv,
                  std::int64_t Nt, std::uintptr_t context, std::uintptr_t weights,
                  std::uintptr_t log_sum, int threads) {
  const FusionTokens x = fusion_tokens(queries, visual, tactile, visual_mask, tactile_mask,
                                       bfloat16, B, H, D, Nv, Nt);
  attention_fusion(x, fusion_results(x, context, weights, log_sum), threads);
}

void bound_fusion_backward(std::uintptr_t queries, std::uintptr_t visual, std::uintptr_t tactile,
                           std::uintptr_t visual_mask, std::uintptr_t tactile_mask,
                           bool bfloat16, std::int64_t B, std::int64_t H, std::int64_t D,
                           std::int64_t Nv, std::int64_t Nt, std::uintptr_t log_sum,
                           std::uintptr_t grad_context, std::uintptr_t grad_weights,
                           std::uintptr_t mean_grad, std::uintptr_t grad_queries,
                           std::uintptr_t grad_visual, std::uintptr_t grad_tactile,
                           int threads) {
  const FusionTokens x = fusion_tokens(queries, visual, tactile, visual_mask, tactile_mask,
                                       bfloat16, B, H, D, Nv, Nt);
  attention_fusion_backward(
      x, fusion_gradients(x, log_sum, grad_context, grad_weights, mean_grad, grad_queries,
                          grad_visual, grad_tactile), threads);
}

RotaryAttentionArguments rotary_arguments(std::uintptr_t qkv, std::uintptr_t cos,
                                          std::uintptr_t sin, bool rotary_per_row,
                                          std::uintptr_t mask, float scale, std::int64_t B,
                                          std::int64_t n, std::int64_t H, std::int64_t G,
                                          std::int64_t D) {
  require_sizes(B, n);
  if (H <= 0 || G <= 0 || H % G || D <= 0 || D % 16 || D > 256)
    throw std::invalid_argument("G must divide H, and 16 D up to 256");
  if (B > 0 && n > 0) {
    require(cos, "cos");
    require(sin, "sin");
  }
  return {at<const float>(qkv), at<const float>(cos), at<const float>(sin),
          rotary_per_row ? n * D : 0, at<const std::uint8_t>(mask), nullptr, nullptr, 0, nullptr,
          nullptr, scale, B, n, 0, H, G, D};
}

// Of what was read before, and of the tokens to come.
void remember(std::uintptr_t keys, std::uintptr_t values, std::int64_t room, std::int64_t start,
              RotaryAttentionArguments& x) {
  require_sizes(room, start);
  const bool fits = keys ? room % 16 == 0 && start + x.n <= room : start == 0;
  if (x.B > 0 && (!keys != !values || !fits))
    throw std::invalid_argument("keys and values must hold start + n of room, in whole vectors");
  x.keys = at<float>(keys);
  x.values = at<float>(values);
  x.room = room;
  x.start = start;
}

void bound_rotary_attention(std::uintptr_t qkv, std::uintptr_t cos, std::uintptr_t sin,
                            bool rotary_per_row, std::uintptr_t mask, float scale,
                            std::int64_t B, std::int64_t n, std::int64_t H, std::int64_t G,
                            std::int64_t D, std::uintptr_t keys, std::uintptr_t values,
                            std::int64_t room, std::int64_t start, std::uintptr_t out,
                            std::uintptr_t log_sum, int threads) {
  auto x = rotary_arguments(qkv, cos, sin, rotary_per_row, mask, scale, B, n, H, G, D);
  remember(keys, values, room, start, x);
  if (B > 0 && n > 0) {
    require(qkv, "qkv");
    require(out, "out");
  }
  x.out = at<float>(out);
  x.log_sum = at<float>(log_sum);
  rotary_attention(x, threads);
}

void bound_rotary_attention_backward(std::uintptr_t qkv, std::uintptr_t cos, std::uintptr_t sin,
                                     bool rotary_per_row, std::uintptr_t mask, float scale,
                                     std::int64_t B, std::int64_t n, std::int64_t H,
                                     std::int64_t G, std::int64_t D, std::uintptr_t log_sum,
                                     std::uintptr_t grad_out, std::uintptr_t grad_qkv,
                                     int threads) {
  auto x = rotary_arguments(qkv, cos, sin, rotary_per_row, mask, scale, B, n, H, G, D);
  if (B > 0 && n > 0) {
    require(qkv, "qkv");
    require(log_sum, "log_sum");
    require(grad_out, "grad_out");
    require(grad_qkv, "grad_qkv");
  }
  x.log_sum = at<float>(log_sum);
  rotary_attention_backward(x, at<const float>(grad_out), at<float>(grad_qkv), threads);
}

void bound_decoder_layer(std::uintptr_t x, std::uintptr_t weights, float eps, std::int64_t W,
                         std::int64_t F, std::uintptr_t cos, std::uintptr_t sin,
                         bool rotary_per_row, std::uintptr_t mask, float scale, std::int64_t B,
                         std::int64_t n, std::int64_t H, std::int64_t G, std::int64_t D,
                         std::uintptr_t keys, std::uintptr_t values, std::int64_t room,
                         std::int64_t start, std::uintptr_t y, int threads) {
  auto attention = rotary_arguments(0, cos, sin, rotary_per_row, mask, scale, B, n, H, G, D);
  remember(keys, values, room, start, attention);
  if (W <= 0 || W % 16 || F <= 0 || F % 16)
    throw std::invalid_argument("W and F must be multiples of 16");
  if (B > 0 && n > 0) {
    require(x, "x");
    require(weights, "weights");
    require(keys, "keys");
    require(y, "y");
  }
  decoder_layer({at<const float>(x), at<const float>(weights), at<float>(y), eps, W, F, attention},
                threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of alignkit.ops; arguments are addresses and sizes.";
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("gae", &bound_gae, no_gil);
  m.def("dual_gae", &bound_dual_gae, no_gil);
  m.def("grouped_advantage", &bound_grouped, no_gil);
  m.def("grouped_comparison", &bound_comparison, no_gil);
  m.def("token_logps", &bound_token_logps, no_gil);
  m.def("token_logps_backward", &bound_token_logps_backward, no_gil);
  m.def("sample_tokens", &bound_sample_tokens, no_gil);
  m.def("clipped_policy_loss", &bound_policy_loss, no_gil);
  m.def("clipped_policy_loss_backward", &bound_policy_loss_backward, no_gil);
  m.def("attention_fusion", &bound_fusion, no_gil);
  m.def("attention_fusion_backward", &bound_fusion_backward, no_gil);
  m.def("rotary_attention", &bound_rotary_attention, no_gil);
  m.def("rotary_attention_backward", &bound_rotary_attention_backward, no_gil);
  m.def("decoder_layer", &bound_decoder_layer, no_gil);
}
