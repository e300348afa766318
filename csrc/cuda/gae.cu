// Generalized advantage estimation (Schulman et al. 2016, eq. 16) with ends, cuts, skipped
// steps, and BSPO's floor under unsupported steps (arXiv:2503.18130, eq. 7).
//
// One warp owns one row and walks it from its end, 32 steps at a time. Lane l holds step
// t = last - l, so loads stay coalesced and the scan over (a, c) runs forward over lanes:
// advantage = a + c * (advantage of the step after it). What crosses a block of 32, the carry,
// is the same in every lane. Deterministic: no atomics, a fixed order of additions.
#include "device_guard.h"
#include "kernels.h"

namespace alignkit {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr unsigned kAll = 0xffffffffu;

struct Carry {
  float advantage;   // of the counted step to the right
  float next_value;  // of the counted step to the right
  // The target of the last step seen depends on the support of the counted step before it,
  // which stands further left: it waits here. -1: none waits.
  std::int64_t waiting;
  float waiting_target;
};

// Value after each lane's step, from the next counted step to the right (a lower lane).
__device__ float value_after(float value, unsigned counted, int lane, Carry& carry) {
  const unsigned right = counted & ((1u << lane) - 1u);
  const int source = right ? 31 - __clz(right) : 0;
  const float seen = __shfl_sync(kAll, value, source);
  const float after = right ? seen : carry.next_value;
  if (counted) carry.next_value = __shfl_sync(kAll, value, 31 - __clz(counted));
  return after;
}

__device__ float scan(float a, float c, int lane, Carry& carry) {
  for (int step = 1; step < kWarp; step *= 2) {
    const float right_a = __shfl_up_sync(kAll, a, step);
    const float right_c = __shfl_up_sync(kAll, c, step);
    if (lane >= step) {
      a += carried(c, right_a);
      c *= right_c;
    }
  }
  const float advantage = a + carried(c, carry.advantage);
  carry.advantage = __shfl_sync(kAll, advantage, kWarp - 1);
  return advantage;
}

// Stores the targets whose left neighbour is known and lets the leftmost one wait.
__device__ void value_targets(const GaeArguments& x, std::int64_t start, std::int64_t t,
                              float target, bool counts, unsigned counted, unsigned unsupported,
                              int lane, Carry& carry) {
  if (t >= 0 && !counts) x.targets[start + t] = 0.0f;
  if (!counted) return;
  const int nearest = __ffs(counted) - 1;
  if (carry.waiting >= 0 && lane == 0)
    x.targets[start + carry.waiting] =
        (unsupported >> nearest) & 1u ? x.v_min : carry.waiting_target;
  const unsigned left = lane == 31 ? 0u : counted & (kAll << (lane + 1));
  if (counts && left)
    x.targets[start + t] = (unsupported >> (__ffs(left) - 1)) & 1u ? x.v_min : target;
  const int leftmost = 31 - __clz(counted);
  carry.waiting = __shfl_sync(kAll, t, leftmost);
  carry.waiting_target = __shfl_sync(kAll, target, leftmost);
}

__global__ void gae_kernel(GaeArguments x) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= x.B) return;  // a whole warp leaves
  const int lane = threadIdx.x % kWarp;
  const std::int64_t start = row_start(row, x.T);
  const float* values = x.values + row_start(row, x.T + 1);
  Carry carry{0.0f, x.terminated ? values[x.T] : 0.0f, -1, 0.0f};
  for (std::int64_t last = x.T - 1; last >= 0; last -= kWarp) {
    const std::int64_t t = last - lane;
    const bool real = t >= 0;
    const bool counts = real && (!x.mask || x.mask[start + t]);
    const bool supported = !real || !x.supported || x.supported[start + t];
    const bool ends = real && x.terminated && x.terminated[start + t];
    const bool cut = real && x.truncated && x.truncated[start + t];
    const float value = real ? values[t] : 0.0f;
    const unsigned counted = __ballot_sync(kAll, counts);
    float after = value_after(value, counted, lane, carry);
    if (cut) after = x.bootstrap ? x.bootstrap[start + t] : values[t + 1];
    if (ends) after = 0.0f;
    if (!supported) after = x.v_min;
    const float reward = real && supported ? x.rewards[start + t] : 0.0f;
    const float a = counts ? reward + x.gamma * after - value : 0.0f;
    const float c = !counts ? 1.0f : cut || ends || !supported ? 0.0f : x.decay;
    const float advantage = scan(a, c, lane, carry);
    if (real) x.advantages[start + t] = counts ? advantage : 0.0f;
    if (x.targets) {
      const unsigned unsupported = __ballot_sync(kAll, !supported);
      value_targets(x, start, t, advantage + value, counts, counted, unsupported, lane, carry);
    }
  }
  if (x.targets && carry.waiting >= 0 && lane == 0)
    x.targets[start + carry.waiting] = carry.waiting_target;
}

}  // namespace

cudaError_t gae_on_device(const GaeArguments& args, int device, cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto blocks = static_cast<unsigned>((args.B + kWarpsPerBlock - 1) / kWarpsPerBlock);
  gae_kernel<<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace alignkit
