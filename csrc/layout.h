// Offsets into row-major arrays, for C++ and CUDA alike. 64 bits wide: a 32-bit product
// overflows at two thousand million elements, which is one batch of logits.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ALIGNKIT_HOST_DEVICE __host__ __device__
#else
#define ALIGNKIT_HOST_DEVICE
#endif

namespace alignkit {

ALIGNKIT_HOST_DEVICE constexpr std::int64_t row_start(std::int64_t row, std::int64_t stride) {
  return row * stride;
}

static_assert(row_start(1 << 20, 1 << 20) == std::int64_t{1} << 40, "offsets must not wrap");

}  // namespace alignkit
