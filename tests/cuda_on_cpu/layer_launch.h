// Launches of the layer's own tests.
#pragma once

#include "layer_kernels.cuh"

namespace layer {

inline Fault fault_named(const std::string& name) {
  static const std::map<std::string, Fault> faults{
      {"none", Fault::none},
      {"overrun", Fault::overrun},
      {"uninitialized", Fault::uninitialized},
      {"no_barrier", Fault::no_barrier},
      {"no_syncwarp", Fault::no_syncwarp},
      {"no_fence", Fault::no_fence},
      {"early_exit", Fault::early_exit},
      {"misaligned", Fault::misaligned},
      {"other_line", Fault::other_line},
      {"split_warp", Fault::split_warp},
      {"absent_lane", Fault::absent_lane},
  };
  return faults.at(name);
}

struct Shape {
  unsigned blocks, threads;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
};

template <class Kernel, class... Arguments>
void launch(Kernel kernel, const Shape& shape, const Arguments&... arguments) {
  cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension, {}};
  cluster.val.clusterDim = {shape.cluster, 1, 1};
  const cudaLaunchConfig_t config{shape.blocks, shape.threads, shape.shared_bytes, nullptr, &cluster, 1};
  if (cudaLaunchKernelEx(&config, kernel, arguments...) != cudaSuccess) throw simt::Error("invalid launch");
}

}  // namespace layer
