// Launches a kernel on a grid of clusters.
#pragma once

#include <mutex>

#include "plan.h"

namespace at_fused::cuda {

template <class Table>
cudaError_t launch(void (*kernel)(Table), const Grid& grid, const Table& table, cudaStream_t stream) {
  if (grid.blocks == 0) return cudaSuccess;
  static std::mutex launching;  // the size is set for the kernel, not for the launch: no other may come between
  const std::lock_guard<std::mutex> alone(launching);
  if (grid.shared_bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1;
  return cudaLaunchKernelEx(&config, kernel, table);
}

// Attributes of the current device.
inline cudaError_t query(Device& device) {
  int current, major = 0;
  cudaError_t error = cudaGetDevice(&current);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, current);
  };
  get(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(device.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(device.l2, cudaDevAttrL2CacheSize);
  get(major, cudaDevAttrComputeCapabilityMajor);
  device.clusters = major >= 9;
  return error;
}

inline const Kernels& kernels(double p) {
  if (p == 1) return power1;
  if (p == 2) return power2;
  if (p == 4) return power4;
  return power_any;
}

}  // namespace at_fused::cuda
