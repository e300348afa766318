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

// A row, from its end. All lanes of a warp hold the same row.
struct Row {
  const GaeArguments& x;
  std::int64_t start;
  const float* values;
  Carry carry;

  __device__ Row(const GaeArguments& args, std::int64_t row)
      : x(args),
        start(row_start(row, args.T)),
        values(args.values + row_start(row, args.T + 1)),
        carry{0.0f, args.terminated ? values[args.T] : 0.0f, -1, 0.0f} {}

  // The 32 steps that end at `last`; those behind them are done. Returns what it stored: the
  // advantage of the lane's step.
  __device__ float walk(std::int64_t last, int lane) {
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
    const float kept = counts ? advantage : 0.0f;
    if (real) x.advantages[start + t] = kept;
    if (x.targets) {
      const unsigned unsupported = __ballot_sync(kAll, !supported);
      value_targets(x, start, t, advantage + value, counts, counted, unsupported, lane, carry);
    }
    return kept;
  }

  __device__ void finish(int lane) {
    if (x.targets && carry.waiting >= 0 && lane == 0)
      x.targets[start + carry.waiting] = carry.waiting_target;
  }
};

__device__ std::int64_t row_of_warp() {
  return std::int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / kWarp;
}

__global__ void gae_kernel(GaeArguments x) {
  if (row_of_warp() >= x.B) return;  // a whole warp leaves
  const int lane = threadIdx.x % kWarp;
  Row row(x, row_of_warp());
  for (std::int64_t last = x.T - 1; last >= 0; last -= kWarp) row.walk(last, lane);
  row.finish(lane);
}

__global__ void dual_gae_kernel(DualGaeArguments x) {
  if (row_of_warp() >= x.reward.B) return;
  const int lane = threadIdx.x % kWarp;
  const float share = 1.0f / (1.0f + x.multiplier);
  Row reward(x.reward, row_of_warp()), cost(x.cost, row_of_warp());
  for (std::int64_t last = x.reward.T - 1; last >= 0; last -= kWarp) {
    const float gain = reward.walk(last, lane), price = cost.walk(last, lane);
    if (last >= lane) x.combined[reward.start + last - lane] = share * (gain - x.multiplier * price);
  }
}

template <class Kernel, class Arguments>
cudaError_t on_device(Kernel kernel, const Arguments& args, std::int64_t B, int device,
                      cudaStream_t stream) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto blocks = static_cast<unsigned>((B + kWarpsPerBlock - 1) / kWarpsPerBlock);
  kernel<<<blocks, kWarpsPerBlock * kWarp, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gae_on_device(const GaeArguments& args, int device, cudaStream_t stream) {
  return on_device(gae_kernel, args, args.B, device, stream);
}

cudaError_t dual_gae_on_device(const DualGaeArguments& args, int device, cudaStream_t stream) {
  return on_device(dual_gae_kernel, args, args.reward.B, device, stream);
}

}  // namespace alignkit
