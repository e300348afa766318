#pragma once

#include <cuda_runtime_api.h>

namespace alignkit {

// Makes a device current, and the caller's again when it goes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : status_(cudaGetDevice(&before_)) {
    if (status_ == cudaSuccess) status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int before_ = 0;
  cudaError_t status_;
};

}  // namespace alignkit
