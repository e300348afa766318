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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of alignkit.ops; arguments are device addresses, sizes, a stream.";
  m.def("device_count", &device_count);
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("gae", &bound_gae, no_gil);
  m.def("dual_gae", &bound_dual_gae, no_gil);
  m.def("grouped_advantage", &bound_grouped, no_gil);
}
