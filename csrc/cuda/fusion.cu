// Attention of a few queries over visual and tactile tokens (nbs/kernels/07_fusion.ipynb).
//
// A block takes one row and a few heads; its warps share out the tokens. The lanes of a warp hold
// the columns: queries, tokens and the running context stay in registers. The warps' results are
// added in a fixed order. Backward: one kernel for the queries, which leaves the attention and
// the gradient of every score behind, and one that turns these into the gradient of the tokens.
#include <cmath>

#include "device_guard.h"
#include "kernels.h"

namespace alignkit {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a block
constexpr unsigned kAll = 0xffffffffu;

using bfloat16 = std::uint16_t;  // the upper half of a float

// What fits into registers, for so many columns a lane.
template <int E>
constexpr int kHeads = E <= 8 ? 4 : E == 16 ? 2 : 1;
template <int E>
constexpr int kTokens = E <= 8 ? 4 : E == 16 ? 2 : 1;

union Bits {
  float number;
  std::uint32_t bits;
};

__device__ float widen(float x) { return x; }
__device__ float widen(bfloat16 x) {
  Bits y;
  y.bits = std::uint32_t{x} << 16;
  return y.number;
}

__device__ void narrow(float x, float* y) { *y = x; }
__device__ void narrow(float x, bfloat16* y) {  // to nearest, ties to even; a NaN stays one
  Bits u;
  u.number = x;
  const std::uint32_t rounded = (u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16;
  *y = static_cast<bfloat16>(x == x ? rounded : (u.bits >> 16) | 0x40u);
}

__device__ float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

__device__ bool counts(const FusionTokens& x, std::int64_t b, std::int64_t n) {
  if (n >= x.Nv + x.Nt) return false;
  const bool seen = n < x.Nv;
  const std::uint8_t* mask = seen ? x.visual_mask : x.tactile_mask;
  return !mask || mask[seen ? row_start(b, x.Nv) + n : row_start(b, x.Nt) + n - x.Nv];
}

// Where token n of row b begins in an array like the tokens.
template <class T, class Visual, class Tactile>
__device__ T* token_of(const FusionTokens& x, Visual* visual, Tactile* tactile, std::int64_t b,
                       std::int64_t n) {
  return n < x.Nv ? static_cast<T*>(visual) + row_start(row_start(b, x.Nv) + n, x.D)
                  : static_cast<T*>(tactile) + row_start(row_start(b, x.Nt) + n - x.Nv, x.D);
}

// This lane's columns of a row of D numbers; zeros where it is not `real`.
template <int E, class T>
__device__ void load_row(const T* row, std::int64_t D, bool real, float (&out)[E]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const int d = e * kWarp + lane;
    out[e] = real && d < D ? widen(row[d]) : 0.0f;
  }
}

template <int E>
__device__ float product(const float (&x)[E], const float (&y)[E]) {
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < E; ++e) sum += x[e] * y[e];
  return warp_sum(sum);
}

// The block's first head and its row.
template <int E>
__device__ void place(const FusionTokens& x, std::int64_t& b, std::int64_t& head) {
  const std::int64_t groups = (x.H + kHeads<E> - 1) / kHeads<E>;
  b = blockIdx.x / groups;
  head = blockIdx.x % groups * kHeads<E>;
}

// total = sum over the warps, first to last, of scale * part. All threads of the block come here.
template <int E>
__device__ void add_warps(const float (&part)[kHeads<E>][E], const float (&scale)[kHeads<E>],
                          float (&total)[kHeads<E>][E * kWarp]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int w = 0; w < kWarps; ++w) {
    if (warp == w)
#pragma unroll
      for (int q = 0; q < kHeads<E>; ++q)
#pragma unroll
        for (int e = 0; e < E; ++e) {
          float& sum = total[q][e * kWarp + lane];
          sum = (w ? sum : 0.0f) + scale[q] * part[q][e];
        }
    __syncthreads();
  }
}

template <class T, int E>
__global__ void forward_kernel(FusionTokens x, FusionResults out) {
  constexpr int Q = kHeads<E>, M = kTokens<E>;
  __shared__ float tops[kWarps][Q], masses[kWarps][Q][2], total[Q][E * kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  std::int64_t b, head;
  place<E>(x, b, head);
  float query[Q][E], context[Q][E] = {}, top[Q], seen[Q] = {}, felt[Q] = {};
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    top[q] = -INFINITY;
    load_row(x.queries + row_start(row_start(b, x.H) + head + q, x.D), x.D, head + q < x.H,
             query[q]);
  }
  for (std::int64_t n = warp * M; n < x.Nv + x.Nt; n += kWarps * M) {
    float token[M][E];
    bool counted[M];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      counted[m] = counts(x, b, n + m);
      load_row(token_of<const T>(x, x.visual, x.tactile, b, n + m), x.D, counted[m], token[m]);
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      float score[M], higher = top[q];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float s = product(query[q], token[m]);
        score[m] = counted[m] ? s : -INFINITY;
        higher = fmaxf(higher, score[m]);
      }
      const float base = higher > -INFINITY ? higher : 0.0f;
      const float scale = top[q] > -INFINITY ? expf(top[q] - base) : 0.0f;
      top[q] = higher;
      seen[q] *= scale;
      felt[q] *= scale;
#pragma unroll
      for (int e = 0; e < E; ++e) context[q][e] *= scale;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float p = expf(score[m] - base);
        seen[q] += n + m < x.Nv ? p : 0.0f;
        felt[q] += n + m < x.Nv ? 0.0f : p;
#pragma unroll
        for (int e = 0; e < E; ++e) context[q][e] += p * token[m][e];
      }
    }
  }
#pragma unroll
  for (int q = 0; q < Q; ++q)
    if (lane == 0) {
      tops[warp][q] = top[q];
      masses[warp][q][0] = seen[q];
      masses[warp][q][1] = felt[q];
    }
  __syncthreads();
  float highest[Q], own[Q], mass[Q][2] = {};
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    highest[q] = -INFINITY;
    for (int w = 0; w < kWarps; ++w) highest[q] = fmaxf(highest[q], tops[w][q]);
    for (int w = 0; w < kWarps; ++w) {
      const float scale = tops[w][q] > -INFINITY ? expf(tops[w][q] - highest[q]) : 0.0f;
      mass[q][0] += scale * masses[w][q][0];
      mass[q][1] += scale * masses[w][q][1];
    }
    own[q] = top[q] > -INFINITY ? expf(top[q] - highest[q]) : 0.0f;
  }
  add_warps<E>(context, own, total);
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (head + q >= x.H) break;
    const std::int64_t row = row_start(b, x.H) + head + q;
    const float all = mass[q][0] + mass[q][1];
    const float share = all == 0.0f ? 0.0f : 1.0f / all;  // nothing to attend to: zeros
    for (int d = threadIdx.x; d < x.D; d += kWarps * kWarp)
      out.context[row_start(row, x.D) + d] = share * total[q][d];
    if (threadIdx.x == 0) {
      out.weights[2 * row] = share * mass[q][0];
      out.weights[2 * row + 1] = share * mass[q][1];
      out.log_sum[row] = highest[q] + logf(all);
    }
  }
}

// Gradient of the queries; leaves (B, H, N) of attention and of the scores' gradient behind.
template <class T, int E>
__global__ void queries_kernel(FusionTokens x, FusionGradients g, FusionWorkspace work) {
  constexpr int Q = kHeads<E>;
  __shared__ float total[Q][E * kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t N = x.Nv + x.Nt;
  std::int64_t b, head;
  place<E>(x, b, head);
  float query[Q][E], grad[Q][E], sum[Q][E] = {}, ones[Q];
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const std::int64_t row = row_start(row_start(b, x.H) + head + q, x.D);
    ones[q] = 1.0f;
    load_row(x.queries + row, x.D, head + q < x.H, query[q]);
    load_row(g.grad_context + row, x.D, head + q < x.H, grad[q]);
  }
  for (std::int64_t n = warp; n < N; n += kWarps) {
    float token[E];
    const bool counted = counts(x, b, n);
    load_row(token_of<const T>(x, x.visual, x.tactile, b, n), x.D, counted, token);
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const float score = product(query[q], token), slope = product(grad[q], token);
      if (head + q >= x.H) continue;
      const std::int64_t row = row_start(b, x.H) + head + q;
      const float p = counted ? expf(score - g.log_sum[row]) : 0.0f;
      const float by_modality = g.grad_weights[2 * row + (n < x.Nv ? 0 : 1)];
      const float s = counted ? p * (slope + by_modality - g.mean_grad[row]) : 0.0f;
#pragma unroll
      for (int e = 0; e < E; ++e) sum[q][e] += s * token[e];
      if (lane == 0) {
        work.attention[row_start(row, N) + n] = p;
        work.grad_scores[row_start(row, N) + n] = s;
      }
    }
  }
  add_warps<E>(sum, ones, total);
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    if (head + q >= x.H) break;
    const std::int64_t row = row_start(b, x.H) + head + q;
    for (int d = threadIdx.x; d < x.D; d += kWarps * kWarp)
      g.grad_queries[row_start(row, x.D) + d] = total[q][d];
  }
}

// Gradient of the tokens, from what `queries_kernel` left.
template <class T, int E>
__global__ void tokens_kernel(FusionTokens x, FusionGradients g, FusionWorkspace work) {
  constexpr int M = kTokens<E>;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t N = x.Nv + x.Nt, teams = (N + M - 1) / M;
  const std::int64_t team = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const std::int64_t b = team / teams, n = team % teams * M;
  if (b >= x.B) return;
  float sum[M][E] = {};
  for (std::int64_t h = 0; h < x.H; ++h) {
    const std::int64_t row = row_start(b, x.H) + h;
    float query[E], grad[E];
    load_row(x.queries + row_start(row, x.D), x.D, true, query);
    load_row(g.grad_context + row_start(row, x.D), x.D, true, grad);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (n + m >= N) break;
      const float p = work.attention[row_start(row, N) + n + m];
      const float s = work.grad_scores[row_start(row, N) + n + m];
#pragma unroll
      for (int e = 0; e < E; ++e) sum[m][e] += p * grad[e] + s * query[e];
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if (n + m >= N) break;
    T* out = token_of<T>(x, g.grad_visual, g.grad_tactile, b, n + m);
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (e * kWarp + lane < x.D) narrow(sum[m][e], out + e * kWarp + lane);
  }
}

template <class T, int E>
void launch_forward(const FusionTokens& x, const FusionResults& out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(x.B * ((x.H + kHeads<E> - 1) / kHeads<E>));
  const auto kernel = forward_kernel<T, E>;
  kernel<<<blocks, kWarps * kWarp, 0, stream>>>(x, out);
}

template <class T, int E>
void launch_backward(const FusionTokens& x, const FusionGradients& g,
                     const FusionWorkspace& work, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(x.B * ((x.H + kHeads<E> - 1) / kHeads<E>));
  const auto queries = queries_kernel<T, E>;
  queries<<<blocks, kWarps * kWarp, 0, stream>>>(x, g, work);
  const std::int64_t teams = x.B * ((x.Nv + x.Nt + kTokens<E> - 1) / kTokens<E>);
  const auto shares = static_cast<unsigned>((teams + kWarps - 1) / kWarps);
  const auto tokens = tokens_kernel<T, E>;
  if (shares) tokens<<<shares, kWarps * kWarp, 0, stream>>>(x, g, work);
}

// Calls `launch` with the tokens' type and the columns a lane holds.
template <class Launch>
cudaError_t for_columns(const FusionTokens& x, int device, const Launch& launch) {
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const auto of = [&](auto token) {
    using T = decltype(token);
    if (x.D <= 4 * kWarp) launch.template operator()<T, 4>();
    else if (x.D <= 8 * kWarp) launch.template operator()<T, 8>();
    else if (x.D <= 16 * kWarp) launch.template operator()<T, 16>();
    else launch.template operator()<T, 32>();
  };
  if (x.bfloat16) of(bfloat16{});
  else of(float{});
  return cudaGetLastError();
}

struct Forward {
  const FusionTokens& x;
  const FusionResults& out;
  cudaStream_t stream;
  template <class T, int E>
  void operator()() const { launch_forward<T, E>(x, out, stream); }
};

struct Backward {
  const FusionTokens& x;
  const FusionGradients& g;
  const FusionWorkspace& work;
  cudaStream_t stream;
  template <class T, int E>
  void operator()() const { launch_backward<T, E>(x, g, work, stream); }
};

}  // namespace

cudaError_t fusion_on_device(const FusionTokens& x, const FusionResults& out, int device,
                             cudaStream_t stream) {
  return for_columns(x, device, Forward{x, out, stream});
}

cudaError_t fusion_backward_on_device(const FusionTokens& x, const FusionGradients& g,
                                      const FusionWorkspace& work, int device,
                                      cudaStream_t stream) {
  return for_columns(x, device, Backward{x, g, work, stream});
}

}  // namespace alignkit
