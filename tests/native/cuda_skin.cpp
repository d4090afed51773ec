// A CUDA skin on a CPU: its operators registered for torch's CPU key, over kernels that cuda_shim runs. SKIN is the
// skin's file. What torch has of CUDA is given here: a device, and a stream that is not the default one.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

CUDA_SHIM_SHARED_MEMORY;

namespace {
shim::Stream current;
int guards = 0;
}  // namespace

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++guards;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return AOTI_TORCH_SUCCESS;
}
// of the device that is guarded, or of none
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = guards == 1 ? &current : nullptr;
  return guards == 1 ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

// for the tests: launches since the last time, and the error of the next launch
int64_t cuda_skin_launches() {
  const int64_t count = static_cast<int64_t>(current.launches.size());
  current.launches.clear();
  return count;
}
// the first layer of every mlp_adapt that can be is in Gram form
void cuda_skin_always_gram() { shim::gram_weights = -1; }
void cuda_skin_refuse_next() { shim::launches_until_error = 0; }
}

#define CUDA CPU
#define is_cuda is_cpu
#include SKIN
