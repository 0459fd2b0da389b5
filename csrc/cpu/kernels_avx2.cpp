#if defined(__x86_64__)
#define AT_FUSED_ISA avx2
#define AT_FUSED_VECTOR_BYTES 32
#define AT_FUSED_TARGET "avx2,fma"
#include "kernels_impl.h"
#endif
