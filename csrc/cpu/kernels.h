// The kernels of one sample, built once per instruction set and chosen when the library is loaded.
#pragma once

#include "feature.h"

namespace at_fused {

// Maps and their gradients are fp32, or fp64 for fp64 features.
struct Kernels {
  const char* name;

  // Raw map of one sample: `map` has positions() elements.
  void (*map)(const Feature& feat, int64_t sample, Mapping mapping, void* map);

  // dA = scale * slope * p * |A|^(p-1) * sign(A), plus the addend of `grad` if it has one, written to `grad` (same
  // shape, own strides). `scratch` has 2 * positions() elements of the map's type.
  void (*map_backward)(const Feature& feat, const Feature& grad, int64_t sample, Mapping mapping,
                       const void* slope, double scale, void* scratch);

  // Squared distance between two l2-normalised raw maps, summed over `positions`. Where `weight` times the
  // distance's gradient at a raw map is wanted, it replaces that map.
  double (*distance)(void* student, void* teacher, int64_t positions, bool is_double, double eps, double weight,
                     bool student_slope, bool teacher_slope);
};

// The best kernels that this processor runs; AT_FUSED_ISA=baseline or avx2 lowers the choice.
const Kernels& kernels();

namespace baseline {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

}  // namespace at_fused
