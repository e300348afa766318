// As much of CUDA as alignkit's kernels use, on CPU threads: a thread a lane, a barrier a warp and
// one a block. Blocks run one after the other, so that what a block shares may be static.
// Slow and exact: it shows what a kernel computes on machines that have no GPU.
#pragma once

#include <pthread.h>

#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct Index {
  unsigned x;
};
inline thread_local Index blockIdx, threadIdx;

constexpr int kLanesOfWarp = 32;

struct Warp {
  pthread_barrier_t barrier;
  unsigned char slots[kLanesOfWarp][8];
  Warp() { pthread_barrier_init(&barrier, nullptr, kLanesOfWarp); }
  ~Warp() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
};
inline thread_local Warp* warp;

inline thread_local pthread_barrier_t* block_barrier;
inline void __syncthreads() { pthread_barrier_wait(block_barrier); }

template <class T>
T exchange(T value, int source) {
  T got;
  std::memcpy(warp->slots[threadIdx.x % kLanesOfWarp], &value, sizeof value);
  warp->wait();
  std::memcpy(&got, warp->slots[source], sizeof got);
  warp->wait();
  return got;
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return exchange(value, source);
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  const int lane = threadIdx.x % kLanesOfWarp;
  return exchange(value, lane >= static_cast<int>(by) ? lane - static_cast<int>(by) : lane);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int by) {
  return exchange(value, static_cast<int>(threadIdx.x % kLanesOfWarp) ^ by);
}

inline unsigned __ballot_sync(unsigned, bool holds) {
  unsigned all = 0;
  for (int lane = 0; lane < kLanesOfWarp; ++lane) all |= exchange(unsigned{holds}, lane) << lane;
  return all;
}

inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class Kernel, class... Args>
void launch(Kernel kernel, unsigned blocks, unsigned threads, int, cudaStream_t,
            const Args&... args) {
  for (unsigned block = 0; block < blocks; ++block) {
    const auto warps = std::make_unique<Warp[]>(threads / kLanesOfWarp);
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, nullptr, threads);
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t)
      running.emplace_back([&, t] {
        blockIdx.x = block;
        threadIdx.x = t;
        warp = &warps[t / kLanesOfWarp];
        block_barrier = &barrier;
        kernel(args...);
      });
    for (auto& thread : running) thread.join();
    pthread_barrier_destroy(&barrier);
  }
}
