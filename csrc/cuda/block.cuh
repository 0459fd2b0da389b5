// Sums over a block and over the blocks that share a sample: always in the same order.
#pragma once

#include <cooperative_groups.h>

#include "shared.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define AT_FUSED_CLUSTERS
#endif

namespace at_fused::cuda {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Waits for all blocks of the cluster: each of them must call it.
__device__ inline void sync_cluster(int cluster) {
#ifdef AT_FUSED_CLUSTERS
  if (cluster > 1) {
    cooperative_groups::this_cluster().sync();
    return;
  }
#endif
  __syncthreads();
}

// Adds `value` over all threads of the block; every thread gets the sums.
template <int N>
__device__ void sum_over_block(double (&value)[N], SumRoom<N>& room) {
  for (int j = 0; j < N; ++j) {
    for (int lane = 16; lane; lane /= 2) value[j] += __shfl_xor_sync(0xffffffffu, value[j], lane);
    if (threadIdx.x % 32 == 0) room.warp[threadIdx.x / 32][j] = value[j];
  }
  __syncthreads();
  for (int j = 0; j < N; ++j) {
    value[j] = 0;
    for (int warp = 0; warp < warps; ++warp) value[j] += room.warp[warp][j];
  }
}

// Adds over the `team` blocks of a cluster that begin at rank `first`.
template <int N>
__device__ void sum_over_team(double (&value)[N], SumRoom<N>& room, int cluster, int first, int team) {
  sum_over_block(value, room);
#ifdef AT_FUSED_CLUSTERS
  if (cluster == 1) return;
  for (int j = 0; j < N; ++j) {
    if (threadIdx.x == 0) room.block[j] = value[j];
  }
  sync_cluster(cluster);
  for (int j = 0; j < N; ++j) {
    value[j] = 0;
    for (int rank = first; rank < first + team; ++rank) {
      value[j] += *cooperative_groups::this_cluster().map_shared_rank(&room.block[j], rank);
    }
  }
#endif
}

}  // namespace at_fused::cuda
