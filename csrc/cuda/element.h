// The core's words on a GPU, where a thread holds one element: headers of core/ that need no more compile for both.
#pragma once

#include <cuda_runtime.h>

#define MTML_ISA cuda
#define MTML_INLINE __host__ __device__ __forceinline__
#define MTML_FUNCTION __host__ __device__

namespace mtml::cuda {

template <class V, class T>
MTML_INLINE V load(const T* from) {
  return *from;
}
template <class V, class T>
MTML_INLINE void store(T* to, V value) {
  *to = value;
}

}  // namespace mtml::cuda
