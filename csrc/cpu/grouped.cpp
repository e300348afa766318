// Advantages of answers within their group (GRPO, arXiv:2402.03300; Dr. GRPO, 2503.20783;
// RLOO, 2402.14740): mean first, then deviations, so that close rewards keep their differences.
#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace alignkit {
namespace {

constexpr int kLanes = 4;

// Any size, any mask. A double holds the sum of equal floats without rounding: equal rewards
// deviate by zero.
void any_group(const GroupedArguments& x, Span span) {
  const float* rewards = x.rewards + span.start;
  const std::uint8_t* mask = x.mask ? x.mask + span.start : nullptr;
  float* advantages = x.advantages + span.start;
  double sum = 0.0;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < span.size; ++i)
    if (!mask || mask[i]) {
      sum += rewards[i];
      ++count;
    }
  if (count == 0 || alone(x, count)) {
    std::fill_n(advantages, span.size, 0.0f);
    return;
  }
  const double n = static_cast<double>(count), mean = sum / n;
  double squares = 0.0;
  if (x.scale == Scale::std)
    for (std::int64_t i = 0; i < span.size; ++i)
      if (!mask || mask[i]) squares += (rewards[i] - mean) * (rewards[i] - mean);
  const double slope = stretch(x, n) / divisor(x, std::sqrt(squares / (n - 1.0)));
  const double origin = x.baseline == Baseline::none ? 0.0 : mean;
  for (std::int64_t i = 0; i < span.size; ++i)
    advantages[i] =
        !mask || mask[i] ? static_cast<float>(slope * (rewards[i] - origin)) : 0.0f;
}

float total(const float* lanes) { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }

// Overwrites kSize rewards with their deviations from the mean and returns the sum of squares.
// Deviations are taken from the first reward before they are summed: those of equal rewards
// are zero.
template <int kSize>
float deviations(const float* rewards, float* d) {
  float sum[kLanes] = {}, squares[kLanes] = {};
  const float first = rewards[0];
  for (int i = 0; i < kSize; ++i) d[i] = rewards[i] - first;
  for (int i = 0; i < kSize; i += kLanes)
    for (int l = 0; l < kLanes; ++l) sum[l] += d[i + l];
  const float mean = total(sum) * (1.0f / kSize);
  for (int i = 0; i < kSize; ++i) d[i] -= mean;
  for (int i = 0; i < kSize; i += kLanes)
    for (int l = 0; l < kLanes; ++l) squares[l] += d[i + l] * d[i + l];
  return total(squares);
}

// Groups of kSize rewards that all count, in floats. Square roots and divisions of a batch of
// groups stand side by side, where a compiler can vectorise them.
template <int kSize>
void fixed_groups(const GroupedArguments& x) {
  constexpr int kBatch = 32;
  float d[kBatch][kSize], slope[kBatch];
  const double factor = stretch(x, kSize);
  const double common = factor / divisor(x, 0.0);  // not used where the scale is the group's
  for (std::int64_t first = 0; first < x.G; first += kBatch) {
    const int n = static_cast<int>(std::min<std::int64_t>(kBatch, x.G - first));
    const float* rewards = x.rewards + first * kSize;
    float* advantages = x.advantages + first * kSize;
    for (int g = 0; g < n; ++g) slope[g] = deviations<kSize>(rewards + g * kSize, d[g]);
    for (int g = 0; g < n; ++g) {
      const double own = factor / divisor(x, std::sqrt(double{slope[g]} / (kSize - 1)));
      slope[g] = static_cast<float>(x.scale == Scale::std ? own : common);
    }
    for (int g = 0; g < n; ++g) {
      const float* from = x.baseline == Baseline::none ? rewards + g * kSize : d[g];
      for (int i = 0; i < kSize; ++i) advantages[g * kSize + i] = slope[g] * from[i];
    }
  }
}

}  // namespace

void grouped_advantage(const GroupedArguments& x) {
  if (!x.offsets && !x.mask) {
    switch (x.group_size) {
      case 4: return fixed_groups<4>(x);
      case 8: return fixed_groups<8>(x);
      case 16: return fixed_groups<16>(x);
      case 32: return fixed_groups<32>(x);
      case 64: return fixed_groups<64>(x);
    }
  }
  for (std::int64_t g = 0; g < x.G; ++g) any_group(x, group(x, g));
}

}  // namespace alignkit
