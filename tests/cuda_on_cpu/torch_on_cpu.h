// Included before csrc/cuda/ops.cpp, so that its operators take CPU tensors for a CUDA device's.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::accelerator {
struct OnHost {
  explicit OnHost(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator

#define DeviceGuard OnHost
#define is_cuda is_cpu
