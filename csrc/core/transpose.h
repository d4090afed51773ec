// Transposition of a matrix, in blocks of as many rows and columns as a vector has lanes.
#pragma once

#include <cstdint>

#include "core/lanes.h"

namespace mtml::MTML_ISA {

// the L columns from src on, of `rows` <= L rows: L rows of whole vectors from dst on, with zeros beyond `rows`
template <class T>
MTML_INLINE void transpose_block(int64_t rows, const T* src, int64_t ld_src, T scale, T* dst, int64_t ld_dst) {
  constexpr int L = kLanes<T>;
  Vector<T> block[L];
  if (rows >= L) {
    unroll<L>([&](auto r) { block[r] = scale * load<Vector<T>>(src + r * ld_src); });
  } else {
    unroll<L>([&](auto r) { block[r] = r < rows ? scale * load<Vector<T>>(src + r * ld_src) : Vector<T>{}; });
  }
  transpose_lanes<T>(block);
  unroll<L>([&](auto r) { store(dst + r * ld_dst, block[r]); });
}

// dst[j * ld_dst + i] = scale * src[i * ld_src + j], i < rows, j < cols; zeros in columns rows..padded(rows) of dst.
// Reads rows x cols elements.
template <class T>
void transpose(int64_t rows, int64_t cols, const T* src, int64_t ld_src, T scale, T* dst, int64_t ld_dst) {
  constexpr int64_t L = kLanes<T>;
  if (cols < L) {
    const int64_t width = padded<T>(rows);
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t i = 0; i < rows; ++i) dst[j * ld_dst + i] = scale * src[i * ld_src + j];
      for (int64_t i = rows; i < width; ++i) dst[j * ld_dst + i] = 0;
    }
    return;
  }
  for (int64_t j = 0; j < cols; j += L) {
    // the last columns together with some that are done already
    const int64_t first = j + L <= cols ? j : cols - L;
    for (int64_t i = 0; i < rows; i += L) {
      transpose_block(rows - i, src + i * ld_src + first, ld_src, scale, dst + first * ld_dst + i, ld_dst);
    }
  }
}

}  // namespace mtml::MTML_ISA
