// torch's tensors as the kernels take them: on one device, on its current stream, with workspace from torch's
// allocator.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <vector>

#include "check.h"

namespace mtml {
namespace {

// The device of a call, current while this lives.
class Device {
 public:
  // all tensors must lie where the first one does
  Device(const char* op, std::initializer_list<const std::vector<torch::stable::Tensor>*> lists)
      : index_((*lists.begin())->at(0).get_device_index()), guard_(index_) {
    for (const auto* list : lists) {
      for (const auto& x : *list) {
        MTML_CHECK(x.is_cuda() && x.get_device_index() == index_, op, ": all tensors must be on device cuda:", index_,
                   ", got one on ", x.is_cuda() ? message("cuda:", x.get_device_index()) : "another kind of device");
      }
    }
  }

  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// So many doubles beside `like`. They may be given back before the kernels that use them have run: torch's allocator
// hands memory on in the order of the stream.
inline torch::stable::Tensor workspace(const torch::stable::Tensor& like, int64_t doubles) {
  return torch::stable::new_empty(like, {doubles}, torch::headeronly::ScalarType::Double);
}

inline void check_launch(const char* op, int error) {
  if (error == cudaSuccess) return;
  const auto code = static_cast<cudaError_t>(error);
  throw std::runtime_error(message(op, ": CUDA refused a kernel: ", cudaGetErrorName(code), ", ",
                                   cudaGetErrorString(code), "; built for ", MTML_CUDA_ARCHITECTURES));
}

}  // namespace
}  // namespace mtml
