// Advantages of answers within their group (GRPO, arXiv:2402.03300; Dr. GRPO, 2503.20783;
// RLOO, 2402.14740): mean first, then deviations, so that close rewards keep their differences.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "wide.h"

#ifdef ALIGNKIT_V4
#include <immintrin.h>
#endif

namespace alignkit {
namespace {

constexpr int kLanes = 4;

// Adds up term(i) of i in [0, n), in a fixed order that waits less for the sum before it.
template <class Term>
double sum_of(std::int64_t n, Term term) {
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += term(i + l);
  for (; i < n; ++i) lanes[0] += term(i);
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// Any size, any mask. A double holds the sum of equal floats without rounding: equal rewards
// deviate by zero.
template <bool kMask>
void any_group(const GroupedArguments& x, Span span) {
  const float* rewards = x.rewards + span.start;
  const std::uint8_t* mask = kMask ? x.mask + span.start : nullptr;
  float* advantages = x.advantages + span.start;
  const auto counts = [&](std::int64_t i) { return !kMask || mask[i]; };
  std::int64_t count = span.size;
  if constexpr (kMask) count = std::count_if(mask, mask + count, [](auto m) { return m != 0; });
  if (count == 0 || alone(x, count)) {
    std::fill_n(advantages, span.size, 0.0f);
    return;
  }
  const double n = static_cast<double>(count);
  const auto counted = [&](std::int64_t i, double value) { return counts(i) ? value : 0.0; };
  const double mean =
      sum_of(span.size, [&](std::int64_t i) { return counted(i, rewards[i]); }) / n;
  double squares = 0.0;
  if (x.scale == Scale::std)
    squares = sum_of(span.size, [&](std::int64_t i) {
      const double d = counted(i, rewards[i] - mean);
      return d * d;
    });
  const double slope = stretch(x, n) / divisor(x, std::sqrt(squares / (n - 1.0)));
  const double origin = x.baseline == Baseline::none ? 0.0 : mean;
  for (std::int64_t i = 0; i < span.size; ++i)
    advantages[i] = static_cast<float>(counted(i, slope * (rewards[i] - origin)));
}

float total(const float* lanes) { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }

// Writes the deviations of kSize rewards from their mean and returns the sum of squares. The
// mean is summed from differences to the first reward, so that equal rewards deviate by zero,
// and kept as two floats, so that a deviation is rounded once.
template <int kSize>
float deviations(const float* rewards, float* d) {
  float sum[kLanes] = {}, squares[kLanes] = {};
  const float first = rewards[0];
  for (int i = 0; i < kSize; i += kLanes)
    for (int l = 0; l < kLanes; ++l) sum[l] += rewards[i + l] - first;
  const float above = total(sum) * (1.0f / kSize);
  const float mean = first + above, rest = (first - mean) + above;
  for (int i = 0; i < kSize; ++i) d[i] = (rewards[i] - mean) - rest;
  for (int i = 0; i < kSize; i += kLanes)
    for (int l = 0; l < kLanes; ++l) squares[l] += d[i + l] * d[i + l];
  return total(squares);
}

// `n` groups of kSize rewards: their deviations, and of each the sum of squares.
struct OneAtATime {
  template <int kSize>
  static void batch(const float* rewards, int n, float* d, float* squares) {
    for (int g = 0; g < n; ++g)
      squares[g] = deviations<kSize>(rewards + g * kSize, d + g * kSize);
  }
};

// Groups of kSize rewards that all count, in floats. Square roots and divisions of a batch of
// groups stand side by side, where a compiler can vectorise them.
template <int kSize, class Deviations>
void fixed_groups(const GroupedArguments& x) {
  constexpr int kBatch = 32;
  float d[kBatch * kSize], slope[kBatch], rest[kBatch];  // of a slope, in a second float
  const double factor = stretch(x, kSize);
  const double common = factor / divisor(x, 0.0);  // not used where the scale is the group's
  const double eps = x.eps;
  const bool own = x.scale == Scale::std, raw = x.baseline == Baseline::none;
  for (std::int64_t first = 0; first < x.G; first += kBatch) {
    const int n = static_cast<int>(std::min<std::int64_t>(kBatch, x.G - first));
    const float* rewards = x.rewards + first * kSize;
    float* advantages = x.advantages + first * kSize;
    Deviations::template batch<kSize>(rewards, n, d, slope);
    for (int g = 0; g < n; ++g) {
      const double spread = std::sqrt(double{slope[g]} * (1.0 / (kSize - 1))) + eps;
      const double exact = own ? factor / (spread == 0.0 ? 1.0 : spread) : common;
      slope[g] = static_cast<float>(exact);
      rest[g] = static_cast<float>(exact - slope[g]);
    }
    const float* from = raw ? rewards : d;
    for (int g = 0; g < n; ++g)
      for (int i = 0; i < kSize; ++i) {
        const float value = from[g * kSize + i];
        advantages[g * kSize + i] = slope[g] * value + rest[g] * value;
      }
  }
}

#ifdef ALIGNKIT_V4
#include "grouped_v4.h"

ALIGNKIT_V4 void by_sixteen(const GroupedArguments& x) {
  std::int64_t done = 0;
  switch (x.offsets ? 0 : x.group_size) {
    case 4: return fixed_groups<4, SharedRegisters>(x);
    case 8: return fixed_groups<8, SharedRegisters>(x);
    case 16: done = whole_batches<16>(x); break;
    case 32: done = whole_batches<32>(x); break;
    case 64: done = whole_batches<64>(x); break;
  }
  groups_from(x, done);
}
#endif

// Whether the groups were of a size that is unrolled, and are done.
bool unrolled(const GroupedArguments& x) {
  switch (x.offsets ? 0 : x.group_size) {
    case 4: return fixed_groups<4, OneAtATime>(x), true;
    case 8: return fixed_groups<8, OneAtATime>(x), true;
    case 16: return fixed_groups<16, OneAtATime>(x), true;
    case 32: return fixed_groups<32, OneAtATime>(x), true;
    case 64: return fixed_groups<64, OneAtATime>(x), true;
  }
  return false;
}

}  // namespace

void grouped_advantage(const GroupedArguments& x) {
#ifdef ALIGNKIT_V4
  if (!x.mask && has_v4()) return by_sixteen(x);
#endif
  if (!x.mask && unrolled(x)) return;
  for (std::int64_t g = 0; g < x.G; ++g)
    x.mask ? any_group<true>(x, group(x, g)) : any_group<false>(x, group(x, g));
}

}  // namespace alignkit
