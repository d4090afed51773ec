// Large matrix products of one thread: a right operand packed into panels, and blocks that fit the caches.
//
//     pack, packed_product   rows times a matrix that is packed once and used often
//     outer_sum              the gradient of a weight that all tasks share: a sum over all their rows
#pragma once

#include <cstdint>

#include "core/gemm.h"

namespace mtml::MTML_ISA {

// terms of a block: a panel of so many rows takes half of the first cache
constexpr int64_t kBlockTerms = 256;
// rows of a block: so many times kBlockTerms stay in the second cache
constexpr int64_t kBlockRows = 192;

// elements of a packed right operand [K, N]
template <class T>
int64_t packed_size(int64_t K, int64_t N) {
  return (N + kPanel<T> - 1) / kPanel<T> * kPanel<T> * K;
}

// panels [panel_begin, panel_end) of the right operand with element (k, n) at src[k * row + n * col]; zeros beyond N
template <class T>
void pack(int64_t K, int64_t N, const T* src, int64_t row, int64_t col, T* dst, int64_t panel_begin,
          int64_t panel_end) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t first = panel * kPanel<T>, columns = N - first < kPanel<T> ? N - first : kPanel<T>;
    T* to = dst + panel * K * kPanel<T>;
    for (int64_t k = 0; k < K; ++k, to += kPanel<T>) {
      for (int64_t n = 0; n < columns; ++n) to[n] = src[k * row + (first + n) * col];
      for (int64_t n = columns; n < kPanel<T>; ++n) to[n] = 0;
    }
  }
}

// C [M, N] = row (or zero, where it is null) + A B, for A [M, K] by rows and B packed. Writes padded(N) columns.
template <class T>
void packed_product(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, const T* packed, const T* row, T* c,
                    int64_t ldc) {
  for (int64_t m = 0; m < M; m += kBlockRows) {
    const int64_t rows = M - m < kBlockRows ? M - m : kBlockRows;
    int64_t k = 0;
    do {
      const int64_t terms = K - k < kBlockTerms ? K - k : kBlockTerms;
      const Start start = k > 0 ? kAdd : row ? kRow : kZero;
      const Right<T> right = {packed + k * kPanel<T>, kPanel<T>, K * kPanel<T>};
      const RowBlock<T> block = {rows, {a + m * lda + k, lda, 1}, c + m * ldc, row};
      product_blocks(&block, 1, N, terms, right, ldc, start);
      k += kBlockTerms;
    } while (k < K);
  }
}

// rows of one task: d [rows, O], h [rows, I]; scale multiplies d
template <class T>
struct Segment {
  int64_t rows;
  const T* d;
  int64_t ldd;
  const T* h;
  int64_t ldh;
  T scale;
};

// rows of C that share one copy of d
constexpr int64_t kOuterRows = 256;
// d is copied in strips that are several tiles high: whole vectors, and the tiles of a strip find it in the first cache
template <class T>
constexpr int64_t kStrip = 4 * tile_rows(2);

// elements of outer_sum's scratch
template <class T>
constexpr int64_t outer_scratch() {
  return kBlockTerms * ((kOuterRows + kStrip<T> - 1) / kStrip<T> * kStrip<T> + kPanel<T>);
}

// A row of the segments, counted over all of them.
template <class T>
struct SegmentRow {
  const Segment<T>* segment;
  int64_t row;

  MTML_INLINE void skip_empty(const Segment<T>* end) {
    while (segment < end && row >= segment->rows) {
      ++segment;
      row = 0;
    }
  }
};

// C[o, i] (+)= sum_s sum_r scale_s d_s[r, o] h_s[r, i] for i_begin <= i < i_end, i_begin a multiple of kPanel. Writes
// exactly O rows of those columns.
template <class T>
void outer_sum(const Segment<T>* segments, int64_t count, int64_t O, int64_t I, T* c, int64_t ldc, bool add,
               int64_t i_begin, int64_t i_end, T* scratch) {
  constexpr int64_t P = kPanel<T>, strip = kStrip<T>;
  if (i_end > I) i_end = I;
  const Segment<T>* end = segments + count;
  T* panel = scratch;
  T* strips = scratch + kBlockTerms * P;

  SegmentRow<T> at = {segments, 0};
  at.skip_empty(end);
  bool more = add;
  do {
    SegmentRow<T> next = at;
    int64_t terms = 0;
    for (int64_t first = 0; first < O; first += kOuterRows) {
      const int64_t rows = O - first < kOuterRows ? O - first : kOuterRows;

      // d of the block, [rows / strip, terms, strip]
      next = at;
      for (terms = 0; terms < kBlockTerms && next.segment < end; ++terms) {
        const Segment<T>& segment = *next.segment;
        const T* d = segment.d + next.row * segment.ldd + first;
        for (int64_t o = 0; o < rows; ++o) {
          strips[(o / strip * kBlockTerms + terms) * strip + o % strip] = segment.scale * d[o];
        }
        ++next.row;
        next.skip_empty(end);
      }

      for (int64_t i = i_begin; i < i_end; i += P) {
        const int64_t columns = i_end - i < P ? i_end - i : P;
        SegmentRow<T> from = at;
        for (int64_t k = 0; k < terms; ++k) {
          const T* h = from.segment->h + from.row * from.segment->ldh + i;
          for (int64_t n = 0; n < columns; ++n) panel[k * P + n] = h[n];
          for (int64_t n = columns; n < P; ++n) panel[k * P + n] = 0;
          ++from.row;
          from.skip_empty(end);
        }
        for (int64_t o = 0; o < rows; o += strip) {
          const int64_t height = rows - o < strip ? rows - o : strip;
          T* to = c + (first + o) * ldc + i;
          const Product<T> one = {{strips + o * kBlockTerms, 1, strip}, {panel, P, P}, terms};
          const Start start = more ? kAdd : kZero;
          if (columns % kLanes<T> == 0) {
            product(height, columns, to, ldc, start, static_cast<const T*>(nullptr), one);
            continue;
          }
          // c has no room for whole vectors
          T edge[strip * P];
          if (more) {
            for (int64_t m = 0; m < height; ++m) {
              for (int64_t n = 0; n < P; ++n) edge[m * P + n] = n < columns ? to[m * ldc + n] : 0;
            }
          }
          product(height, columns, edge, P, start, static_cast<const T*>(nullptr), one);
          for (int64_t m = 0; m < height; ++m) {
            for (int64_t n = 0; n < columns; ++n) to[m * ldc + n] = edge[m * P + n];
          }
        }
      }
    }
    at = next;
    more = true;
  } while (at.segment < end && O > 0);
}

}  // namespace mtml::MTML_ISA
