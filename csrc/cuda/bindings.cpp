// The module alignkit._cuda. It carries its own CUDA runtime and imports without a driver, so
// that one build serves every machine and every torch.
#include <pybind11/pybind11.h>

#include "binding.h"
#include "kernels.h"

namespace py = pybind11;
using namespace alignkit;

namespace {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

void check(const char* name, cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(name) + " on CUDA: " + cudaGetErrorString(status));
}

void bound_gae(std::uintptr_t rewards, std::uintptr_t values, std::uintptr_t terminated,
               std::uintptr_t truncated, std::uintptr_t bootstrap, std::uintptr_t mask,
               std::uintptr_t supported, float v_min, float gamma, float lam,
               std::uintptr_t advantages, std::uintptr_t targets, std::int64_t B, std::int64_t T,
               int device, std::uintptr_t stream) {
  const GaeArguments args =
      gae_arguments(rewards, values, terminated, truncated, bootstrap, mask, supported, v_min,
                    gamma, lam, advantages, targets, B, T);
  if (B == 0 || T == 0) return;
  check("gae", gae_on_device(args, device, reinterpret_cast<cudaStream_t>(stream)));
}

void bound_dual_gae(std::uintptr_t rewards, std::uintptr_t costs, std::uintptr_t values,
                    std::uintptr_t cost_values, std::uintptr_t terminated,
                    std::uintptr_t truncated, std::uintptr_t mask, float gamma, float lam,
                    float multiplier, std::uintptr_t advantages, std::uintptr_t cost_advantages,
                    std::uintptr_t combined, std::int64_t B, std::int64_t T, int device,
                    std::uintptr_t stream) {
  const DualGaeArguments args =
      dual_gae_arguments(rewards, costs, values, cost_values, terminated, truncated, mask, gamma,
                         lam, multiplier, advantages, cost_advantages, combined, B, T);
  if (B == 0 || T == 0) return;
  check("dual_gae", dual_gae_on_device(args, device, reinterpret_cast<cudaStream_t>(stream)));
}

void bound_grouped(std::uintptr_t rewards, std::uintptr_t mask, std::uintptr_t offsets,
                   std::int64_t group_size, int baseline, int scale, std::uintptr_t batch_std,
                   double eps, std::uintptr_t advantages, std::int64_t G, int device,
                   std::uintptr_t stream) {
  const GroupedArguments args = grouped_arguments(rewards, mask, offsets, group_size, baseline,
                                                  scale, batch_std, eps, advantages, G);
  if (G == 0) return;
  check("grouped_advantage",
        grouped_on_device(args, device, reinterpret_cast<cudaStream_t>(stream)));
}

FusionTokens checked_tokens(std::uintptr_t queries, std::uintptr_t visual,
                            std::uintptr_t tactile, std::uintptr_t visual_mask,
                            std::uintptr_t tactile_mask, bool bfloat16, std::int64_t B,
                            std::int64_t H, std::int64_t D, std::int64_t Nv, std::int64_t Nt) {
  if (D > kMostColumns)
    throw std::invalid_argument("D: at most 1024 on CUDA; backend='triton' takes more");
  return fusion_tokens(queries, visual, tactile, visual_mask, tactile_mask, bfloat16, B, H, D, Nv,
                       Nt);
}

void bound_fusion(std::uintptr_t queries, std::uintptr_t visual, std::uintptr_t tactile,
                  std::uintptr_t visual_mask, std::uintptr_t tactile_mask, bool bfloat16,
                  std::int64_t B, std::int64_t H, std::int64_t D, std::int64_t Nv,
                  std::int64_t Nt, std::uintptr_t context, std::uintptr_t weights,
                  std::uintptr_t log_sum, int device, std::uintptr_t stream) {
  const FusionTokens x = checked_tokens(queries, visual, tactile, visual_mask, tactile_mask,
                                        bfloat16, B, H, D, Nv, Nt);
  const FusionResults out = fusion_results(x, context, weights, log_sum);
  if (B == 0) return;
  check("attention_fusion",
        fusion_on_device(x, out, device, reinterpret_cast<cudaStream_t>(stream)));
}

void bound_fusion_backward(std::uintptr_t queries, std::uintptr_t visual, std::uintptr_t tactile,
                           std::uintptr_t visual_mask, std::uintptr_t tactile_mask,
                           bool bfloat16, std::int64_t B, std::int64_t H, std::int64_t D,
                           std::int64_t Nv, std::int64_t Nt, std::uintptr_t log_sum,
                           std::uintptr_t grad_context, std::uintptr_t grad_weights,
                           std::uintptr_t mean_grad, std::uintptr_t grad_queries,
                           std::uintptr_t grad_visual, std::uintptr_t grad_tactile,
                           std::uintptr_t attention, std::uintptr_t grad_scores, int device,
                           std::uintptr_t stream) {
  const FusionTokens x = checked_tokens(queries, visual, tactile, visual_mask, tactile_mask,
                                        bfloat16, B, H, D, Nv, Nt);
  const FusionGradients g = fusion_gradients(x, log_sum, grad_context, grad_weights, mean_grad,
                                             grad_queries, grad_visual, grad_tactile);
  if (B > 0 && Nv + Nt > 0) {
    require(attention, "attention");
    require(grad_scores, "grad_scores");
  }
  if (B == 0) return;
  check("attention_fusion_backward",
        fusion_backward_on_device(x, g, {at<float>(attention), at<float>(grad_scores)}, device,
                                  reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of alignkit.ops; arguments are device addresses, sizes, a stream.";
  m.def("device_count", &device_count);
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("gae", &bound_gae, no_gil);
  m.def("dual_gae", &bound_dual_gae, no_gil);
  m.def("grouped_advantage", &bound_grouped, no_gil);
  m.def("attention_fusion", &bound_fusion, no_gil);
  m.def("attention_fusion_backward", &bound_fusion_backward, no_gil);
}
