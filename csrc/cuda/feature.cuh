// What the kernels know of their tensors: plain tables, passed to a launch by value.
#pragma once

#include <climits>
#include <cstdint>

#include <cuda_runtime.h>

namespace at_fused::cuda {

constexpr int threads = 416;     // per block, in every kernel
constexpr int max_pairs = 16;    // per launch: kernel parameters may take 4 KB
constexpr int max_features = 32;
constexpr int max_counters = 4096;
constexpr int max_unroll = 4;    // vectors that a thread has in flight
constexpr int max_team = 8;      // the largest portable cluster

enum class DType : int8_t { f32, bf16, f16 };

__host__ __device__ constexpr int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// How a block's threads share the vectors of a slice: `groups` of `width` threads, a group per row, a thread per
// vector. They take `passes` over the columns and `steps` over the rows.
struct Tiling {
  int32_t width, groups, passes, steps;

  __host__ __device__ int lanes() const { return groups * width; }
};

// A feature (B, C, *spatial) whose positions are evenly spaced. In memory a sample is a matrix of contiguous rows:
// channels-first (C, positions), or channels-last (positions, C). Where positions is no multiple of a 16-byte
// vector (7x7), a dense channels-first sample is *folded*: its rows are as long as the least common multiple of
// the two, so every row starts at a vector, and element e of a row lies at position e % positions.
struct Feature {
  const void* data;
  int64_t batch_stride;  // in elements, as all strides
  int32_t row_stride;
  int32_t channels;
  int32_t positions;
  int32_t rows;
  int32_t row_length;
  Tiling tiling;  // of the launch's largest slice
  DType dtype;
  bool channels_last;
  bool vectors;  // 16-byte accesses; else one element at a time

  __host__ __device__ bool folded() const { return !channels_last && row_length != positions; }
  __host__ __device__ int vector_width() const { return vectors ? 16 / size_of(dtype) : 1; }
};

// Where a feature's gradient goes: a matrix per sample like the feature's own. `addend`, if there, has the same
// strides and is added to it.
struct Gradient {
  void* data;
  int64_t batch_stride;
  int32_t row_stride;
  const void* addend;
};

// The part of a sample that a block works on: some of its positions (all, where folded), and channels-first some
// of its rows.
struct Slice {
  int position, positions;
  int row = 0, end_row = INT_MAX;  // cut at the feature's own

  __host__ __device__ int end_of(const Feature& feat) const { return end_row < feat.rows ? end_row : feat.rows; }

  // Elements of a row; a slice of no positions has none, folded or not.
  __host__ __device__ int length_of(const Feature& feat) const {
    return positions && (feat.channels_last || feat.folded()) ? feat.row_length : positions;
  }
};

struct Pair {
  Feature student, teacher;
  float* student_slopes;  // contiguous (B, *spatial), or null where not wanted
  float* teacher_slopes;
  Gradient grad;           // of the student, in the one-pass form
  double weight;           // over batch * positions
  double* partials;        // (B,) weighted squared distances
  int32_t batch;
  int32_t index;           // among all pairs of the call
  int32_t team_log2;       // 2^team_log2 blocks share a sample
  int32_t chunk;           // positions of each of them
  int32_t scratch, stage;  // where these begin in a block's shared memory, in bytes
  int32_t first_cluster;   // of the grid
};

struct LossTable {
  float* loss;             // () or (n_pairs,)
  const double* partials;  // of all pairs of the call
  unsigned* counter;       // 0 before the launch and after
  float p, eps;
  int32_t samples;         // of this launch
  int32_t all_samples;     // of the call, where this launch writes their sum; else -1
  int32_t pairs;
  int32_t cluster_log2;    // blocks come in clusters of 2^cluster_log2
  bool reduce;             // one loss, not one per pair
  Pair pair[max_pairs];
};

// A feature with its raw maps to write, or with its slopes to read and its gradient to write.
struct Item {
  Feature feat;
  float* map;  // contiguous (B, *spatial)
  int32_t batch;
  Gradient grad;
  int32_t slices;           // of each sample
  int32_t rows_per_slice;   // or positions, channels-last
  int32_t first_block;
};

struct ItemTable {
  const float* scale;       // null, one, or one per item
  int32_t scale_stride;     // 0 or 1
  int32_t items;
  int32_t blocks;           // of all items: those of the grid take them in turns
  int32_t* scale_was_one;   // host memory: a note for the next forward, or null
  bool grads_at_one;        // the gradients are there already, right where the one scale is 1
  float p;
  Item item[max_features];
};

static_assert(sizeof(LossTable) <= 4096 && sizeof(ItemTable) <= 4096, "kernel parameters take at most 4 KB");

// The kernels of one power.
struct Kernels {
  void (*loss)(LossTable);
  void (*loss_one_pass)(LossTable);
  void (*maps)(ItemTable);
  void (*backward)(ItemTable);
  void (*backward_added)(ItemTable);  // to each item's addend
  const void* counters;
};

extern const Kernels power1, power2, power4, power_any;

}  // namespace at_fused::cuda
