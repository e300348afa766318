// What the C++ and the CUDA kernel of `grouped_advantage` receive.
#pragma once

#include <cstdint>

#include "layout.h"

namespace alignkit {

enum class Baseline { mean, leave_one_out, none };
enum class Scale { std, batch, none };

// (N,) in groups that lie side by side. A null pointer is an argument that was not given.
struct GroupedArguments {
  const float* rewards;
  const std::uint8_t* mask;
  const std::int64_t* offsets;  // (G+1,), null where every group has `group_size`
  std::int64_t group_size;
  Baseline baseline;
  Scale scale;
  const double* batch_std;  // one number, read where scale is batch
  double eps;
  float* advantages;  // (N,)
  std::int64_t G;
};

struct Span {
  std::int64_t start;
  std::int64_t size;
};

ALIGNKIT_HOST_DEVICE inline Span group(const GroupedArguments& x, std::int64_t g) {
  if (x.offsets) return {x.offsets[g], x.offsets[g + 1] - x.offsets[g]};
  return {row_start(g, x.group_size), x.group_size};
}

// Whether a group of so many counted rewards is compared with nothing: then it gets zeros.
ALIGNKIT_HOST_DEVICE inline bool alone(const GroupedArguments& x, std::int64_t count) {
  return count < 2 && (x.baseline != Baseline::none || x.scale == Scale::std);
}

// What an advantage is divided by. Equal rewards and no eps: 1, so that zeros stay zeros.
ALIGNKIT_HOST_DEVICE inline double divisor(const GroupedArguments& x, double group_std) {
  if (x.scale == Scale::none) return 1.0;
  const double spread = (x.scale == Scale::std ? group_std : *x.batch_std) + x.eps;
  return spread == 0.0 ? 1.0 : spread;
}

// What a deviation from the mean of `count` rewards is multiplied with: the mean of the others
// lies further away than the mean of all.
ALIGNKIT_HOST_DEVICE inline double stretch(const GroupedArguments& x, double count) {
  return x.baseline == Baseline::leave_one_out ? count / (count - 1.0) : 1.0;
}

}  // namespace alignkit
