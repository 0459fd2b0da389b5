// Launches a kernel on a grid of clusters.
#pragma once

#include <atomic>
#include <map>
#include <utility>

#include "plan.h"

namespace at_fused::cuda {

// The launch of a grid as the runtime wants it.
struct Launch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  Launch(const Grid& grid, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    config.gridDim = dim3(grid.blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = grid.cluster > 1;
  }
  Launch(const Launch&) = delete;
};

template <class Table>
cudaError_t launch(void (*kernel)(Table), const Grid& grid, const Table& table, cudaStream_t stream) {
  if (grid.blocks == 0) return cudaSuccess;
  const Launch launch(grid, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, table);
}

// log2 of the largest cluster that can run here. Only code that was compiled for compute capability 9.0 knows
// clusters: what the driver makes of PTX for 8.0 runs there, too, and does not. A part of a GPU (MIG, MPS) may have
// room for none.
inline int largest_team(void (*kernel)(LossTable), const Device& device, int current) {
  int launches = 0;
  cudaFuncAttributes code{};
  int log2 = 0;
  if (cudaDeviceGetAttribute(&launches, cudaDevAttrClusterLaunch, current) == cudaSuccess && launches &&
      cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kernel)) == cudaSuccess &&
      std::min(code.binaryVersion, code.ptxVersion) >= 90) {
    static_assert(max_team == 1 << 3);
    for (log2 = 3; log2 > 0; --log2) {
      const int size = 1 << log2;
      const Launch launch({size, size, device.shared_per_block}, nullptr);
      int active = 0;
      if (cudaOccupancyMaxActiveClusters(&active, kernel, &launch.config) == cudaSuccess && active > 0) break;
    }
  }
  cudaGetLastError();  // no is an answer, too
  return log2;
}

// The current device, for which it readies `kernels`.
inline cudaError_t query(Device& device, const Kernels& kernels) {
  int current;
  cudaError_t error = cudaGetDevice(&current);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, current);
  };
  get(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(device.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(device.l2, cudaDevAttrL2CacheSize);
  for (auto* kernel : {kernels.loss, kernels.loss_one_pass}) {  // the others take less than anybody may
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device.shared_per_block);
  }
  void* counters = nullptr;
  if (error == cudaSuccess) error = cudaGetSymbolAddress(&counters, kernels.counters);
  device.counters = static_cast<unsigned*>(counters);
  if (error == cudaSuccess) device.max_team_log2 = largest_team(kernels.loss_one_pass, device, current);
  return error;
}

// The same, asked once per thread, device and power.
inline cudaError_t current_device(Device& device, const Kernels& kernels) {
  thread_local std::map<std::pair<int, const Kernels*>, Device> known;
  int current;
  if (const cudaError_t error = cudaGetDevice(&current); error != cudaSuccess) return error;
  const auto found = known.find({current, &kernels});
  if (found != known.end()) {
    device = found->second;
    return cudaSuccess;
  }
  const cudaError_t error = query(device, kernels);
  if (error == cudaSuccess) known[{current, &kernels}] = device;
  return error;
}

// A counter for the launches of this thread in `stream`, which follow one another: 0, and left at 0. Null where none
// is left, and while the stream is captured, as a graph may run beside the stream.
inline unsigned* counter_of(const Device& device, cudaStream_t stream) {
  static std::atomic<int> taken{0};
  thread_local std::map<std::pair<unsigned*, cudaStream_t>, unsigned*> known;
  cudaStreamCaptureStatus capture;
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess || capture != cudaStreamCaptureStatusNone) {
    cudaGetLastError();
    return nullptr;
  }
  const auto [entry, is_new] = known.try_emplace({device.counters, stream}, nullptr);
  if (is_new && taken < max_counters) {
    const int index = taken++;
    if (index < max_counters) entry->second = device.counters + index;
  }
  return entry->second;
}

inline const Kernels& kernels(double p) {
  if (p == 1) return power1;
  if (p == 2) return power2;
  if (p == 4) return power4;
  return power_any;
}

}  // namespace at_fused::cuda
