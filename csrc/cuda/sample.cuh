// The two walks over a sample, its map and its gradient, in both memory layouts.
//
// Both visit the same vectors in the same order, so a thread finds again what it staged in shared memory.
#pragma once

#include "vector.cuh"

namespace at_fused::cuda {

// --- channels-first: a thread owns a column of vectors, groups of threads share the rows ---

// The rows from slice.row on that hold `element`: the last folded row may be shorter.
__device__ inline int end_of_rows(const Feature& feat, const Slice& slice, int element) {
  const int end = slice.end_of(feat);
  if (!feat.folded()) return end;
  const int holding = divide_up(feat.channels * feat.positions - element, feat.row_length);
  return holding < end ? holding : end;
}

// Sums |x|^p over the channels into `map` (slice.positions). `scratch` has scratch_floats(); `stage` receives
// what was read, to `keep` it.
template <int unroll, class T, int N, class Power>
__device__ void map_channels_first(const Feature& feat, const Slice& slice, const T* sample, Power power,
                                   float* map, float* scratch, bool keep, Vec<T, N>* stage) {
  const Tiling& tiling = feat.tiling;
  const int group = threadIdx.x / tiling.width, lane = threadIdx.x % tiling.width;
  const int columns = slice.length_of(feat) / N;
  const int half = divide_up(tiling.groups, 2);
  const int slot = group < half ? group : group - half;
  auto& shared_sum = reinterpret_cast<Vec<float, N>*>(scratch)[slot * tiling.width + lane];

#pragma unroll 1
  for (int pass = 0; pass < tiling.passes; ++pass) {
    const int begin = pass * tiling.width, column = begin + lane, element = column * N;
    const bool works = group < tiling.groups && column < columns;
    Vec<float, N> sum{};
    if (works) {
      const int end = end_of_rows(feat, slice, element);
      int index = pass * tiling.steps * tiling.lanes() + threadIdx.x;
      const T* x = sample + slice.position + element;
#pragma unroll 1
      for (int row = slice.row + group; row < end; row += unroll * tiling.groups) {
        Vec<T, N> v[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
          const int r = row + u * tiling.groups;
          v[u] = r < end ? load<T, N>(x + r * int64_t{feat.row_stride}) : Vec<T, N>{};
        }
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
          if (keep && row + u * tiling.groups < end) stage[index] = v[u];
          index += tiling.lanes();
#pragma unroll
          for (int j = 0; j < N; ++j) sum.x[j] += power.value(widen(v[u].x[j]));
        }
      }
      if (group >= half) shared_sum = sum;
    }
    // The upper half of the groups hands over to the lower, and that one to the positions' threads.
    __syncthreads();
    if (works && group < half) {
      if (group + half < tiling.groups) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum.x[j] += shared_sum.x[j];
      }
      shared_sum = sum;
    }
    __syncthreads();
    const int left = columns - begin, count = (left < tiling.width ? left : tiling.width) * N;
    for (int i = threadIdx.x; i < slice.positions; i += threads) {
      float total = pass ? map[i] : 0;
      const int shift = begin * N % slice.positions;
      const int e = i < shift ? i + slice.positions - shift : i - shift;  // the first at position i
      for (int g = 0; g < half; ++g) {
        for (int k = e; k < count; k += slice.positions) total += scratch[g * tiling.width * N + k];
      }
      map[i] = total;
    }
    __syncthreads();
  }
}

// Writes factor * slope * |x|^(p-1) sign(x) to `grad`; x is read from `sample`, or where `staged` from `stage`.
template <bool staged, class T, int N, class Power>
__device__ void gradient_channels_first(const Feature& feat, const Slice& slice, const T* sample,
                                        const Vec<T, N>* stage, Power power, const float* slope, float factor,
                                        T* grad, int grad_row_stride) {
  constexpr int unroll = staged || Power::unroll == 1 ? 1 : 2;
  const Tiling& tiling = feat.tiling;
  const int group = threadIdx.x / tiling.width, lane = threadIdx.x % tiling.width;
  const int columns = slice.length_of(feat) / N;
  if (group >= tiling.groups) return;
#pragma unroll 1
  for (int pass = 0; pass < tiling.passes; ++pass) {
    const int column = pass * tiling.width + lane, element = column * N;
    if (column >= columns) return;
    float factors[N];
    int position = element % slice.positions;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      factors[j] = slope[position] * factor;
      if (++position == slice.positions) position = 0;
    }
    const int end = end_of_rows(feat, slice, element);
    const T* x = sample + slice.position + element;
    T* out = grad + slice.position + element;
    int index = pass * tiling.steps * tiling.lanes() + threadIdx.x;
#pragma unroll 1
    for (int row = slice.row + group; row < end; row += unroll * tiling.groups) {
      Vec<T, N> v[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int r = row + u * tiling.groups;
        v[u] = r >= end ? Vec<T, N>{} : (staged ? stage[index] : load<T, N>(x + r * int64_t{feat.row_stride}));
        index += tiling.lanes();
      }
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
#pragma unroll
        for (int j = 0; j < N; ++j) v[u].x[j] = narrow<T>(factors[j] * power.slope(widen(v[u].x[j])));
        const int r = row + u * tiling.groups;
        if (r < end) store(out + r * int64_t{grad_row_stride}, v[u]);
      }
    }
  }
}

// --- channels-last: a group of a warp's lanes owns a position ---

template <int unroll, class T, int N, class Power>
__device__ void map_channels_last(const Feature& feat, const Slice& slice, const T* sample, Power power, float* map,
                                  bool keep, Vec<T, N>* stage) {
  const Tiling& tiling = feat.tiling;
  const int group = threadIdx.x / tiling.width, lane = threadIdx.x % tiling.width;
  const int columns = slice.length_of(feat) / N;
#pragma unroll 1
  for (int step = 0; step < tiling.steps; step += unroll) {  // the same for all lanes, as shuffles need
    float sum[unroll] = {};
#pragma unroll 1
    for (int pass = 0; pass < tiling.passes; ++pass) {
      const int column = pass * tiling.width + lane, i = step * tiling.groups + group;
      const int end = column < columns ? slice.positions : 0;
      const T* x = sample + slice.position * int64_t{feat.row_stride} + column * N;
      Vec<T, N> v[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int row = i + u * tiling.groups;
        v[u] = row < end ? load<T, N>(x + row * int64_t{feat.row_stride}) : Vec<T, N>{};
      }
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        if (keep && step + u < tiling.steps) stage[((step + u) * tiling.passes + pass) * threads + threadIdx.x] = v[u];
#pragma unroll
        for (int j = 0; j < N; ++j) sum[u] += power.value(widen(v[u].x[j]));
      }
    }
#pragma unroll
    for (int u = 0; u < unroll; ++u) {
      for (int other = tiling.width / 2; other; other /= 2) sum[u] += __shfl_xor_sync(0xffffffffu, sum[u], other);
      const int i = (step + u) * tiling.groups + group;
      if (lane == 0 && i < slice.positions) map[i] = sum[u];
    }
  }
  __syncthreads();
}

template <bool staged, class T, int N, class Power>
__device__ void gradient_channels_last(const Feature& feat, const Slice& slice, const T* sample,
                                       const Vec<T, N>* stage, Power power, const float* slope, float factor,
                                       T* grad, int grad_row_stride) {
  constexpr int unroll = staged || Power::unroll == 1 ? 1 : 2;
  const Tiling& tiling = feat.tiling;
  const int group = threadIdx.x / tiling.width, lane = threadIdx.x % tiling.width;
  const int columns = slice.length_of(feat) / N;
#pragma unroll 1
  for (int step = 0; step < tiling.steps; step += unroll) {
    const int i = step * tiling.groups + group;
#pragma unroll 1
    for (int pass = 0; pass < tiling.passes; ++pass) {
      const int column = pass * tiling.width + lane;
      if (column >= columns) break;
      const T* x = sample + slice.position * int64_t{feat.row_stride} + column * N;
      T* out = grad + slice.position * int64_t{grad_row_stride} + column * N;
      int index = (step * tiling.passes + pass) * threads + threadIdx.x;
      Vec<T, N> v[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int row = i + u * tiling.groups;
        v[u] = row >= slice.positions ? Vec<T, N>{}
                                      : (staged ? stage[index] : load<T, N>(x + row * int64_t{feat.row_stride}));
        index += tiling.passes * threads;
      }
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int row = i + u * tiling.groups;
        if (row < slice.positions) {
          const float slope_here = slope[row] * factor;
#pragma unroll
          for (int j = 0; j < N; ++j) v[u].x[j] = narrow<T>(slope_here * power.slope(widen(v[u].x[j])));
          store(out + row * int64_t{grad_row_stride}, v[u]);
        }
      }
    }
  }
}

// --- both ---

// Raw map of a slice of sample `sample`, with `unroll` vectors in flight per thread: `map` has slice.positions
// floats. What was read stays in `stage`, to `keep` it. Ends with a barrier.
template <int unroll, class Power>
__device__ void map_of(const Feature& feat, const Slice& slice, int64_t sample, Power power, float* map,
                       float* scratch, bool keep, void* stage) {
  with_vector(feat, [&](auto vector) {
    using V = decltype(vector);
    using T = typename V::Element;
    const T* x = static_cast<const T*>(feat.data) + sample * feat.batch_stride;
    if (feat.channels_last) {
      map_channels_last<unroll>(feat, slice, x, power, map, keep, static_cast<V*>(stage));
    } else {
      map_channels_first<unroll>(feat, slice, x, power, map, scratch, keep, static_cast<V*>(stage));
    }
  });
}

// Gradient of a slice, read from the feature or, where `staged`, from `stage`. `slope` is the slice's.
template <bool staged, class Power>
__device__ void gradient_of(const Feature& feat, const Slice& slice, int64_t sample, const void* stage, Power power,
                            const float* slope, float factor, const Gradient& grad) {
  with_vector(feat, [&](auto vector) {
    using V = decltype(vector);
    using T = typename V::Element;
    const T* x = static_cast<const T*>(feat.data) + sample * feat.batch_stride;
    const V* vectors = static_cast<const V*>(stage);
    T* out = static_cast<T*>(grad.data) + sample * grad.batch_stride;
    if (feat.channels_last) {
      gradient_channels_last<staged>(feat, slice, x, vectors, power, slope, factor, out, grad.row_stride);
    } else {
      gradient_channels_first<staged>(feat, slice, x, vectors, power, slope, factor, out, grad.row_stride);
    }
  });
}

}  // namespace at_fused::cuda
