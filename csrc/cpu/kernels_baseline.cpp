// SSE2 on x86-64, NEON on aarch64.
#define AT_FUSED_ISA baseline
#define AT_FUSED_VECTOR_BYTES 16
#include "kernels_impl.h"
