// What the host layer adds to the operators of csrc/cuda/ops.cpp: a stream, and operators that set up the device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include "engine.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

namespace {

void seed(int64_t value) { simt::seed = value; }

void device(int64_t major, int64_t multiprocessors, int64_t shared_per_multiprocessor, int64_t l2) {
  simt::device.major = static_cast<int>(major);
  simt::device.multiprocessors = static_cast<int>(multiprocessors);
  simt::device.shared_per_multiprocessor = shared_per_multiprocessor;
  simt::device.l2 = static_cast<int>(l2);
}

int64_t last_cluster() { return simt::last_cluster; }

}  // namespace

STABLE_TORCH_LIBRARY(simt, library) {
  library.def("last_cluster() -> int");
  library.def("seed(int value) -> ()");
  library.def("device(int major, int multiprocessors, int shared_per_multiprocessor, int l2) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(simt, CompositeExplicitAutograd, library) {
  library.impl("last_cluster", TORCH_BOX(&last_cluster));
  library.impl("seed", TORCH_BOX(&seed));
  library.impl("device", TORCH_BOX(&device));
}
