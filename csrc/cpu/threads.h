// Rows shared out among threads that end with the call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace alignkit {

// Shares out rows, of which each is the same whoever does it.
template <class Rows>
void in_threads(std::int64_t B, int threads, const Rows& rows) {
  const std::int64_t shares = std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(B, 1));
  std::vector<std::thread> others;
  for (std::int64_t i = 1; i < shares; ++i)
    others.emplace_back([&, i] { rows(B * i / shares, B * (i + 1) / shares); });
  rows(0, B / shares);
  for (auto& other : others) other.join();
}

}  // namespace alignkit
