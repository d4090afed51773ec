// What the CUDA library was built from, as JSON, like csrc/build_info.cpp for the CPU.
#include <cuda_runtime.h>

#include <string>

extern "C" __attribute__((visibility("default"))) const char* mtml_fast_cuda_build_info() {
  static const std::string info =
      "{\"version\": \"" MTML_FAST_VERSION "\", \"cuda\": \"" + std::to_string(CUDART_VERSION / 1000) + "." +
      std::to_string(CUDART_VERSION % 1000 / 10) + "\", \"architectures\": \"" + MTML_CUDA_ARCHITECTURES "\"}";
  return info.c_str();
}
