#if defined(__x86_64__)
#define AT_FUSED_ISA avx512
#define AT_FUSED_VECTOR_BYTES 64
#define AT_FUSED_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#include "kernels_impl.h"
#endif
