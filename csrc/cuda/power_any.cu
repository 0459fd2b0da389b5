#include "kernels.cuh"

const at_fused::cuda::Kernels at_fused::cuda::power_any = kernels_of<at_fused::cuda::PowerAny>();
