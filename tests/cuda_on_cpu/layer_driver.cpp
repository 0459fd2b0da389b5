// Runs every kernel of the layer's tests, with the fault named on the command line or none. What the sanitizers
// say is the test.
#include <cstdio>
#include <numeric>
#include <vector>

#include "layer_launch.h"

using layer::Fault;
using layer::launch;

int main(int count, char** arguments) {
  const Fault fault = layer::fault_named(count > 1 ? arguments[1] : "none");
  constexpr unsigned blocks = 4, threads = 64;
  std::vector<float> x(blocks * threads), y(x.size()), partials(blocks);
  std::iota(x.begin(), x.end(), 1.0f);
  const float expected = x.size() * (x.size() + 1) / 2;
  float total = 0;
  unsigned finished = 0;
  std::vector<__half> halves(x.size());

  for (simt::seed = 0; simt::seed < 3; ++simt::seed) {
    launch(layer::block_sum, {blocks, threads, 1, threads * sizeof(float)}, x.data(), y.data(), fault);
    launch(layer::last_block_sum, {blocks, threads}, x.data(), partials.data(), &finished, &total, fault);
    const float sum = std::accumulate(y.begin(), y.begin() + blocks, 0.0f);
    if (fault == Fault::none && (total != expected || sum != expected)) return std::puts("wrong sum"), 1;
    launch(layer::warp_scan, {blocks, threads}, x.data(), y.data(), fault);
    launch(layer::neighbour_sum, {blocks, threads}, x.data(), y.data(), fault);
    launch(layer::cluster_sum, {blocks, threads, 2, threads * sizeof(float)}, x.data(), y.data(), fault);
    const int quads = x.size() / 4 - (fault == Fault::misaligned);
    launch(layer::round_trip<__half>, {1, threads}, x.data(), y.data(), halves.data(), quads, fault);
  }
}
