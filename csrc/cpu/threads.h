// Rows shared out among threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace alignkit {

// Calls part(context, i) for each i below `shares`, side by side.
void side_by_side(int shares, void (*part)(void* context, int i), void* context);

// Shares out rows, of which each is the same whoever does it.
template <class Rows>
void in_threads(std::int64_t B, int threads, const Rows& rows) {
  struct Shares {
    std::int64_t B;
    int count;
    const Rows& rows;
  };
  const auto most = std::max<std::int64_t>(B, 1);
  Shares shares{B, static_cast<int>(std::clamp<std::int64_t>(threads, 1, most)), rows};
  const auto part = [](void* context, int i) {
    const Shares& x = *static_cast<Shares*>(context);
    x.rows(x.B * i / x.count, x.B * (i + 1) / x.count);
  };
  side_by_side(shares.count, part, &shares);
}

}  // namespace alignkit
