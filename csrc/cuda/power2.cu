#include "kernels.cuh"

const at_fused::cuda::Kernels at_fused::cuda::power2 = kernels_of<at_fused::cuda::Power2>();
