// The one way in which a kernel is started: on the caller's stream, with a grid that CUDA takes, its error returned.
// Nothing here or in a kernel waits for the device or reads what it has computed: every call can be captured in a
// graph.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

// a test may ask for fewer, so that blocks take more than one round
#ifndef MTML_MAX_BLOCKS
#define MTML_MAX_BLOCKS 2147483647
#endif
// and less shared memory, so that arrays lie elsewhere
#ifndef MTML_MAX_SHARED
#define MTML_MAX_SHARED 2147483647
#endif

namespace mtml::cuda {

template <class T>
struct Exactly {
  using type = T;
};

// An error, which CUDA forgets: otherwise whoever asks it next would report it again.
inline cudaError_t take(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// What a block of the current device may have of shared memory when it asks.
inline cudaError_t shared_memory_limit(int64_t* bytes) {
  int device, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = limit;
  return take(error);
}

// kernel(arguments...) on `blocks` blocks, or on as many as a grid may have: a kernel goes over its blocks in steps of
// gridDim.x.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                   cudaStream_t stream, const typename Exactly<Parameters>::type&... arguments) {
  // CUDA takes an empty grid for an error
  if (blocks == 0) return cudaSuccess;
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    // all that there is, and not what this launch needs: another thread may be about to launch the kernel with more
    int64_t limit;
    cudaError_t error = shared_memory_limit(&limit);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit));
    if (error != cudaSuccess) return take(error);
  }
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, MTML_MAX_BLOCKS)));
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return take(cudaLaunchKernel(kernel, grid, dim3(threads), pointers, shared_bytes, stream));
}

}  // namespace mtml::cuda
