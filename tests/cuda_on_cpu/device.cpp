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

// Puts another device in the place of the last one.
void device(int64_t multiprocessors, int64_t shared_per_multiprocessor, int64_t l2, bool cluster_launch,
            int64_t blocks_per_cluster, int64_t ptx_version, int64_t binary_version, bool capturing, bool runs) {
  simt::Device device;
  device.ordinal = simt::device.ordinal + 1;
  device.multiprocessors = static_cast<int>(multiprocessors);
  device.shared_per_multiprocessor = shared_per_multiprocessor;
  device.l2 = static_cast<int>(l2);
  device.cluster_launch = cluster_launch;
  device.blocks_per_cluster = static_cast<unsigned>(blocks_per_cluster);
  device.ptx_version = static_cast<int>(ptx_version);
  device.binary_version = static_cast<int>(binary_version);
  device.capturing = capturing;
  device.runs = runs;
  simt::device = device;
}

int64_t last_cluster() { return simt::last_cluster; }

int64_t last_grid() { return simt::last_grid; }

int64_t calls(std::string function) { return simt::calls[function]; }

}  // namespace

STABLE_TORCH_LIBRARY(simt, library) {
  library.def("last_cluster() -> int");
  library.def("last_grid() -> int");
  library.def("calls(str function) -> int");
  library.def("seed(int value) -> ()");
  library.def(
      "device(int multiprocessors, int shared_per_multiprocessor, int l2, bool cluster_launch, int blocks_per_cluster, "
      "int ptx_version, int binary_version, bool capturing, bool runs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(simt, CompositeExplicitAutograd, library) {
  library.impl("last_cluster", TORCH_BOX(&last_cluster));
  library.impl("last_grid", TORCH_BOX(&last_grid));
  library.impl("calls", TORCH_BOX(&calls));
  library.impl("seed", TORCH_BOX(&seed));
  library.impl("device", TORCH_BOX(&device));
}
