#include "kernels.cuh"

const at_fused::cuda::Kernels at_fused::cuda::power1 = kernels_of<at_fused::cuda::Power1>();
