// Kernels for the widest vectors of the machine they run on, whatever the one that built them.
#pragma once

#include <cstdlib>  // __GLIBC__

// GCC compiles such a function three times, with all it calls, and the loader picks one. The
// portable one rounds a product before it adds, the others need not: bits may differ between
// machines, never between runs.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define ALIGNKIT_WIDE \
  __attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ALIGNKIT_WIDE
#endif
