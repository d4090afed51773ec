// Transposition of a matrix.
#pragma once

#include <cstdint>

#include "core/gemm.h"

namespace mtml::MTML_ISA {

// dst[j * ld_dst + i] = scale * src[i * ld_src + j], i < rows, j < cols; zeros in columns rows..padded(rows) of dst
template <class T>
void transpose(int64_t rows, int64_t cols, const T* src, int64_t ld_src, T scale, T* dst, int64_t ld_dst) {
  const int64_t width = padded<T>(rows);
  for (int64_t j = 0; j < cols; ++j) {
    for (int64_t i = 0; i < rows; ++i) dst[j * ld_dst + i] = scale * src[i * ld_src + j];
    for (int64_t i = rows; i < width; ++i) dst[j * ld_dst + i] = 0;
  }
}

}  // namespace mtml::MTML_ISA
