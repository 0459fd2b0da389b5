// Blocks and clusters as cooperative groups.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct thread_block {
  static void sync(SIMT_SITE_PARAMETERS) { simt::sync_block(SIMT_SITE); }
  static unsigned thread_rank() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
  static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
};

struct cluster_group {
  static void barrier_arrive(SIMT_SITE_PARAMETERS) { simt::arrive_cluster(SIMT_SITE); }
  static void barrier_wait(SIMT_SITE_PARAMETERS) { simt::wait_cluster(SIMT_SITE); }
  static void sync(SIMT_SITE_PARAMETERS) {
    simt::arrive_cluster(SIMT_SITE);
    simt::wait_cluster(SIMT_SITE);
  }
  static unsigned block_rank() { return simt::block_rank(); }
  static unsigned num_blocks() { return simt::cluster_size(); }
  static unsigned thread_rank() { return block_rank() * thread_block::size() + thread_block::thread_rank(); }
  static unsigned num_threads() { return num_blocks() * thread_block::size(); }
  template <class T>
  static T* map_shared_rank(T* pointer, unsigned rank) {
    return static_cast<T*>(simt::map_shared(pointer, rank));
  }
};

inline thread_block this_thread_block() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
