// Entry points of the CUDA kernels; bindings.cpp, which g++ compiles, hands them to Python.
#pragma once

#include <cuda_runtime_api.h>

#include "fusion.h"
#include "gae.h"
#include "grouped.h"

namespace alignkit {

// Each launches on `stream` of `device`; the arrays live there. None waits.
cudaError_t gae_on_device(const GaeArguments& args, int device, cudaStream_t stream);
cudaError_t dual_gae_on_device(const DualGaeArguments& args, int device, cudaStream_t stream);
cudaError_t grouped_on_device(const GroupedArguments& args, int device, cudaStream_t stream);
cudaError_t fusion_on_device(const FusionTokens& tokens, const FusionResults& results, int device,
                             cudaStream_t stream);
cudaError_t fusion_backward_on_device(const FusionTokens& tokens,
                                      const FusionGradients& gradients,
                                      const FusionWorkspace& workspace, int device,
                                      cudaStream_t stream);

}  // namespace alignkit
