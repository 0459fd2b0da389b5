// The two walks over a sample, its map and its gradient, in both memory layouts.
//
// Both visit the same vectors in the same order, so a thread finds again what it staged in shared memory. What
// counts is the number of instructions per vector: docs/kernels.md.
#pragma once

#include "lanes.cuh"
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

// Calls use(row, all) for every `unroll` rows from `row` on: all of them below `end`, or not the last ones.
template <int unroll, class Use>
__device__ void for_rows(int row, int end, int apart, Use use) {
#pragma unroll 1
  for (; row + (unroll - 1) * apart < end; row += unroll * apart) use(row, true);
  if (row < end) use(row, false);
}

// Of a column of vectors.
template <int N>
struct alignas(N * sizeof(float)) Sums {
  float x[N];
};

// Sums |x|^p over the channels into `map` (slice.positions). `scratch` has scratch_floats(); `stage` receives
// what was read, to `keep` it.
template <bool keep, class V, class T, class Power>
__device__ void map_channels_first(const Feature& feat, const Slice& slice, const T* sample, Power power,
                                   float* map, float* scratch, V* stage) {
  constexpr int N = V::width, unroll = Power::unroll;
  const Tiling tiling = feat.tiling;
  const int group = threadIdx.x / tiling.width, lane = threadIdx.x % tiling.width;
  const int columns = slice.length_of(feat) / N;
  const int half = divide_up(tiling.groups, 2);
  const int slot = group < half ? group : group - half;
  const unsigned row_bytes = feat.row_stride * sizeof(T);
  auto& shared_sum = reinterpret_cast<Sums<N>*>(scratch)[slot * tiling.width + lane];

#pragma unroll 1
  for (int pass = 0; pass < tiling.passes; ++pass) {
    const int begin = pass * tiling.width, column = begin + lane, element = column * N;
    const bool works = group < tiling.groups && column < columns;
    Sums<N> sum{};
    if (works) {
      const T* x = sample + slice.position + element;
      V* kept = stage + pass * tiling.steps * tiling.lanes() + threadIdx.x;
      const int end = end_of_rows(feat, slice, element);
      for_rows<unroll>(slice.row + group, end, tiling.groups, [&](int row, bool all) {
        V v[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
          const int r = row + u * tiling.groups;
          v[u] = all || r < end ? load<V>(advance(x, r, row_bytes)) : V{};
        }
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
          if (keep) {
            if (all || row + u * tiling.groups < end) *kept = v[u];
            kept += tiling.lanes();
          }
          float y[N];
          v[u].get(y);
#pragma unroll
          for (int j = 0; j < N; ++j) sum.x[j] += power.value(y[j]);
        }
      });
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

// --- channels-last: a group of a warp's lanes owns a position ---

template <bool keep, class V, class T, class Power>
__device__ void map_channels_last(const Feature& feat, const Slice& slice, const T* sample, Power power, float* map,
                                  V* stage) {
  constexpr int N = V::width, unroll = Power::unroll;
  static_assert(unroll <= max_unroll);
  const Tiling tiling = feat.tiling;
  const int group = threadIdx.x / tiling.width, lane = threadIdx.x % tiling.width;
  const int columns = slice.length_of(feat) / N, last = slice.positions - 1;
  const unsigned row_bytes = feat.row_stride * sizeof(T);
  const T* x = advance(sample, slice.position, row_bytes) + lane * N;
#pragma unroll 1
  for (int step = 0; step < tiling.steps && last >= 0; step += unroll) {  // the same for all lanes, as shuffles need
    const int row = step * tiling.groups + group;
    float sum[unroll] = {};
#pragma unroll 1
    for (int pass = 0; pass < tiling.passes; ++pass) {
      if (pass * tiling.width + lane >= columns) continue;
      const T* from = x + pass * tiling.width * N;
      V v[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {  // beyond the last position, of whose sum nothing is kept: the last once more
        v[u] = load<V>(advance(from, min(row + u * tiling.groups, last), row_bytes));
      }
      V* kept = stage + (pass * tiling.steps + step) * threads + threadIdx.x;
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        if (keep && step + u < tiling.steps) kept[u * threads] = v[u];
        float y[N];
        v[u].get(y);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[u] += power.value(y[j]);
      }
    }
    if (tiling.width > 1) {  // hence at least `unroll`
      const float total = sum_over_lanes<unroll>(sum_over_neighbours(sum), tiling.width);
      const int i = row + index_among_neighbours<unroll>() * tiling.groups;
      if (lane < unroll && i < slice.positions) map[i] = total;
    } else {
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int i = row + u * tiling.groups;
        if (i < slice.positions) map[i] = sum[u];
      }
    }
  }
  __syncthreads();
}

// --- gradients: a thread owns a column of vectors in either layout ---

// The first element of a slice.
template <bool channels_last, class T>
__device__ T* begin_of(T* sample, const Slice& slice, unsigned row_bytes) {
  return channels_last ? advance(sample, slice.position, row_bytes) : sample + slice.position;
}

// Writes factor * slope * |x|^(p-1) sign(x), where `added` plus `addend`, to `grad`; x is read from `sample`, or
// where `staged` from `stage`.
template <bool channels_last, bool staged, bool added, class V, class T, class Power>
__device__ void gradient_of_rows(const Feature& feat, const Slice& slice, const T* sample, const V* stage, Power power,
                                 const float* slope, float factor, T* grad, const T* addend, int grad_row_stride) {
  constexpr int N = V::width, unroll = Power::unroll == 1 ? 1 : 2;
  const Tiling tiling = feat.tiling;
  const int group = threadIdx.x / tiling.width, lane = threadIdx.x % tiling.width;
  const int columns = slice.length_of(feat) / N, lanes = tiling.lanes();
  const int first_row = channels_last ? 0 : slice.row;
  const unsigned row_bytes = feat.row_stride * sizeof(T), grad_row_bytes = grad_row_stride * sizeof(T);
  const T* const first = begin_of<channels_last>(sample, slice, row_bytes);
  T* const grad_first = begin_of<channels_last>(grad, slice, grad_row_bytes);
  const T* const addend_first = added ? begin_of<channels_last>(addend, slice, grad_row_bytes) : nullptr;
  if (group >= tiling.groups) return;
#pragma unroll 1
  for (int pass = 0; pass < tiling.passes; ++pass) {
    const int column = pass * tiling.width + lane, element = column * N;
    if (column >= columns) return;
    const T* x = first + element;
    T* out = grad_first + element;
    const T* more = added ? addend_first + element : nullptr;
    const V* kept = stage + pass * tiling.steps * lanes + threadIdx.x;
    const int end = channels_last ? slice.positions : end_of_rows(feat, slice, element);
    float factors[N];  // channels-first, a column's positions have one each
    if (!channels_last) {
      int position = element % slice.positions;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        factors[j] = slope[position] * factor;
        if (++position == slice.positions) position = 0;
      }
    }
    for_rows<unroll>(first_row + group, end, tiling.groups, [&](int row, bool all) {
      V v[unroll];
      float row_factor[unroll];
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int r = row + u * tiling.groups;
        const bool works = all || r < end;
        v[u] = !works ? V{} : staged ? *kept : load<V>(advance(x, r, row_bytes));
        row_factor[u] = works && channels_last ? slope[r] * factor : 0;
        kept += lanes;
      }
#pragma unroll
      for (int u = 0; u < unroll; ++u) {
        const int r = row + u * tiling.groups;
        if (all || r < end) {
          float y[N];
          v[u].get(y);
#pragma unroll
          for (int j = 0; j < N; ++j) y[j] = (channels_last ? row_factor[u] : factors[j]) * power.slope(y[j]);
          if (added) {
            float z[N];
            load<V>(advance(more, r, grad_row_bytes)).get(z);
#pragma unroll
            for (int j = 0; j < N; ++j) y[j] += z[j];
          }
          v[u].set(y);
          store(advance(out, r, grad_row_bytes), v[u]);
        }
      }
    });
  }
}

// --- both ---

// Raw map of a slice of sample `sample`: `map` has slice.positions floats. What was read stays in `stage`, to `keep`
// it. Ends with a barrier.
template <bool keep, class Power>
__device__ void map_of(const Feature& feat, const Slice& slice, int64_t sample, Power power, float* map,
                       float* scratch, void* stage) {
  with_vector(feat, [&](auto vector) {
    using V = decltype(vector);
    const auto* x = static_cast<const typename V::Element*>(feat.data) + sample * feat.batch_stride;
    if (feat.channels_last) {
      map_channels_last<keep>(feat, slice, x, power, map, static_cast<V*>(stage));
    } else {
      map_channels_first<keep>(feat, slice, x, power, map, scratch, static_cast<V*>(stage));
    }
  });
}

// Gradient of a slice, read from the feature or, where `staged`, from `stage`. `slope` is the slice's.
template <bool staged, bool added, class Power>
__device__ void gradient_of(const Feature& feat, const Slice& slice, int64_t sample, const void* stage, Power power,
                            const float* slope, float factor, const Gradient& grad) {
  with_vector(feat, [&](auto vector) {
    using V = decltype(vector);
    using T = typename V::Element;
    const T* x = static_cast<const T*>(feat.data) + sample * feat.batch_stride;
    const V* vectors = static_cast<const V*>(stage);
    T* out = static_cast<T*>(grad.data) + sample * grad.batch_stride;
    const T* more = added ? static_cast<const T*>(grad.addend) + sample * grad.batch_stride : nullptr;
    if (feat.channels_last) {
      gradient_of_rows<true, staged, added>(feat, slice, x, vectors, power, slope, factor, out, more, grad.row_stride);
    } else {
      gradient_of_rows<false, staged, added>(feat, slice, x, vectors, power, slope, factor, out, more, grad.row_stride);
    }
  });
}

}  // namespace at_fused::cuda
