// Generalized advantage estimation (Schulman et al. 2016, eq. 16) with ends, cuts, skipped
// steps, and BSPO's floor under unsupported steps (arXiv:2503.18130, eq. 7); and the same for
// rewards and costs at once.
//
// Each step is a pair (a, c): advantage = a + c * (advantage of the step after it). A row is
// walked from its end in tiles small enough for the first cache: the pairs of a tile do not
// depend on each other and are computed side by side. They are then scanned four at a time, so
// that only one multiply-add in four waits for the step after it. advantages_v4.h does it in
// registers of sixteen.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "advantages_v4.h"
#include "kernels.h"
#include "wide.h"

namespace alignkit {
namespace {

struct Tile {
  explicit Tile(const GaeArguments&) {}

  float after[kTile];  // value of the state after each step, where steps may be skipped
  float a[kTile];
  float c[kTile];
};

// The part of a row still to be walked ends where these two stand.
struct Carry {
  float advantage;
  float next_value;
};

// Which arguments were given, known to the compiler: each combination is a loop of its own.
template <bool kMask, bool kCut, bool kEnd, bool kFloor>
struct Given {
  static constexpr bool mask = kMask, cut = kCut, end = kEnd, floor = kFloor;
};

// Value after each step, from the next step that counts; `next` beyond the end, and then at
// the start.
void values_after(const float* values, const std::uint8_t* mask, int n, float* after,
                  float& next) {
  for (int i = n - 1; i >= 0; --i) {
    after[i] = next;
    next = mask[i] ? values[i] : next;
  }
}

// Pairs of the `n` steps from `first` on, an offset into (B, T); `values` points at the same
// step. Later rules win: termination over truncation, the floor over both.
template <class G>
void pairs(const GaeArguments& x, std::int64_t first, const float* values, int n, Tile& tile,
           Carry& carry) {
  const float* rewards = x.rewards + first;
  const std::uint8_t* mask = G::mask ? x.mask + first : nullptr;
  const std::uint8_t* truncated = G::cut ? x.truncated + first : nullptr;
  const std::uint8_t* terminated = G::end ? x.terminated + first : nullptr;
  const std::uint8_t* supported = G::floor ? x.supported + first : nullptr;
  const float* bootstrap = G::cut && x.bootstrap ? x.bootstrap + first : values + 1;
  const float gamma = x.gamma, decay = x.decay, v_min = x.v_min;
  const auto pair = [&](int i, float after) {
    float reward = rewards[i], c = decay;
    if constexpr (G::cut) {
      const float behind = bootstrap[i];  // read either way, or the loop has branches
      c = truncated[i] ? 0.0f : c;
      after = truncated[i] ? behind : after;
    }
    if constexpr (G::end) {
      c = terminated[i] ? 0.0f : c;
      after = terminated[i] ? 0.0f : after;
    }
    if constexpr (G::floor) {
      c = supported[i] ? c : 0.0f;
      after = supported[i] ? after : v_min;
      reward = supported[i] ? reward : 0.0f;
    }
    const float a = reward + gamma * after - values[i];
    if constexpr (G::mask) c = mask[i] ? c : 1.0f;
    tile.a[i] = !G::mask || mask[i] ? a : 0.0f;
    tile.c[i] = c;
  };
  if constexpr (G::mask) {
    values_after(values, mask, n, tile.after, carry.next_value);
    for (int i = 0; i < n; ++i) pair(i, tile.after[i]);
  } else {
    for (int i = 0; i < n; ++i) pair(i, values[i + 1]);
    pair(n - 1, carry.next_value);  // what stands behind the row may not count
    carry.next_value = values[0];
  }
}

// out[i] = a[i] + c[i] * out[i + 1], with `last` beyond the end. Returns out[0].
float scan(const float* a, const float* c, int n, float last, float* out) {
  int i = n;
  for (; i >= 4; i -= 4) {
    const float *p = a + i - 4, *q = c + i - 4;
    const float a2 = p[2] + carried(q[2], p[3]), c2 = q[2] * q[3];
    const float a1 = p[1] + carried(q[1], a2), c1 = q[1] * c2;
    const float a0 = p[0] + carried(q[0], a1), c0 = q[0] * c1;
    float* o = out + i - 4;
    o[3] = p[3] + carried(q[3], last);
    o[2] = a2 + carried(c2, last);
    o[1] = a1 + carried(c1, last);
    o[0] = last = a0 + carried(c0, last);
  }
  while (--i >= 0) out[i] = last = a[i] + carried(c[i], last);
  return last;
}

// The state after an unsupported step is worth v_min, whatever was learned about it: of the
// steps [t, t + n) of a row, all of which count.
void value_targets(const GaeArguments& x, std::int64_t start, std::int64_t t, int n,
                   const float* values) {
  const float* advantages = x.advantages + start + t;
  const std::uint8_t* before = x.supported + start + t - 1;
  float* targets = x.targets + start + t;
  const float v_min = x.v_min;
  targets[0] = t == 0 || before[0] ? advantages[0] + values[t] : v_min;
  for (int i = 1; i < n; ++i) {
    const float target = advantages[i] + values[t + i];  // read either way, or the loop branches
    targets[i] = before[i] ? target : v_min;
  }
}

// The same for a whole row, in which steps may be skipped.
void masked_value_targets(const GaeArguments& x, std::int64_t start, const float* values) {
  const std::uint8_t *mask = x.mask + start, *supported = x.supported + start;
  bool floored = false;
  for (std::int64_t t = 0; t < x.T; ++t) {
    const float target = floored ? x.v_min : x.advantages[start + t] + values[t];
    x.targets[start + t] = mask[t] ? target : 0.0f;
    floored = mask[t] ? !supported[t] : floored;
  }
}

// A row, from its end.
template <class G>
class Row {
 public:
  using Workspace = Tile;

  Row(const GaeArguments& args, std::int64_t row)
      : x(args),
        start(row_start(row, args.T)),
        values(args.values + row_start(row, args.T + 1)),
        carry{0.0f, args.terminated ? values[args.T] : 0.0f} {}

  // The `n` steps from `t` on; those behind them are done.
  void walk(std::int64_t t, int n, Tile& tile) {
    if constexpr (G::mask) {
      const std::uint8_t* mask = x.mask + start + t;
      const int count = std::accumulate(mask, mask + n, 0);
      if (count == 0) std::fill_n(x.advantages + start + t, n, 0.0f);
      else if (count < n) step<G>(t, n, tile);
      else step<Given<false, G::cut, G::end, G::floor>>(t, n, tile);
    } else {
      step<G>(t, n, tile);
      if constexpr (G::floor) value_targets(x, start, t, n, values);
    }
  }

  void finish() const {
    if constexpr (G::mask && G::floor) masked_value_targets(x, start, values);
  }

 private:
  template <class Some>
  void step(std::int64_t t, int n, Tile& tile) {
    pairs<Some>(x, start + t, values + t, n, tile, carry);
    float* out = x.advantages + start + t;
    carry.advantage = scan(tile.a, tile.c, n, carry.advantage, out);
    if constexpr (Some::mask) {
      const std::uint8_t* mask = x.mask + start + t;
      for (int i = 0; i < n; ++i) out[i] = mask[i] ? out[i] : 0.0f;
    }
  }

  const GaeArguments& x;
  const std::int64_t start;
  const float* values;
  Carry carry;
};

template <class F>
void tiles(std::int64_t T, F walk) {
  for (std::int64_t end = T; end > 0; end -= kTile) {
    const std::int64_t t = std::max<std::int64_t>(0, end - kTile);
    walk(t, static_cast<int>(end - t));
  }
}

// Last row first: memory is then read strictly downwards, which the prefetcher follows.
template <class AnyRow>
void gae_rows(const GaeArguments& x) {
  typename AnyRow::Workspace work(x);
  for (std::int64_t b = x.B - 1; b >= 0; --b) {
    AnyRow row(x, b);
    tiles(x.T, [&](std::int64_t t, int n) { row.walk(t, n, work); });
    row.finish();
  }
}

template <class AnyRow>
void dual_gae_rows(const DualGaeArguments& x) {
  const GaeArguments& gain = x.reward;
  const float share = 1.0f / (1.0f + x.multiplier);
  typename AnyRow::Workspace work(gain);
  for (std::int64_t b = gain.B - 1; b >= 0; --b) {
    AnyRow reward(gain, b), cost(x.cost, b);
    tiles(gain.T, [&](std::int64_t t, int n) {
      reward.walk(t, n, work);
      cost.walk(t, n, work);
      const std::int64_t at = row_start(b, gain.T) + t;
      const float *a = gain.advantages + at, *c = x.cost.advantages + at;
      float* combined = x.combined + at;
      for (int i = 0; i < n; ++i) combined[i] = share * (a[i] - x.multiplier * c[i]);
    });
  }
}

template <class F>
void known(bool flag, F f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// Calls `f` with a `Given`.
template <class F>
void without_floor(const GaeArguments& x, F f) {
  known(x.mask, [&](auto mask) {
    known(x.terminated, [&](auto end) {
      known(x.truncated, [&](auto cut) { f(Given<mask, cut, end, false>{}); });
    });
  });
}

template <class F>
void with_floor(const GaeArguments& x, F f) {
  known(x.mask, [&](auto mask) {
    known(x.terminated, [&](auto end) { f(Given<mask, false, end, true>{}); });
  });
}

template <template <class> class AnyRow>
void all_rows(const GaeArguments& x) {
  const auto rows = [&](auto given) { gae_rows<AnyRow<decltype(given)>>(x); };
  x.supported ? with_floor(x, rows) : without_floor(x, rows);
}

template <template <class> class AnyRow>
void all_rows(const DualGaeArguments& x) {
  without_floor(x.reward, [&](auto given) { dual_gae_rows<AnyRow<decltype(given)>>(x); });
}

ALIGNKIT_BELOW_V4 void by_four(const GaeArguments& x) { all_rows<Row>(x); }
ALIGNKIT_BELOW_V4 void by_four(const DualGaeArguments& x) { all_rows<Row>(x); }

#ifdef ALIGNKIT_V4
ALIGNKIT_V4 void by_sixteen(const GaeArguments& x) { all_rows<WideRow>(x); }
ALIGNKIT_V4 void by_sixteen(const DualGaeArguments& x) { all_rows<WideRow>(x); }
#endif

template <class Arguments>
void by_the_widest(const Arguments& x) {
#ifdef ALIGNKIT_V4
  if (has_v4()) return by_sixteen(x);
#endif
  by_four(x);
}

}  // namespace

void gae(const GaeArguments& x) { by_the_widest(x); }
void dual_gae(const DualGaeArguments& x) { by_the_widest(x); }

}  // namespace alignkit
