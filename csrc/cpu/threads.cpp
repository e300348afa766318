// The workers of torch's OpenMP runtime, where there is one: for a while after each of torch's
// parallel regions they wait spinning, and threads of our own would have to share their cores.
#include "threads.h"

#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace alignkit {
namespace {

#if defined(__linux__)
template <class Function>
void find(const char* name, Function*& found) {
  found = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
}

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*thread)();
  int (*threads)();
  pid_t process;  // a fork of it has no workers, and would wait for them for ever

  OpenMP() : process(getpid()) {
    find("GOMP_parallel", parallel);
    find("omp_get_thread_num", thread);
    find("omp_get_num_threads", threads);
  }

  bool usable() const { return parallel && thread && threads && process == getpid(); }
};

const OpenMP openmp;  // found when the extension is loaded, which is after torch

struct Work {
  int shares;
  void (*part)(void*, int);
  void* context;
};

// There may be fewer threads than were asked for.
void work(void* data) {
  const Work& x = *static_cast<Work*>(data);
  for (int i = openmp.thread(); i < x.shares; i += openmp.threads()) x.part(x.context, i);
}
#endif

void in_own_threads(int shares, void (*part)(void*, int), void* context) {
  std::vector<std::thread> others;
  for (int i = 1; i < shares; ++i) others.emplace_back(part, context, i);
  part(context, 0);
  for (auto& other : others) other.join();
}

}  // namespace

void side_by_side(int shares, void (*part)(void*, int), void* context) {
  if (shares == 1) return part(context, 0);
#if defined(__linux__)
  if (openmp.usable()) {
    Work x{shares, part, context};
    return openmp.parallel(work, &x, static_cast<unsigned>(shares), 0);
  }
#endif
  in_own_threads(shares, part, context);
}

}  // namespace alignkit
