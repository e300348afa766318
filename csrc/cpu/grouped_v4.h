// Groups without a mask in registers of sixteen floats. Included by grouped.cpp, in its namespace.
//
// Groups of four or of eight share a register: what is added across lanes is added for all of
// them at once. Others of up to kMost rewards go sixteen at a time, each in a row of registers:
// the totals of sixteen rows take fifteen additions across lanes, where one by one they take
// sixty-four. Still longer ones go through doubles.
#pragma once

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")

constexpr int kWidth = 16;
constexpr int kMost = 4 * kWidth;    // rewards of a group
constexpr int kGroups = 4 * kWidth;  // so many that roots and divisions need not wait
typedef float Wide __attribute__((vector_size(kWidth * sizeof(float))));
typedef std::int32_t WideIndex __attribute__((vector_size(kWidth * sizeof(float))));

struct SharedRegisters {
  static constexpr WideIndex kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

  // Every lane becomes the sum over its group's lanes, which are 2 * kBy.
  template <int kBy>
  static void total(Wide& x) {
    if constexpr (kBy > 0) {
      x += __builtin_shuffle(x, kLane ^ kBy);
      total<kBy / 2>(x);
    }
  }

  template <int kSize>
  static void batch(const float* rewards, int n, float* d, float* squares) {
    constexpr int kShare = kWidth / kSize;
    int g = 0;
    for (; g + kShare <= n; g += kShare) {
      Wide x;
      std::memcpy(&x, rewards + g * kSize, sizeof x);
      const Wide first = __builtin_shuffle(x, kLane & -kSize);
      Wide sum = x - first;
      total<kSize / 2>(sum);
      const Wide above = sum * (1.0f / kSize), mean = first + above;
      const Wide rest = (first - mean) + above;
      x = (x - mean) - rest;
      std::memcpy(d + g * kSize, &x, sizeof x);
      Wide square = x * x;
      total<kSize / 2>(square);
      for (int i = 0; i < kShare; ++i) squares[g + i] = square[i * kSize];
    }
    OneAtATime::batch<kSize>(rewards + g * kSize, n - g, d + g * kSize, squares + g);
  }
};

// Halves of the lanes of `a` and of `b` are added to their other halves, kApart lanes on.
template <int kApart>
void join(Wide& a, const Wide& b, const WideIndex& half) {
  a = __builtin_shuffle(a, b, half) + __builtin_shuffle(a, b, half + kApart);
}

// Lane r of `sums` becomes the sum over the lanes of row r. The rows are spent.
inline void totals(Wide* row, Wide& sums) {
  constexpr WideIndex kOnes = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr WideIndex kPairs = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr WideIndex kEights = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  constexpr WideIndex kFours = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  for (int r = 0; r < kWidth; r += 2) join<2>(row[r], row[r + 1], kOnes);
  for (int r = 0; r < kWidth; r += 4) join<2>(row[r], row[r + 2], kPairs);
  for (int r = 0; r < kWidth; r += 8) join<8>(row[r], row[r + 4], kEights);
  join<4>(row[0], row[8], kFours);
  sums = row[0];
}

// Groups of at most kMost rewards. kSize: of all of them, side by side; 0: each has its own, and
// 0 where there is no group.
template <int kSize>
struct Batch {
  const float* rewards;
  float* advantages;
  std::int64_t starts[kSize ? 1 : kGroups];
  int sizes[kSize ? 1 : kGroups];

  std::int64_t start(int g) const { return kSize ? g * kSize : starts[g]; }
  int size(int g) const { return kSize ? kSize : sizes[g]; }
  // Which lanes of a part of a group hold rewards.
  __mmask16 lanes(int g, int part) const {
    const std::uint64_t all = ~std::uint64_t{0};
    return static_cast<__mmask16>((kSize ? all : _bzhi_u64(all, size(g))) >> part * kWidth);
  }
};

// A number for each of sixteen groups, as two floats: the second is what the first left out.
struct Pair {
  float high[kWidth], low[kWidth];
};

inline void store(const Wide& high, const Wide& low, Pair& to) {
  std::memcpy(to.high, &high, sizeof high);
  std::memcpy(to.low, &low, sizeof low);
}

// Part p of group r, less `from`.
template <int kSize>
void deviation(const Batch<kSize>& batch, int g, int r, int p, const Pair& from, Wide& d) {
  const __mmask16 lanes = batch.lanes(g + r, p);
  d = _mm512_maskz_loadu_ps(lanes, batch.rewards + batch.start(g + r) + p * kWidth);
  d = _mm512_maskz_sub_ps(lanes, d, _mm512_set1_ps(from.high[r]));
  d = _mm512_maskz_sub_ps(lanes, d, _mm512_set1_ps(from.low[r]));
}

// How far the mean of each of sixteen groups lies above `from`.
template <int kSize, int kParts>
void above(const Batch<kSize>& batch, int g, const Pair& from, const Wide& sizes, Wide& mean) {
  Wide row[kWidth];
  for (int r = 0; r < kWidth; ++r) {
    row[r] = Wide{};
    for (int p = 0; p < kParts; ++p) {
      Wide d;
      deviation(batch, g, r, p, from, d);
      row[r] += d;
    }
  }
  totals(row, mean);
  mean /= sizes;
}

// Writes the deviations of sixteen groups from their means, and of each the sum of squares. The
// mean of a group whose size is no power of two is rounded once more than the others: what its
// deviations leave over is taken from them, too.
template <int kSize, int kParts>
void deviations(const Batch<kSize>& batch, int g, float* squares) {
  Pair from = {};
  float n[kWidth];
  for (int r = 0; r < kWidth; ++r) {
    from.high[r] = batch.rewards[batch.start(g + r)];
    n[r] = static_cast<float>(batch.size(g + r));
  }
  Wide first, sizes, rest = {}, more;
  std::memcpy(&first, from.high, sizeof first);
  std::memcpy(&sizes, n, sizeof n);
  Wide mean = first;
  for (bool again : {false, true}) {
    if (kSize && again) break;
    above<kSize, kParts>(batch, g, from, sizes, more);
    if (!again) mean = first + more;
    rest = (again ? rest : first - mean) + more;
    store(mean, rest, from);
  }
  Wide row[kWidth], sums;
  for (int r = 0; r < kWidth; ++r) {
    row[r] = Wide{};
    for (int p = 0; p < kParts; ++p) {
      Wide d;
      deviation(batch, g, r, p, from, d);
      _mm512_mask_storeu_ps(batch.advantages + batch.start(g + r) + p * kWidth,
                            batch.lanes(g + r, p), d);
      row[r] += d * d;
    }
  }
  totals(row, sums);
  std::memcpy(squares, &sums, sizeof sums);
}

// What deviations are multiplied with, in two floats. One function for all sizes: it is long.
__attribute__((noinline)) inline void slopes(const GroupedArguments& x, const float* sizes,
                                             const float* squares, float* slope, float* rest) {
  const bool own = x.scale == Scale::std, leave_one_out = x.baseline == Baseline::leave_one_out;
  const double common = divisor(x, 0.0);  // not used where the scale is the group's
  const double eps = x.eps;
  for (int g = 0; g < kGroups; ++g) {
    const double n = sizes[g], per_other = 1.0 / std::max(n - 1.0, 1.0);
    const double factor = leave_one_out ? n * per_other : 1.0;
    const double spread = own ? std::sqrt(squares[g] * per_other) + eps : common;
    const double exact = factor / (spread == 0.0 ? 1.0 : spread);
    slope[g] = static_cast<float>(exact);
    rest[g] = static_cast<float>(exact - slope[g]);
  }
}

template <int kSize, int kParts>
void advantages_of(const GroupedArguments& x, const Batch<kSize>& batch) {
  float sizes[kGroups], squares[kGroups], slope[kGroups], rest[kGroups];
  for (int g = 0; g < kGroups; g += kWidth) deviations<kSize, kParts>(batch, g, squares + g);
  for (int g = 0; g < kGroups; ++g) sizes[g] = static_cast<float>(batch.size(g));
  slopes(x, sizes, squares, slope, rest);
  const float* const from = x.baseline == Baseline::none ? batch.rewards : batch.advantages;
  float* const to = batch.advantages;
  constexpr int kTogether = 8;
  // All are read before one is written: a masked store makes the load wait that begins where
  // its lanes end.
  for (int g = 0; g < kGroups; g += kTogether) {
    Wide value[kTogether][kParts];
    for (int r = 0; r < kTogether; ++r)
      for (int p = 0; p < kParts; ++p)
        value[r][p] = _mm512_maskz_loadu_ps(batch.lanes(g + r, p),
                                            from + batch.start(g + r) + p * kWidth);
    for (int r = 0; r < kTogether; ++r)
      for (int p = 0; p < kParts; ++p)
        _mm512_mask_storeu_ps(to + batch.start(g + r) + p * kWidth, batch.lanes(g + r, p),
                              slope[g + r] * value[r][p] + rest[g + r] * value[r][p]);
  }
}

// As many whole batches as there are; how many groups that was.
template <int kSize>
std::int64_t whole_batches(const GroupedArguments& x) {
  std::int64_t g = 0;
  for (; g + kGroups <= x.G; g += kGroups) {
    const Batch<kSize> batch{x.rewards + g * kSize, x.advantages + g * kSize, {}, {}};
    advantages_of<kSize, kSize / kWidth>(x, batch);
  }
  return g;
}

// As many parts for every group as the longest one has: a branch a group would be guessed wrongly.
inline void advantages_of_any(const GroupedArguments& x, const Batch<0>& batch) {
  const int longest = *std::max_element(batch.sizes, batch.sizes + kGroups);
  switch ((longest + kWidth - 1) / kWidth) {
    case 1: return advantages_of<0, 1>(x, batch);
    case 2: return advantages_of<0, 2>(x, batch);
    default: return advantages_of<0, 4>(x, batch);
  }
}

// Groups from `g` on, of any size.
inline void groups_from(const GroupedArguments& x, std::int64_t g) {
  Batch<0> batch{x.rewards, x.advantages, {}, {}};
  int n = 0;
  for (; g < x.G; ++g) {
    const Span span = group(x, g);
    if (span.size == 0 || span.size > kMost || alone(x, span.size)) {
      any_group<false>(x, span);
      continue;
    }
    batch.starts[n] = span.start;
    batch.sizes[n] = static_cast<int>(span.size);
    if (++n < kGroups) continue;
    advantages_of_any(x, batch);
    n = 0;
  }
  std::fill(batch.sizes + n, batch.sizes + kGroups, 0);
  if (n > 0) advantages_of_any(x, batch);
}

#pragma GCC pop_options
