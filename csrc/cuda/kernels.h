// Entry points of the CUDA kernels; bindings.cpp, which g++ compiles, hands them to Python.
#pragma once

#include <cuda_runtime_api.h>

#include "gae.h"

namespace alignkit {

// Launches on `stream` of `device`; the arrays live there. Does not wait.
cudaError_t gae_on_device(const GaeArguments& args, int device, cudaStream_t stream);

}  // namespace alignkit
