#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace at_fused {

static const Kernels& choose() {
  const char* variable = std::getenv("AT_FUSED_ISA");
  const auto requests = [&](const char* name) { return variable && std::strcmp(variable, name) == 0; };
  if (requests("baseline")) return baseline::table;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!requests("avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::table;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::table;
#endif
  return baseline::table;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace at_fused
