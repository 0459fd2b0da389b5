// Vectors of memory, and |x|^p with its derivative.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "feature.cuh"

namespace at_fused::cuda {

template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  using Element = T;
  static constexpr int width = N;
  T x[N];
};

template <class T, int N>
__device__ Vec<T, N> load(const T* x) { return *reinterpret_cast<const Vec<T, N>*>(x); }

template <class T, int N>
__device__ void store(T* x, const Vec<T, N>& v) { *reinterpret_cast<Vec<T, N>*>(x) = v; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

// |x|^p and |x|^(p-1) sign(x), the factor p left out. A thread has up to `unroll` vectors in flight, a
// multiprocessor at least `blocks` blocks.

struct Power1 {
  static constexpr int unroll = 4, blocks = 2;
  __device__ explicit Power1(float) {}
  __device__ float value(float x) const { return fabsf(x); }
  __device__ float slope(float x) const { return static_cast<float>((x > 0) - (x < 0)); }
};

struct Power2 {
  static constexpr int unroll = 4, blocks = 2;
  __device__ explicit Power2(float) {}
  __device__ float value(float x) const { return x * x; }
  __device__ float slope(float x) const { return x; }
};

struct Power4 {
  static constexpr int unroll = 4, blocks = 2;
  __device__ explicit Power4(float) {}
  __device__ float value(float x) const { return (x * x) * (x * x); }
  __device__ float slope(float x) const { return (x * x) * x; }
};

struct PowerAny {
  static constexpr int unroll = 1, blocks = 1;  // a vector's interleaved powf take the registers
  float p;
  __device__ explicit PowerAny(float p) : p(p) {}
  __device__ float value(float x) const { return powf(fabsf(x), p); }
  __device__ float slope(float x) const { return copysignf(powf(fabsf(x), p - 1), x); }
};

// Calls use(Vec<T, N>{}) with the feature's element type and vector width.
template <class Use>
__device__ void with_vector(const Feature& feat, Use use) {
  switch (feat.dtype) {
    case DType::f32: return feat.vectors ? use(Vec<float, 4>{}) : use(Vec<float, 1>{});
    case DType::bf16: return feat.vectors ? use(Vec<__nv_bfloat16, 8>{}) : use(Vec<__nv_bfloat16, 1>{});
    case DType::f16: return feat.vectors ? use(Vec<__half, 8>{}) : use(Vec<__half, 1>{});
  }
}

}  // namespace at_fused::cuda
