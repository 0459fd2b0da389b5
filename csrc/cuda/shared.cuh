// What a loss block keeps in shared memory: the rooms of its sums, the slice's two maps, scratch, and in the
// one-pass form the student's slice.
#pragma once

#include "feature.cuh"

namespace at_fused::cuda {

constexpr int warps = threads / 32;

// Room for one sum of N doubles; each call needs its own.
template <int N>
struct SumRoom {
  double warp[warps][N];
  double block[N];
};

struct SumRooms {
  SumRoom<2> norms;
  SumRoom<4> distance;  // three, and a fourth that halves well
  SumRoom<1> loss;
  int last;
};

__host__ __device__ constexpr int aligned(int bytes) { return (bytes + 127) / 128 * 128; }

constexpr int maps_offset = aligned(sizeof(SumRooms));

// Floats that channels-first maps need between groups of threads.
inline int scratch_floats(const Feature& feat) {
  return feat.channels_last ? 0 : divide_up(feat.tiling.groups, 2) * feat.tiling.width * feat.vector_width();
}

// Of a block.
inline int64_t shared_bytes(const Pair& pair, bool one_pass) {
  const Feature& student = pair.student;
  const int64_t vectors = int64_t{student.tiling.lanes()} * student.tiling.passes * student.tiling.steps;
  return pair.stage + (one_pass ? vectors * student.vector_width() * size_of(student.dtype) : 0);
}

}  // namespace at_fused::cuda
