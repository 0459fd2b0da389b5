// The layer's own tests for Python: NumPy arrays and the name of a fault in, NumPy arrays out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "layer_launch.h"

namespace py = pybind11;
using namespace pybind11::literals;
using Floats = py::array_t<float, py::array::c_style>;
using layer::fault_named;
using layer::launch;

namespace {

// x (blocks, threads) -> (blocks,)
Floats block_sum(const Floats& x, const std::string& fault) {
  const unsigned blocks = x.shape(0), threads = x.shape(1);
  Floats sums(blocks);
  const layer::Shape shape{blocks, threads, 1, threads * sizeof(float)};
  launch(layer::block_sum, shape, x.data(), sums.mutable_data(), fault_named(fault));
  return sums;
}

// x (blocks, threads) -> (blocks, threads)
template <void (*kernel)(const float*, float*, layer::Fault)>
Floats each_thread(const Floats& x, const std::string& fault) {
  const unsigned blocks = x.shape(0), threads = x.shape(1);
  Floats sums({blocks, threads});
  launch(kernel, {blocks, threads}, x.data(), sums.mutable_data(), fault_named(fault));
  return sums;
}

// x (blocks, threads) -> ()
float last_block_sum(const Floats& x, const std::string& fault) {
  const unsigned blocks = x.shape(0), threads = x.shape(1);
  std::vector<float> partials(blocks);
  unsigned finished = 0;
  float total = NAN;
  launch(layer::last_block_sum, {blocks, threads}, x.data(), partials.data(), &finished, &total,
         fault_named(fault));
  return total;
}

// x (clusters, blocks of a cluster, threads) -> (clusters, threads)
Floats cluster_sum(const Floats& x, const std::string& fault) {
  const unsigned clusters = x.shape(0), blocks = x.shape(1), threads = x.shape(2);
  Floats sums({clusters, threads});
  const layer::Shape shape{clusters * blocks, threads, blocks, threads * sizeof(float)};
  launch(layer::cluster_sum, shape, x.data(), sums.mutable_data(), fault_named(fault));
  return sums;
}

// x (quads, 4) -> its halves' bits and their values, both (quads, 4)
template <class Half>
py::tuple round_trip(const Floats& x) {
  const unsigned quads = x.shape(0);
  Floats y({quads, 4u});
  py::array_t<uint16_t> bits({quads, 4u});
  launch(layer::round_trip<Half>, {(quads + 63) / 64, 64}, x.data(), y.mutable_data(),
         reinterpret_cast<Half*>(bits.mutable_data()), int(quads), layer::Fault::none);
  return py::make_tuple(bits, y);
}

}  // namespace

PYBIND11_MODULE(simt_layer, module) {
  py::register_exception<simt::Error>(module, "Error", PyExc_RuntimeError);
  module.def("seed", [](uint64_t value) { simt::seed = value; });
  module.def("block_sum", block_sum, "x"_a, "fault"_a = "none");
  module.def("neighbour_sum", each_thread<layer::neighbour_sum>, "x"_a, "fault"_a = "none");
  module.def("warp_scan", each_thread<layer::warp_scan>, "x"_a, "fault"_a = "none");
  module.def("last_block_sum", last_block_sum, "x"_a, "fault"_a = "none");
  module.def("cluster_sum", cluster_sum, "x"_a, "fault"_a = "none");
  module.def("round_trip_bf16", round_trip<__nv_bfloat16>);
  module.def("round_trip_fp16", round_trip<__half>);
}
