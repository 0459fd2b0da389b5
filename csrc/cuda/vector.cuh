// Vectors of memory, and |x|^p with its derivative.
#pragma once

#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "feature.cuh"

namespace at_fused::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& y) { y = __float2half_rn(x); }

// A word of two halves.
template <class T>
struct Halves;

template <>
struct Halves<__nv_bfloat16> {
  static __device__ float2 widen(unsigned word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  static __device__ __nv_bfloat162 narrow(float x, float y) { return __floats2bfloat162_rn(x, y); }
};

template <>
struct Halves<__half> {
  static __device__ float2 widen(unsigned word) {
    __half2 halves;
    memcpy(&halves, &word, sizeof(word));
    return __half22float2(halves);
  }
  static __device__ __half2 narrow(float x, float y) { return __floats2half2_rn(x, y); }
};

// N elements: one, or four floats.
template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  using Element = T;
  static constexpr int width = N;
  T x[N];

  __device__ void get(float (&y)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = widen(x[j]);
  }
  __device__ void set(const float (&y)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) narrow(y[j], x[j]);
  }
};

// Eight halves, as words: to move one 16-bit member on a condition takes two permutes.
template <class T>
struct alignas(16) Vec<T, 8> {
  using Element = T;
  static constexpr int width = 8;
  unsigned word[4];

  __device__ void get(float (&y)[8]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = Halves<T>::widen(word[j]);
      y[2 * j] = pair.x;
      y[2 * j + 1] = pair.y;
    }
  }
  __device__ void set(const float (&y)[8]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto pair = Halves<T>::narrow(y[2 * j], y[2 * j + 1]);
      memcpy(&word[j], &pair, sizeof(pair));
    }
  }
};

template <class V>
__device__ V load(const typename V::Element* x) { return *reinterpret_cast<const V*>(x); }

template <class V>
__device__ void store(typename V::Element* x, const V& v) { *reinterpret_cast<V*>(x) = v; }

// `x` moved on by `rows` rows of `row_bytes`: a single instruction.
template <class T>
__device__ T* advance(T* x, int rows, unsigned row_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(x) + uint64_t{static_cast<unsigned>(rows)} * row_bytes);
}

// |x|^p and |x|^(p-1) sign(x), the factor p left out. A thread has up to `unroll` vectors in flight, a
// multiprocessor at least `blocks` blocks.

struct Power1 {
  static constexpr int unroll = 4, blocks = 2;
  __device__ explicit Power1(float) {}
  __device__ float value(float x) const { return fabsf(x); }
  __device__ float slope(float x) const { return fabsf(x) > 0 ? copysignf(1, x) : 0; }  // 0 for NaN, too
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
