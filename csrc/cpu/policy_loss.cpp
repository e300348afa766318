// PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with a KL penalty, and its gradient.
//
// A row comes in chunks: what does not count is replaced when it is loaded, so that every loop
// after that runs without a branch. Sums are float inside a chunk and double across chunks.
#include <algorithm>
#include <numeric>

#include "kernels.h"
#include "softmax.h"
#include "wide.h"

namespace alignkit {
namespace {

constexpr int kSteps = 512;
constexpr float kHighest = 88.72f;  // beyond it, e^x is no float

struct Steps {
  float log_ratio[kSteps];  // log-probability now less when it acted
  float ratio[kSteps];
  float behind[kSteps];     // the reference's log-probability less that of now
  float advantage[kSteps];
  float loss[kSteps];
  float grad[kSteps];  // of the loss by the log-probability
  float kl[kSteps];
};

// How often the gradient was clipped away.
struct Clipped {
  std::int64_t low;
  std::int64_t high;
};

inline float exponential(float x) {
  const float e = exp_negative(x > kHighest ? kHighest : x);
  return x > kHighest ? kInf : e;
}

// Fills the steps of a chunk and pads them; returns how many count.
std::int64_t load(const PolicyLossArguments& x, std::int64_t row, std::int64_t at, int n,
                  Steps& s) {
  const float *logps = x.logps + at, *old = x.old_logps + at;
  const float* ref = x.ref_logps ? x.ref_logps + at : logps;
  for (int i = 0; i < n; ++i) s.log_ratio[i] = logps[i] - old[i];
  for (int i = 0; i < n; ++i) s.behind[i] = ref[i] - logps[i];
  if (x.advantage_per_row) std::fill_n(s.advantage, n, x.advantages[row]);
  else std::copy_n(x.advantages + at, n, s.advantage);
  std::int64_t count = n;
  if (x.mask) {
    const std::uint8_t* mask = x.mask + at;
    for (int i = 0; i < n; ++i) {
      s.log_ratio[i] = mask[i] ? s.log_ratio[i] : 0.0f;
      s.behind[i] = mask[i] ? s.behind[i] : 0.0f;
      s.advantage[i] = mask[i] ? s.advantage[i] : 0.0f;
    }
    count = std::accumulate(mask, mask + n, 0);
  }
  for (float* column : {s.log_ratio, s.behind, s.advantage})
    std::fill(column + n, column + (n + kLanes - 1) / kLanes * kLanes, 0.0f);
  return count;
}

Clipped surrogate(const PolicyLossArguments& x, int n, Steps& s) {
  const float lowest = 1.0f - x.eps_low, highest = 1.0f + x.eps_high;
  std::int32_t low = 0, high = 0;  // integers, which a compiler may add in any order
  for (int i = 0; i < n; ++i) s.ratio[i] = exponential(s.log_ratio[i]);
  for (int i = 0; i < n; ++i) {
    const float a = s.advantage[i], ratio = s.ratio[i];
    const float raised = ratio < lowest ? lowest : ratio;
    const float within = raised > highest ? highest : raised;
    const float free = -a * ratio, held = -a * within;
    s.loss[i] = free < held ? held : free;
    s.grad[i] = free < held ? 0.0f : free;
    low += (a < 0.0f) & (ratio < lowest);
    high += (a > 0.0f) & (ratio > highest);
  }
  return {low, high};
}

// Schulman's three estimators of the KL divergence from the reference, and their gradients.
void penalty(const PolicyLossArguments& x, int n, Steps& s) {
  float slope[kSteps];
  switch (x.kl) {
    case Kl::k1:
      for (int i = 0; i < n; ++i) s.kl[i] = -s.behind[i], slope[i] = 1.0f;
      break;
    case Kl::k2:
      for (int i = 0; i < n; ++i)
        s.kl[i] = 0.5f * s.behind[i] * s.behind[i], slope[i] = -s.behind[i];
      break;
    case Kl::k3:
      for (int i = 0; i < n; ++i) {
        const float d = s.behind[i], e = exponential(d);
        // e^d - d - 1 of a small d is lost between numbers of size 1
        const float near = d * d * (0.5f + d * (1.0f / 6 + d * (1.0f / 24 + d * (1.0f / 120))));
        s.kl[i] = d < 0.1f && d > -0.1f ? near : e - d - 1.0f;
        slope[i] = d < 0.1f && d > -0.1f ? -(d + near) : 1.0f - e;
      }
  }
  for (int i = 0; i < n; ++i) {
    s.loss[i] += x.beta * s.kl[i];
    s.grad[i] += x.beta * slope[i];
  }
}

// What the sum of a row is multiplied with: rows weigh the same, however many steps count.
float weight_of(const PolicyLossArguments& x, std::int64_t row) {
  if (x.reduction != Reduction::sequence || !x.mask) return 1.0f;
  const std::uint8_t* mask = x.mask + row_start(row, x.T);
  const std::int64_t count = std::accumulate(mask, mask + x.T, std::int64_t{0});
  return 1.0f / static_cast<float>(std::max<std::int64_t>(1, count));
}

// What the sum over rows is divided by. Without a mask, means of rows are means of steps.
double divisor_of(const PolicyLossArguments& x, double steps) {
  switch (x.reduction) {
    case Reduction::token: return steps;
    case Reduction::sequence:
      return x.mask ? static_cast<double>(std::max<std::int64_t>(1, x.B)) : steps;
    case Reduction::sum: break;
  }
  return 1.0;
}

}  // namespace

ALIGNKIT_WIDE void clipped_policy_loss(const PolicyLossArguments& x) {
  Steps s;
  double loss = 0.0, kl = 0.0, moved = 0.0;
  std::int64_t low = 0, high = 0, count = 0;
  for (std::int64_t row = 0; row < x.B; ++row) {
    const float weight = weight_of(x, row);
    double of_row = 0.0;
    for (std::int64_t start = 0; start < x.T; start += kSteps) {
      const std::int64_t at = row_start(row, x.T) + start;
      const int real = static_cast<int>(std::min<std::int64_t>(kSteps, x.T - start));
      const int n = (real + kLanes - 1) / kLanes * kLanes;
      count += load(x, row, at, real, s);
      const Clipped clipped = surrogate(x, n, s);
      low += clipped.low;
      high += clipped.high;
      if (x.ref_logps) {
        penalty(x, n, s);
        kl += sum(s.kl, n);
      }
      if (x.grad)
        for (int i = 0; i < real; ++i)
          x.grad[at + i] = !x.mask || x.mask[at + i] ? weight * s.grad[i] : 0.0f;
      of_row += sum(s.loss, n);  // padding adds e^0 * 0
      moved -= sum(s.log_ratio, n);
    }
    loss += weight * of_row;
  }
  const double steps = static_cast<double>(std::max<std::int64_t>(1, count));
  const double divisor = divisor_of(x, steps);
  *x.divisor = static_cast<float>(divisor);
  *x.loss = static_cast<float>(loss / divisor);
  const double figures[kPolicyFigures] = {static_cast<double>(low), static_cast<double>(high), kl,
                                          moved};
  for (int i = 0; i < kPolicyFigures; ++i) x.figures[i] = static_cast<float>(figures[i] / steps);
}

ALIGNKIT_WIDE void clipped_policy_loss_backward(const float* grad, float factor, float* out,
                                                std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = factor * grad[i];
}

}  // namespace alignkit
