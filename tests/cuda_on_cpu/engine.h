// Runs CUDA kernels on the CPU: every thread is a fibre, the fibres of a cluster take turns on one OS thread
// and change at barriers only, in the order of their indices or in a random one.
//
// What CUDA leaves undefined is an error: a barrier or shuffle that some threads miss, a shuffle from a lane
// that takes no part. AddressSanitizer sees each shared array as an allocation of its own, gone with its block.
// ThreadSanitizer sees each fibre as a thread, ordered by what orders CUDA threads: barriers, and atomics
// between fences, but not shuffles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "vector_types.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

// Bad launches and undefined behaviour.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a launch may use: by default what an H100 has.
struct Device {
  int major = 9, minor = 0;
  int multiprocessors = 132;
  size_t shared_per_multiprocessor = 228 << 10;
  size_t shared_per_block = 227 << 10;  // to kernels that ask for more than 48 KiB
  int l2 = 50 << 20;
  unsigned blocks_per_cluster = 8;
  bool cluster_launch = true;
  int ptx_version = 90, binary_version = 90;  // of the code that runs
  bool capturing = false;                     // any stream
  bool runs = true;                           // else launches do nothing: what is left is the host's part
  int ordinal = 0;                            // another one is another device

  bool has_clusters() const { return cluster_launch && ptx_version >= 90 && binary_version >= 90; }
};
extern Device device;

extern unsigned last_cluster;                     // blocks per cluster of the last launch
extern unsigned last_grid;                        // its blocks
extern std::map<std::string, int> calls;          // of functions of the runtime that are counted

// Of the order in which blocks, and threads between two barriers, run. 0: by index.
extern uint64_t seed;

// A call in a kernel.
struct Site {
  const char* file;
  int line;
  bool operator!=(const Site& other) const { return line != other.line || file != other.file; }
};

// Runs `thread` once per thread of the grid. Throws Error.
void run(dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes, const std::function<void()>& thread);

// What follows is called by threads.

[[noreturn]] void fail(const std::string& what);

// Shared memory starts as bytes 0xFF: NaN in every floating type.
void* dynamic_shared();
void* static_shared(const void* variable, size_t bytes);  // one array per block and `variable`
void* map_shared(const void* pointer, unsigned rank);     // the same array in another block of the cluster

// __shared__ T name[n]; is rewritten to auto& name = shared<T[n]>([] {}): each site has a lambda of its own.
template <class T, class Site>
T& shared(Site) {
  static const char variable = 0;
  return *static_cast<T*>(static_shared(&variable, sizeof(T)));
}

unsigned lane();
unsigned block_rank();   // in its cluster
unsigned cluster_size();  // in blocks

void sync_block(Site site);
void arrive_cluster(Site site);
void wait_cluster(Site site);
void sync_warp(uint32_t mask, Site site);

// The values of the lanes that took part in an exchange. They all wait for each other; memory is not ordered.
struct Lanes {
  uint32_t present;
  uint64_t values[32];
};
Lanes exchange(uint32_t mask, uint64_t value, Site site);

void fence();
void before_atomic(void* address);
void after_atomic(void* address);

}  // namespace simt
