// The threads of a block: their shared memory, and sums over them that do not depend on chance.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// All shared memory of a kernel, as large as its launch asks for; at global scope, where one name has one type.
extern __shared__ __align__(16) unsigned char mtml_shared[];

namespace mtml::cuda {

constexpr int kWarp = 32;

template <class T>
__device__ __forceinline__ T* shared_memory() {
  return reinterpret_cast<T*>(mtml_shared);
}

// for every thread of the warp
__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The bytes of shared memory that block_sum needs.
constexpr int64_t block_sum_bytes(int threads) { return threads / kWarp * static_cast<int64_t>(sizeof(double)); }

// For every thread of the block, the same bits; `room` is block_sum_bytes of shared memory. All threads must call it.
__device__ __forceinline__ double block_sum(double value, double* room) {
  value = warp_sum(value);
  // whoever still reads the last sum
  __syncthreads();
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += room[warp];
  return total;
}

}  // namespace mtml::cuda
