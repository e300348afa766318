// What each answer of a group scored against its opponents (Generative RLHF-V, grouped
// comparison): a table of both scores of every pair in, read once, a mean an answer out.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace alignkit {
namespace {

struct Total {
  double sum;
  std::int64_t count;

  void add(float score) {
    if (std::isnan(score)) return;  // was not asked
    sum += score;
    ++count;
  }
};

}  // namespace

void grouped_comparison(const ComparisonArguments& x) {
  std::vector<Total> totals(static_cast<std::size_t>(x.n));
  for (std::int64_t p = 0; p < x.P; ++p) {
    const std::uint8_t* complete = x.complete ? x.complete + row_start(p, x.n) : nullptr;
    std::fill(totals.begin(), totals.end(), Total{0.0, 0});
    for (std::int64_t first = 0; first < x.n; ++first) {
      const float* pairs = x.scores + 2 * row_start(p * x.n + first, x.n);
      if (complete && !complete[first]) continue;
      for (std::int64_t second = 0; second < x.n; ++second) {
        if (first == second || (complete && !complete[second])) continue;
        totals[first].add(pairs[2 * second]);
        totals[second].add(pairs[2 * second + 1]);
      }
    }
    for (std::int64_t i = 0; i < x.n; ++i) {
      const auto [sum, count] = totals[i];
      const std::int64_t at = row_start(p, x.n) + i;
      x.judged[at] = count > 0;
      x.answer_scores[at] = count > 0 ? static_cast<float>(sum / static_cast<double>(count))
                                      : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

}  // namespace alignkit
