// Generalized advantage estimation (Schulman et al. 2016, eq. 16) with ends, cuts, skipped
// steps, and BSPO's floor under unsupported steps (arXiv:2503.18130, eq. 7).
//
// Each step is a pair (a, c): advantage = a + c * (advantage of the step after it). A row is
// walked from its end in tiles small enough for the first cache: the pairs of a tile do not
// depend on each other and are computed side by side, then scanned four at a time, so that
// only one multiply-add in four waits for the step after it.
#include <algorithm>

#include "kernels.h"
#include "wide.h"

namespace alignkit {
namespace {

constexpr int kTile = 256;

struct Tile {
  float reward[kTile];
  float after[kTile];  // value of the state after each step
  float a[kTile];
  float c[kTile];
};

// The part of a row still to be walked ends where these two stand.
struct Carry {
  float advantage;
  float next_value;
};

void values_after(const float* values, const std::uint8_t* mask, int n, Tile& tile, Carry& carry) {
  if (!mask) {
    for (int i = 0; i + 1 < n; ++i) tile.after[i] = values[i + 1];
    tile.after[n - 1] = carry.next_value;
    carry.next_value = values[0];
    return;
  }
  for (int i = n - 1; i >= 0; --i) {
    tile.after[i] = carry.next_value;
    carry.next_value = mask[i] ? values[i] : carry.next_value;
  }
}

// Pairs of the `n` steps from `first` on, an offset into (B, T); `values` points at the same
// step. Later rules win: termination over truncation, the floor over both.
void pairs(const GaeArguments& x, std::int64_t first, const float* values, int n, Tile& tile,
           Carry& carry) {
  const std::uint8_t* mask = x.mask ? x.mask + first : nullptr;
  values_after(values, mask, n, tile, carry);
  std::copy_n(x.rewards + first, n, tile.reward);
  std::fill_n(tile.c, n, x.decay);
  if (x.truncated) {
    const std::uint8_t* truncated = x.truncated + first;
    const float* bootstrap = x.bootstrap ? x.bootstrap + first : values + 1;
    for (int i = 0; i < n; ++i) {
      const float after = bootstrap[i];  // read either way, or the loop has branches
      tile.c[i] = truncated[i] ? 0.0f : tile.c[i];
      tile.after[i] = truncated[i] ? after : tile.after[i];
    }
  }
  if (x.terminated) {
    const std::uint8_t* terminated = x.terminated + first;
    for (int i = 0; i < n; ++i) {
      tile.c[i] = terminated[i] ? 0.0f : tile.c[i];
      tile.after[i] = terminated[i] ? 0.0f : tile.after[i];
    }
  }
  if (x.supported) {
    const std::uint8_t* supported = x.supported + first;
    const float v_min = x.v_min;
    for (int i = 0; i < n; ++i) {
      tile.c[i] = supported[i] ? tile.c[i] : 0.0f;
      tile.after[i] = supported[i] ? tile.after[i] : v_min;
      tile.reward[i] = supported[i] ? tile.reward[i] : 0.0f;
    }
  }
  for (int i = 0; i < n; ++i) tile.a[i] = tile.reward[i] + x.gamma * tile.after[i] - values[i];
  if (mask) {
    for (int i = 0; i < n; ++i) {
      tile.a[i] = mask[i] ? tile.a[i] : 0.0f;
      tile.c[i] = mask[i] ? tile.c[i] : 1.0f;
    }
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

// The state after an unsupported step is worth v_min, whatever was learned about it.
void value_targets(const GaeArguments& x, std::int64_t first, const float* values) {
  float* targets = x.targets + first;
  for (std::int64_t t = 0; t < x.T; ++t) targets[t] = x.advantages[first + t] + values[t];
  bool floored = false;
  for (std::int64_t t = 0; t < x.T; ++t) {
    const bool counts = !x.mask || x.mask[first + t];
    if (!counts) targets[t] = 0.0f;
    else if (floored) targets[t] = x.v_min;
    floored = counts ? !x.supported[first + t] : floored;
  }
}

void gae_row(const GaeArguments& x, std::int64_t row) {
  const std::int64_t start = row_start(row, x.T);
  const float* values = x.values + row_start(row, x.T + 1);
  Tile tile;
  Carry carry{0.0f, x.terminated ? values[x.T] : 0.0f};
  for (std::int64_t end = x.T; end > 0;) {
    const int n = static_cast<int>(std::min<std::int64_t>(kTile, end));
    const std::int64_t t = end - n;
    pairs(x, start + t, values + t, n, tile, carry);
    float* out = x.advantages + start + t;
    carry.advantage = scan(tile.a, tile.c, n, carry.advantage, out);
    if (x.mask)
      for (int i = 0; i < n; ++i) out[i] = x.mask[start + t + i] ? out[i] : 0.0f;
    end = t;
  }
  if (x.targets) value_targets(x, start, values);
}

}  // namespace

// Last row first: memory is then read strictly downwards, which the prefetcher follows.
ALIGNKIT_WIDE void gae(const GaeArguments& args) {
  for (std::int64_t row = args.B - 1; row >= 0; --row) gae_row(args, row);
}

}  // namespace alignkit
