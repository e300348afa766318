// Advantages of answers within their group (GRPO, arXiv:2402.03300; Dr. GRPO, 2503.20783;
// RLOO, 2402.14740): mean first, then deviations, so that close rewards keep their differences.
//
// A team of 4 to 32 lanes owns a group; sums are doubles, in a fixed order. Deterministic.
#include <cmath>

#include "device_guard.h"
#include "kernels.h"

namespace alignkit {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr unsigned kAll = 0xffffffffu;

// The sum over the lanes of a team, in every lane.
__device__ double team_sum(double x, int team) {
  for (int step = team / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

__global__ void grouped_kernel(GroupedArguments x, int team) {
  const std::int64_t thread =
      std::int64_t{blockIdx.x} * kWarpsPerBlock * kWarp + threadIdx.x;
  const std::int64_t g = thread / team;
  const int lane = static_cast<int>(thread % team);
  // A team without a group stays: the shuffles need every lane of the warp.
  const Span span = g < x.G ? group(x, g) : Span{0, 0};
  const float* rewards = x.rewards + span.start;
  const std::uint8_t* mask = x.mask ? x.mask + span.start : nullptr;
  double sum = 0.0, count = 0.0;
  for (std::int64_t i = lane; i < span.size; i += team)
    if (!mask || mask[i]) {
      sum += rewards[i];
      count += 1.0;
    }
  sum = team_sum(sum, team);
  count = team_sum(count, team);
  const double mean = sum / count;
  double squares = 0.0;
  if (x.scale == Scale::std)
    for (std::int64_t i = lane; i < span.size; i += team)
      if (!mask || mask[i]) squares += (rewards[i] - mean) * (rewards[i] - mean);
  squares = team_sum(squares, team);
  const bool zeros = count == 0.0 || alone(x, static_cast<std::int64_t>(count));
  const double slope = stretch(x, count) / divisor(x, std::sqrt(squares / (count - 1.0)));
  const double origin = x.baseline == Baseline::none ? 0.0 : mean;
  float* advantages = x.advantages + span.start;
  for (std::int64_t i = lane; i < span.size; i += team)
    advantages[i] = !zeros && (!mask || mask[i])
                        ? static_cast<float>(slope * (rewards[i] - origin))
                        : 0.0f;
}

// Lanes a group: as many as it has rewards, where that is known, within a warp.
int team_size(const GroupedArguments& x) {
  if (x.offsets) return 8;
  int team = 4;
  while (team < kWarp && team < x.group_size) team *= 2;
  return team;
}

}  // namespace

cudaError_t grouped_on_device(const GroupedArguments& args, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const int team = team_size(args);
  const std::int64_t groups_per_block = kWarpsPerBlock * kWarp / team;
  const auto blocks = static_cast<unsigned>((args.G + groups_per_block - 1) / groups_per_block);
  grouped_kernel<<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(args, team);
  return cudaGetLastError();
}

}  // namespace alignkit
