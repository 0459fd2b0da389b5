// Sums over the lanes of a warp.
#pragma once

#include <cuda_runtime.h>

namespace at_fused::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

// Adds value[0..N) over every N neighbouring lanes, of which each gets one of the sums: each step halves the values
// that a lane still adds, so that all together take N - 1 shuffles.
template <int N, class T>
__device__ T sum_over_neighbours(T (&value)[N]) {
#pragma unroll
  for (int half = N / 2, other = 1; half; half /= 2, other *= 2) {
    const bool upper = threadIdx.x & other;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const T kept = upper ? value[j + half] : value[j], given = upper ? value[j] : value[j + half];
      value[j] = kept + __shfl_xor_sync(all_lanes, given, other);
    }
  }
  return value[0];
}

// Which sum this lane gets.
template <int N>
__device__ int index_among_neighbours() {
  int index = 0;
#pragma unroll
  for (int half = N / 2, other = 1; half; half /= 2, other *= 2) index += threadIdx.x & other ? half : 0;
  return index;
}

// Adds `value` over the lanes that differ in the bits from `first` up to below `width`.
template <int first, class T>
__device__ T sum_over_lanes(T value, int width) {
#pragma unroll
  for (int other = first; other < 32; other *= 2) {
    if (other < width) value += __shfl_xor_sync(all_lanes, value, other);
  }
  return value;
}

}  // namespace at_fused::cuda
