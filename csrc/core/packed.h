// Large matrix products of one thread: a right operand packed into panels, and blocks that fit the caches.
//
//     pack, packed_product   rows times a matrix that is packed once and used often
//     outer_sum              the gradient of a weight that all tasks share: a sum over all their rows
#pragma once

#include <cstdint>

#include "core/gemm.h"
#include "core/transpose.h"

namespace mtml::MTML_ISA {

// terms of a block: a panel of so many rows, and what a tile reads beside it, stay in the first cache
constexpr int64_t kBlockTerms = 192;
// rows of a block: so many times kBlockTerms stay in the second cache
template <class T>
constexpr int64_t kBlockRows = 768 / sizeof(T);

// elements of a packed right operand [K, N]
template <class T>
int64_t packed_size(int64_t K, int64_t N) {
  return (N + kPanel<T> - 1) / kPanel<T> * kPanel<T> * K;
}

// `columns` <= kPanel columns of rows [0, rows) of src to a panel, with zeros beyond them. Reads rows x columns
// elements.
template <class T>
MTML_INLINE void copy_to_panel(int64_t rows, int64_t columns, const T* src, int64_t ld, T* panel) {
  constexpr int64_t L = kLanes<T>, P = kPanel<T>;
  if (columns == P) {
    for (int64_t k = 0; k < rows; ++k, src += ld, panel += P) {
      const Vector<T> low = load<Vector<T>>(src), high = load<Vector<T>>(src + L);
      store(panel, low);
      store(panel + L, high);
    }
    return;
  }
  for (int64_t k = 0; k < rows; ++k, src += ld, panel += P) {
    store(panel, columns >= L ? load<Vector<T>>(src) : Vector<T>{});
    store(panel + L, Vector<T>{});
    for (int64_t n = columns >= L ? L : 0; n < columns; ++n) panel[n] = src[n];
  }
}

// panels [panel_begin, panel_end) of the right operand with element (k, n) at src[k * row + n * col]; zeros beyond N
template <class T>
void pack(int64_t K, int64_t N, const T* src, int64_t row, int64_t col, T* dst, int64_t panel_begin,
          int64_t panel_end) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t columns = N - panel * P < P ? N - panel * P : P;
    const T* from = src + panel * P * col;
    T* to = dst + panel * K * P;
    if (col == 1) {
      copy_to_panel(K, columns, from, row, to);
    } else if (row == 1) {
      transpose(columns, K, from, col, T{1}, to, P);
      for (int64_t n = padded<T>(columns); n < P; ++n) {
        for (int64_t k = 0; k < K; ++k) to[k * P + n] = 0;
      }
    } else {
      for (int64_t k = 0; k < K; ++k) {
        for (int64_t n = 0; n < P; ++n) to[k * P + n] = n < columns ? from[k * row + n * col] : 0;
      }
    }
  }
}

// C [M, N] = row (or zero, where it is null) + A B, for A [M, K] by rows and B packed. Writes padded(N) columns.
template <class T>
void packed_product(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, const T* packed, const T* row, T* c,
                    int64_t ldc) {
  for (int64_t m = 0; m < M; m += kBlockRows<T>) {
    const int64_t rows = M - m < kBlockRows<T> ? M - m : kBlockRows<T>;
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

// Rows of C that share one copy of d. It lies in strips that are several tiles high: whole vectors, and the first tile
// of a strip brings it into the first cache for the others.
template <class T>
constexpr int64_t kStrip = 4 * tile_rows(2);
template <class T>
constexpr int64_t kOuterRows = 1024 / sizeof(T) / kStrip<T> * kStrip<T>;
// panels of h that are copied together: their rows are that much longer to read
constexpr int64_t kOuterPanels = 4;

// elements of outer_sum's scratch
template <class T>
constexpr int64_t outer_scratch() {
  return kBlockTerms * (kOuterRows<T> + kOuterPanels * kPanel<T>);
}

// The next `terms` rows of the segments, which may begin and end within a segment.
template <class T>
struct Rows {
  const Segment<T>* segment;
  int64_t row;

  // f(segment, its first row, how many, the number of terms before)
  template <class F>
  MTML_INLINE Rows for_each_run(int64_t terms, F f) const {
    Rows at = *this;
    for (int64_t before = 0; before < terms;) {
      const int64_t left = at.segment->rows - at.row, run = left < terms - before ? left : terms - before;
      f(*at.segment, at.row, run, before);
      before += run;
      at = run == left ? Rows{at.segment + 1, 0} : Rows{at.segment, at.row + run};
    }
    return at;
  }
};

// scale * d [terms, rows] to strips [rows / kStrip, kBlockTerms, kStrip]
template <class T>
void copy_to_strips(const Rows<T>& from, int64_t terms, int64_t first, int64_t rows, T* strips) {
  constexpr int64_t strip = kStrip<T>;
  from.for_each_run(terms, [&](const Segment<T>& segment, int64_t row, int64_t run, int64_t before) {
    const T* d = segment.d + row * segment.ldd + first;
    T* to = strips + before * strip;
    for (int64_t r = 0; r < run; ++r, d += segment.ldd, to += strip) {
      for (int64_t o = 0; o < rows; o += strip) {
        const int64_t height = rows - o < strip ? rows - o : strip;
        for_each<T>(height, [&](int64_t i, auto lane) {
          store(to + o * kBlockTerms + i, segment.scale * load<decltype(lane)>(d + o + i));
        });
      }
    }
  });
}

// h [terms, columns] to panels [columns / kPanel, kBlockTerms, kPanel]
template <class T>
void copy_to_panels(const Rows<T>& from, int64_t terms, int64_t first, int64_t columns, T* panels) {
  constexpr int64_t P = kPanel<T>;
  from.for_each_run(terms, [&](const Segment<T>& segment, int64_t row, int64_t run, int64_t before) {
    for (int64_t i = 0; i < columns; i += P) {
      const T* h = segment.h + row * segment.ldh + first + i;
      copy_to_panel(run, columns - i < P ? columns - i : P, h, segment.ldh, panels + i * kBlockTerms + before * P);
    }
  });
}

// C [rows, columns] = start + a b for columns <= kPanel, of which C has room for no more
template <class T>
void product_exact(int64_t rows, int64_t columns, T* c, int64_t ldc, Start start, const Product<T>& product_of_panel) {
  constexpr int64_t P = kPanel<T>;
  const T* no_row = nullptr;
  if (columns % kLanes<T> == 0) return product(rows, columns, c, ldc, start, no_row, product_of_panel);
  T edge[kStrip<T> * P];
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < P; ++n) edge[m * P + n] = start == kAdd && n < columns ? c[m * ldc + n] : 0;
  }
  product(rows, columns, edge, P, start, no_row, product_of_panel);
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) c[m * ldc + n] = edge[m * P + n];
  }
}

// C[o, i] (+)= sum_s sum_r scale_s d_s[r, o] h_s[r, i] for i_begin <= i < i_end, i_begin a multiple of kPanel. Writes
// exactly O rows of those columns.
template <class T>
void outer_sum(const Segment<T>* segments, int64_t count, int64_t O, int64_t I, T* c, int64_t ldc, bool add,
               int64_t i_begin, int64_t i_end, T* scratch) {
  constexpr int64_t P = kPanel<T>, strip = kStrip<T>, width = kOuterPanels * P;
  if (i_end > I) i_end = I;
  int64_t left = 0;
  for (int64_t s = 0; s < count; ++s) left += segments[s].rows;
  T* strips = scratch;
  T* panels = scratch + kBlockTerms * kOuterRows<T>;

  Rows<T> from = {segments, 0};
  Start start = add ? kAdd : kZero;
  do {
    const int64_t terms = left < kBlockTerms ? left : kBlockTerms;
    for (int64_t first = 0; first < O; first += kOuterRows<T>) {
      const int64_t rows = O - first < kOuterRows<T> ? O - first : kOuterRows<T>;
      copy_to_strips(from, terms, first, rows, strips);
      for (int64_t i = i_begin; i < i_end; i += width) {
        const int64_t columns = i_end - i < width ? i_end - i : width;
        copy_to_panels(from, terms, i, columns, panels);
        for (int64_t j = 0; j < columns; j += P) {
          for (int64_t o = 0; o < rows; o += strip) {
            const Product<T> p = {{strips + o * kBlockTerms, 1, strip}, {panels + j * kBlockTerms, P, P}, terms};
            product_exact(rows - o < strip ? rows - o : strip, columns - j < P ? columns - j : P,
                          c + (first + o) * ldc + i + j, ldc, start, p);
          }
        }
      }
    }
    from = from.for_each_run(terms, [](auto&&...) {});
    left -= terms;
    start = kAdd;
  } while (left > 0);
}

}  // namespace mtml::MTML_ISA
