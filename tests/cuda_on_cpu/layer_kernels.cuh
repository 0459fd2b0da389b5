// Kernels that use every part of the layer, most of them with a fault that it must find.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace layer {

enum class Fault {
  none,
  overrun,        // reads one element past shared memory
  uninitialized,  // reads shared memory that nothing was written to
  no_barrier,     // reads what other threads write without waiting for them
  no_syncwarp,    // the same within a warp, where a shuffle is no barrier to memory
  no_fence,       // the last block reads the others' results without a fence
  early_exit,     // a block returns while others of its cluster read its shared memory
  misaligned,     // a vector load off its alignment
  other_line,     // threads of a block wait in two different __syncthreads
  split_warp,     // half a warp waits in __syncthreads, the other half in a shuffle
  absent_lane,    // a shuffle from a lane that takes no part
};

// sums[block] = sum of x[block]'s blockDim.x values, as a tree in dynamic shared memory.
__global__ void block_sum(const float* x, float* sums, Fault fault) {
  extern __shared__ float values[];
  const int i = threadIdx.x, count = blockDim.x;
  if (fault != Fault::uninitialized || i > 0) values[i] = x[blockIdx.x * count + i];
  for (int half = count / 2; half > 0; half /= 2) {
    if (fault != Fault::no_barrier) __syncthreads();
    if (fault == Fault::other_line && i == 3) __syncthreads();
    if (i < half) values[i] += values[i + half + (fault == Fault::overrun && i == count / 2 - 1)];
  }
  if (i == 0) sums[blockIdx.x] = values[0];
}

// Inclusive sums along each warp.
__global__ void warp_scan(const float* x, float* sums, Fault fault) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % warpSize;
  float sum = x[i];
  if (fault == Fault::split_warp && lane < 16) __syncthreads();
  if (fault == Fault::absent_lane && lane == 5) return;
  for (int delta = 1; delta < warpSize; delta *= 2) {
    const float before = __shfl_up_sync(0xffffffff, sum, delta);
    if (lane >= delta) sum += before;
  }
  sums[i] = sum;
}

// sums[i] = x[i] + x[i ^ 1]: twice the neighbour's value by shuffle, less once by way of shared memory.
__global__ void neighbour_sum(const float* x, float* sums, Fault fault) {
  __shared__ float values[1024];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  values[threadIdx.x] = x[i];
  const float twice = __shfl_xor_sync(0xffffffff, 2 * x[i], 1);
  if (fault != Fault::no_syncwarp) __syncwarp();
  sums[i] = x[i] + twice - values[threadIdx.x ^ 1];
}

// total = sum of blocks x blockDim.x values; the last block to finish adds the blocks' sums in their order.
__global__ void last_block_sum(const float* x, float* partials, unsigned* finished, float* total, Fault fault) {
  __shared__ float warps[32];
  __shared__ bool last;
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffff, sum, bits);
  if (lane == 0) warps[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (unsigned i = 0; i < blockDim.x / warpSize; ++i) sum += warps[i];
    partials[blockIdx.x] = sum;
    if (fault != Fault::no_fence) __threadfence();
    last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
    if (fault != Fault::no_fence) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x > 0) return;
  sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partials[i];
  *total = sum;
}

// sums[i] = sum over a cluster's blocks of x[block, i]; every block adds its share of i from the others' memory.
__global__ void cluster_sum(const float* x, float* sums, Fault fault) {
  extern __shared__ float own[];
  const auto cluster = cooperative_groups::this_cluster();
  const int count = blockDim.x, blocks = cluster.num_blocks(), rank = cluster.block_rank();
  own[threadIdx.x] = x[blockIdx.x * count + threadIdx.x];
  cluster.sync();
  if (int(threadIdx.x) % blocks == rank) {
    float sum = 0;
    for (int i = 0; i < blocks; ++i) sum += cluster.map_shared_rank(own, i)[threadIdx.x];
    sums[blockIdx.x / blocks * count + threadIdx.x] = sum;
  }
  if (fault != Fault::early_exit) cluster.sync();
}

// y = float(halves = Half(x)), four at a time.
template <class Half>
__global__ void round_trip(const float* x, float* y, Half* halves, int quads, Fault fault) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= quads) return;
  const float4 in = *reinterpret_cast<const float4*>(x + 4 * i + (fault == Fault::misaligned));
  const Half out[4] = {Half(in.x), Half(in.y), Half(in.z), Half(in.w)};
  for (int j = 0; j < 4; ++j) halves[4 * i + j] = out[j];
  reinterpret_cast<float4*>(y)[i] = {float(out[0]), float(out[1]), float(out[2]), float(out[3])};
}

}  // namespace layer
