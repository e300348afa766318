// Advantages of answers within their group (GRPO, arXiv:2402.03300; Dr. GRPO, 2503.20783;
// RLOO, 2402.14740): mean first, then deviations, so that close rewards keep their differences.
#include <algorithm>
#include <cmath>

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

#ifdef ALIGNKIT_V4
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
// The same sixteen rewards at a time. A register holds groups of four or of eight, or eight
// rewards of two groups each: what is added across lanes is then added for both at once.
struct SixteenAtATime {
  static constexpr int kWidth = 16, kHalf = kWidth / 2;
  typedef float Lanes __attribute__((vector_size(64)));
  typedef std::int32_t Index __attribute__((vector_size(64)));
  static constexpr Index kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  // Every lane becomes the sum over its group's lanes, which are 2 * kBy.
  template <int kBy>
  static void total(Lanes& x) {
    if constexpr (kBy > 0) {
      x += __builtin_shuffle(x, kLane ^ kBy);
      total<kBy / 2>(x);
    }
  }

  // Two halves of a register that lie `apart`; a mask leaves out what is beside them.
  static constexpr __mmask16 kLow = 0x00ff, kHigh = 0xff00;
  static void load(const float* from, int apart, Lanes& x) {
    x = _mm512_maskz_loadu_ps(kLow, from);
    x = _mm512_mask_loadu_ps(x, kHigh, from + apart - kHalf);
  }

  static void store(const Lanes& x, int apart, float* to) {
    _mm512_mask_storeu_ps(to, kLow, x);
    _mm512_mask_storeu_ps(to + apart - kHalf, kHigh, x);
  }

  template <int kSize>
  static void batch(const float* rewards, int n, float* d, float* squares) {
    constexpr int kWithin = std::min(kSize, kHalf), kParts = kSize / kWithin;
    constexpr int kGroups = kWidth / kWithin, kApart = kParts == 1 ? kHalf : kSize;
    int g = 0;
    for (; g + kGroups <= n; g += kGroups) {
      Lanes x[kParts], sum = {}, square = {};
      for (int p = 0; p < kParts; ++p) load(rewards + g * kSize + p * kHalf, kApart, x[p]);
      const Lanes first = __builtin_shuffle(x[0], kLane & -kWithin);
      for (int p = 0; p < kParts; ++p) sum += x[p] - first;
      total<kWithin / 2>(sum);
      const Lanes above = sum * (1.0f / kSize), mean = first + above;
      const Lanes rest = (first - mean) + above;
      for (int p = 0; p < kParts; ++p) x[p] = (x[p] - mean) - rest;
      for (int p = 0; p < kParts; ++p) square += x[p] * x[p];
      total<kWithin / 2>(square);
      for (int p = 0; p < kParts; ++p) store(x[p], kApart, d + g * kSize + p * kHalf);
      for (int i = 0; i < kGroups; ++i) squares[g + i] = square[i * kWithin];
    }
    OneAtATime::batch<kSize>(rewards + g * kSize, n - g, d + g * kSize, squares + g);
  }
};
#pragma GCC pop_options
#endif

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

template <class Deviations>
bool known_size(const GroupedArguments& x) {
  switch (x.group_size) {
    case 4: return fixed_groups<4, Deviations>(x), true;
    case 8: return fixed_groups<8, Deviations>(x), true;
    case 16: return fixed_groups<16, Deviations>(x), true;
    case 32: return fixed_groups<32, Deviations>(x), true;
    case 64: return fixed_groups<64, Deviations>(x), true;
  }
  return false;
}

#ifdef ALIGNKIT_V4
ALIGNKIT_V4 bool by_sixteen(const GroupedArguments& x) { return known_size<SixteenAtATime>(x); }
#endif

// Whether the groups were of a size that is unrolled, and are done.
bool by_the_widest(const GroupedArguments& x) {
#ifdef ALIGNKIT_V4
  if (has_v4()) return by_sixteen(x);
#endif
  return known_size<OneAtATime>(x);
}

}  // namespace

void grouped_advantage(const GroupedArguments& x) {
  if (!x.offsets && !x.mask && by_the_widest(x)) return;
  for (std::int64_t g = 0; g < x.G; ++g)
    x.mask ? any_group<true>(x, group(x, g)) : any_group<false>(x, group(x, g));
}

}  // namespace alignkit
