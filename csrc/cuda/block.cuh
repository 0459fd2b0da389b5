// Sums over a block and over the blocks that share a sample: always in the same order.
//
// Many GPUs do 64 fp32 operations in the time of one in fp64: sums are fp64 from a few lanes' partial sums on, and
// each lane adds one of them only.
#pragma once

#include <cooperative_groups.h>

#include "lanes.cuh"
#include "shared.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define AT_FUSED_CLUSTERS
#endif

namespace at_fused::cuda {

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// The two halves of a barrier for all blocks of the cluster. What a block writes in between, nobody waits for.
__device__ inline void arrive_at_cluster(int cluster) {
#ifdef AT_FUSED_CLUSTERS
  if (cluster > 1) cooperative_groups::this_cluster().barrier_arrive();
#endif
}

__device__ inline void wait_for_cluster(int cluster) {
#ifdef AT_FUSED_CLUSTERS
  if (cluster > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
}

// Adds value[0..N) over all threads of the block; every thread gets the sum of value[threadIdx.x % N].
template <int N, class T>
__device__ double sum_over_block(T (&value)[N], SumRoom<N>& room) {
  const int lane = threadIdx.x % 32, j = lane % N;
  double sum = sum_over_lanes<N>(static_cast<double>(sum_over_neighbours(value)), 32);
  if (lane < N) room.warp[threadIdx.x / 32][index_among_neighbours<N>()] = sum;
  __syncthreads();
  const int warp = lane / N;
  sum = warp < warps ? room.warp[warp][j] : 0;
#pragma unroll
  for (int more = 32 / N; more < warps; more += 32 / N) {
    if (warp + more < warps) sum += room.warp[warp + more][j];
  }
  return sum_over_lanes<N>(sum, 32);
}

// Adds over the `team` blocks of a cluster that begin at rank `first`.
template <int N, class T>
__device__ double sum_over_team(T (&value)[N], SumRoom<N>& room, int cluster, int first, int team) {
  static_assert(N * max_team <= 32);  // a lane reads one block's sum
  double sum = sum_over_block(value, room);
  if (cluster == 1) return sum;
#ifdef AT_FUSED_CLUSTERS
  if (threadIdx.x < N) room.block[threadIdx.x] = sum;
  const auto blocks = cooperative_groups::this_cluster();
  blocks.sync();
  const int member = threadIdx.x % 32 / N;
  sum = member < team ? *blocks.map_shared_rank(&room.block[threadIdx.x % N], first + member) : 0;
  return sum_over_lanes<N>(sum, N * team);
#else
  __trap();  // this code has no clusters: the host must not ask for them
#endif
}

}  // namespace at_fused::cuda
