// Kernels for the widest vectors of the machine they run on, whatever the one that built them.
#pragma once

#include <cstdlib>  // __GLIBC__

// GCC compiles such a function three times, with all it calls, and the loader picks one. The
// portable one rounds a product before it adds, the others need not: bits may differ between
// machines, never between runs.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(ALIGNKIT_PORTABLE)
#define ALIGNKIT_WIDE \
  __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// Two functions for what is worth writing in registers of sixteen floats: the first is called
// where `has_v4()`, the second elsewhere.
#define ALIGNKIT_V4 __attribute__((flatten, target("arch=x86-64-v4")))
#define ALIGNKIT_BELOW_V4 __attribute__((flatten, target_clones("arch=x86-64-v3", "default")))

namespace alignkit {
inline bool has_v4() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
}  // namespace alignkit
#else
#define ALIGNKIT_WIDE
#define ALIGNKIT_BELOW_V4
#endif
