// Matrix products of one thread, for operands that fit the second cache; core/packed.h has the large ones.
//
//     product          C = start + A1 B1 (+ A2 B2)
//     product_blocks   the row blocks of several tasks times one right operand
//     dots             C = A B^T, along contiguous rows
//
// An element of product's C is a sum over k in order, by chains of fused multiply-adds that go into a total; what it
// starts from is added last, as many small terms added to one large element would each be rounded to it. So its bits
// depend neither on the other rows and columns nor on the tile that it falls into; on the number of columns only in
// that a narrow C has shorter chains. An element of dots depends on K alone.
#pragma once

#include <cstdint>

#include "core/lanes.h"

namespace mtml::MTML_ISA {

// columns that a tile works on, and that lie together in a packed right operand
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;

// element (m, k) at data[m * row + k * col]
template <class T>
struct Left {
  const T* data;
  int64_t row, col;
};

// element (k, n) at data[n / kPanel * panel + k * ld + n % kPanel]: a matrix by rows is {data, ld, kPanel}, packed
// panels are {data, kPanel, K * kPanel}. Columns are readable up to padded(N).
template <class T>
struct Right {
  const T* data;
  int64_t ld, panel;
};

// a b, over k terms
template <class T>
struct Product {
  Left<T> a;
  Right<T> b;
  int64_t k;
};

// what the sum for an element of C is added to: 0, the element of one row that serves all rows, itself (kAdd), or the
// element of a matrix of C's shape and ldc, to which `row` points then
enum Start { kZero, kRow, kAdd, kMatrix };

// rows of one task: their left operand, C, and the row to start from
template <class T>
struct RowBlock {
  int64_t rows;
  Left<T> a;
  T* c;
  const T* row;
};

// C [M, N] and the one or two products that it sums
template <class T>
struct Output {
  T* c;
  int64_t ldc;
  Start start;
  const T* row;
  const Product<T>* products;
  int num_products;
  int64_t chain;  // terms of a chain
};

// Terms of a chain: a sum's error grows with the root of the length of its chains. Where a library has many columns to
// compute, its chains are no shorter than 64; few columns are dot products to it, with many partial sums, and cost
// little enough to be as exact.
constexpr int64_t kChain = 64, kNarrowChain = 8;
template <class T>
MTML_INLINE int64_t chain_of(int64_t N) {
  return N <= kLanes<T> ? kNarrowChain : kChain;
}

#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = MTML_VECTOR_BYTES == 64 ? 32 : 16;
#endif

// rows of the tallest tile that is `vectors` wide. Twelve sums hide the latency of two units, and leave registers for
// the operands.
constexpr int tile_rows(int vectors) {
  switch (vectors) {
    case 1:
      return 12;
    case 2:
      return kRegisters == 32 ? 12 : 6;
    case 3:
      return kRegisters == 32 ? 9 : 4;
    default:
      return vectors == 4 ? 3 : 1;
  }
}

// The compiler forgets what it knows of a value: addresses that it would compute ahead of a loop, for use behind it,
// fill the registers.
template <class P>
MTML_INLINE void forget(P& value) {
  asm("" : "+r"(value));
}

// R rows from m on and V vectors of columns from `panel` on
template <class T, int R, int V>
void tile(const Output<T>& to, int64_t m, int64_t panel) {
  using Lanes = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  const int64_t ldc = to.ldc, chain = to.chain;
  T* c = to.c + m * ldc + panel * kPanel<T>;

  Lanes sums[R * V];
  unroll<R * V>([&](auto i) { sums[i] = Lanes{}; });
  // of the chains before, if any
  Lanes totals[R * V];
  bool has_totals = false;

  const Product<T>* product = to.products;
  const Product<T>* const last = product + (to.num_products - 1);
  do {
    const int64_t row = product->a.row, col = product->a.col, ld = product->b.ld, next_panel = product->b.panel;
    const T* b = product->b.data + panel * next_panel;
    // every fourth row has a pointer: the three after it are one and two times `row`, or three times, away
    constexpr int kPointers = (R + 3) / 4;
    const T* a[kPointers];
    unroll<kPointers>([&](auto g) { a[g] = product->a.data + (m + 4 * g) * row; });
    for (int64_t terms = product->k;;) {
      int64_t k = terms < chain ? terms : chain;
      terms -= k;
      for (; k > 0; --k) {
        Lanes right[V];
        unroll<V>([&](auto v) { right[v] = load<Lanes>(b + v / 2 * next_panel + v % 2 * L); });
        unroll<R>([&](auto r) {
          const T left = a[r / 4][r % 4 * row];
          unroll<V>([&](auto v) { sums[r * V + v] += left * right[v]; });
        });
        unroll<kPointers>([&](auto g) {
          a[g] += col;
          forget(a[g]);
        });
        b += ld;
      }
      if (terms == 0) break;
      unroll<R * V>([&](auto i) {
        totals[i] = has_totals ? totals[i] + sums[i] : sums[i];
        sums[i] = Lanes{};
      });
      has_totals = true;
    }
  } while (product++ != last);
  if (has_totals) unroll<R * V>([&](auto i) { sums[i] += totals[i]; });
  if (to.start == kRow) {
    const T* row = to.row + panel * kPanel<T>;
    unroll<V>([&](auto v) {
      const Lanes value = load<Lanes>(row + v * L);
      unroll<R>([&](auto r) { sums[r * V + v] += value; });
    });
  }

  forget(c);
  if (to.start == kAdd || to.start == kMatrix) {
    const T* from = to.start == kAdd ? c : to.row + m * ldc + panel * kPanel<T>;
    unroll<R>([&](auto r) {
      unroll<V>([&](auto v) { store(c + v * L, load<Lanes>(from + v * L) + sums[r * V + v]); });
      c += ldc;
      from += ldc;
    });
    return;
  }
  unroll<R>([&](auto r) {
    unroll<V>([&](auto v) { store(c + v * L, sums[r * V + v]); });
    c += ldc;
  });
}

template <class T>
using Tile = void (*)(const Output<T>&, int64_t m, int64_t panel);

// the tile of R rows, or the tallest
template <class T, int R, int V>
constexpr Tile<T> kTile = tile<T, (R < tile_rows(V) ? R : tile_rows(V)), V>;

// by rows
template <class T, int V>
constexpr Tile<T> kTiles[] = {nullptr,         kTile<T, 1, V>,  kTile<T, 2, V>, kTile<T, 3, V>, kTile<T, 4, V>,
                              kTile<T, 5, V>,  kTile<T, 6, V>,  kTile<T, 7, V>, kTile<T, 8, V>, kTile<T, 9, V>,
                              kTile<T, 10, V>, kTile<T, 11, V>, kTile<T, 12, V>};

// M rows as `high` tiles of `rows` rows and `low` tiles of one row less: heights that differ by one waste least
struct RowTiles {
  int64_t rows, high, low;
};
template <int R>
MTML_INLINE RowTiles row_tiles(int64_t M) {
  const int64_t tiles = (M + R - 1) / R;
  int64_t rows = R, missing = tiles * R - M;
  while (missing >= tiles && missing > 0) {
    --rows;
    missing -= tiles;
  }
  return {rows, tiles - missing, missing};
}

// V vectors of columns from `panel` on, all M rows
template <int V, class T>
MTML_INLINE void columns(const Output<T>& to, int64_t M, int64_t panel) {
  const RowTiles tiles = row_tiles<tile_rows(V)>(M);
  int64_t m = 0;
  const Tile<T> high = kTiles<T, V>[tiles.rows];
  for (int64_t i = 0; i < tiles.high; ++i, m += tiles.rows) high(to, m, panel);
  if (tiles.low == 0) return;
  const Tile<T> low = kTiles<T, V>[tiles.rows - 1];
  for (int64_t i = 0; i < tiles.low; ++i, m += tiles.rows - 1) low(to, m, panel);
}

// Few terms and many columns: the writing of C takes the time, so that whole rows are written one after the other.
template <class T>
MTML_INLINE bool is_wide(const Output<T>& to, int64_t vectors) {
  int64_t terms = 0;
  for (int i = 0; i < to.num_products; ++i) terms += to.products[i].k;
  return terms <= 16 && vectors >= 16;
}

template <class T>
void wide_rows(const Output<T>& to, int64_t M, int64_t panels) {
  const RowTiles tiles = row_tiles<tile_rows(2)>(M);
  int64_t m = 0;
  for (int64_t i = 0; i < tiles.high + tiles.low; ++i) {
    const int64_t rows = i < tiles.high ? tiles.rows : tiles.rows - 1;
    for (int64_t panel = 0; panel < panels; ++panel) kTiles<T, 2>[rows](to, m, panel);
    m += rows;
  }
}

template <class T>
MTML_INLINE void all_columns(const Output<T>& to, int64_t M, int64_t N) {
  if (M <= 0) return;
  int64_t vectors = padded<T>(N) / kLanes<T>, panel = 0;
  // few rows: several panels at a time, so that there are enough sums to hide the latency
  if (M == 1) {
    for (; vectors >= 8; vectors -= 8, panel += 4) tile<T, 1, 8>(to, 0, panel);
  }
  if (M <= tile_rows(4)) {
    for (; vectors >= 4; vectors -= 4, panel += 2) kTiles<T, 4>[M](to, 0, panel);
  }
  if (panel == 0 && is_wide(to, vectors)) {
    panel = vectors / 2;
    wide_rows(to, M, panel);
    vectors -= 2 * panel;
  }
  // the last three at once: one alone would wait for its left operand
  for (; vectors == 2 || vectors > 3; vectors -= 2, ++panel) columns<2>(to, M, panel);
  if (vectors == 3) columns<3>(to, M, panel);
  if (vectors == 1) columns<1>(to, M, panel);
}

// C [M, N] = start + p1. Writes padded(N) columns, ldc >= padded(N). C may not overlap the operands.
template <class T>
void product(int64_t M, int64_t N, T* c, int64_t ldc, Start start, const T* row, const Product<T>& p1) {
  all_columns<T>({c, ldc, start, row, &p1, 1, chain_of<T>(N)}, M, N);
}

// C [M, N] = start + p1 + p2
template <class T>
void product(int64_t M, int64_t N, T* c, int64_t ldc, Start start, const T* row, const Product<T>& p1,
             const Product<T>& p2) {
  const Product<T> both[] = {p1, p2};
  all_columns<T>({c, ldc, start, row, both, 2, chain_of<T>(N)}, M, N);
}

// c [rows, N] = start + a b for every block. Panels outside, blocks inside: a panel of b is read from the second cache
// once and serves all blocks from the first.
template <class T>
void product_blocks(const RowBlock<T>* blocks, int64_t count, int64_t N, int64_t K, const Right<T>& b, int64_t ldc,
                    Start start) {
  const int64_t vectors = padded<T>(N) / kLanes<T>;
  for (int64_t v = 0, panel = 0; v < vectors; v += 2, ++panel) {
    for (int64_t i = 0; i < count; ++i) {
      const RowBlock<T>& block = blocks[i];
      const Product<T> one = {block.a, b, K};
      const Output<T> to = {block.c, ldc, start, block.row, &one, 1, chain_of<T>(N)};
      if (block.rows <= 0) continue;
      if (vectors - v >= 2) {
        columns<2>(to, block.rows, panel);
      } else {
        columns<1>(to, block.rows, panel);
      }
    }
  }
}

// rows of A and of B of a tile of dots: 25 sums, or 12
constexpr int kDotsA = kRegisters == 32 ? 5 : 4;
constexpr int kDotsB = kRegisters == 32 ? 5 : 3;

// What the lanes of R x S dot products add up to, without the rest of K.
template <class T, int R, int S>
void dots_tile(int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, Vector<T>* sums_out) {
  using Lanes = Vector<T>;
  Lanes sums[R * S];
  unroll<R * S>([&](auto i) { sums[i] = Lanes{}; });
  // every third row has a pointer
  constexpr int kPointersA = (R + 2) / 3, kPointersB = (S + 2) / 3;
  const T *rows_a[kPointersA], *rows_b[kPointersB];
  unroll<kPointersA>([&](auto g) { rows_a[g] = a + 3 * g * lda; });
  unroll<kPointersB>([&](auto g) { rows_b[g] = b + 3 * g * ldb; });
  for (int64_t k = K / kLanes<T>; k > 0; --k) {
    Lanes right[S];
    unroll<S>([&](auto s) { right[s] = load<Lanes>(rows_b[s / 3] + s % 3 * ldb); });
    unroll<R>([&](auto r) {
      const Lanes left = load<Lanes>(rows_a[r / 3] + r % 3 * lda);
      unroll<S>([&](auto s) { sums[r * S + s] += left * right[s]; });
    });
    unroll<kPointersA>([&](auto g) {
      rows_a[g] += kLanes<T>;
      forget(rows_a[g]);
    });
    unroll<kPointersB>([&](auto g) {
      rows_b[g] += kLanes<T>;
      forget(rows_b[g]);
    });
  }
  unroll<R * S>([&](auto i) { sums_out[i] = sums[i]; });
}

template <class T>
using DotsTile = void (*)(int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, Vector<T>* sums);

// by the rows of A and of B
template <class T, int R, int S>
constexpr DotsTile<T> kDotsTile = dots_tile<T, (R < kDotsA ? R : kDotsA), (S < kDotsB ? S : kDotsB)>;
template <class T, int R>
constexpr DotsTile<T> kDotsTilesOfRow[] = {
    nullptr, kDotsTile<T, R, 1>, kDotsTile<T, R, 2>, kDotsTile<T, R, 3>, kDotsTile<T, R, 4>, kDotsTile<T, R, 5>};
template <class T>
constexpr const DotsTile<T>* kDotsTiles[] = {nullptr,
                                             kDotsTilesOfRow<T, 1>,
                                             kDotsTilesOfRow<T, 2>,
                                             kDotsTilesOfRow<T, 3>,
                                             kDotsTilesOfRow<T, 4>,
                                             kDotsTilesOfRow<T, 5>};

// C [M, N] = A B^T (+ C where `add`): c[m, n] = sum_k a[m * lda + k] b[n * ldb + k]. Reads K elements of a row, writes
// N of C.
template <class T>
void dots(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
          bool add) {
  if (M <= 0 || N <= 0) return;
  constexpr int Q = kQuarter<T>, kMost = (kDotsA * kDotsB + Q - 1) / Q * Q;
  Vector<T> lanes[kMost] = {};
  T sums[kMost];
  const RowTiles tiles_a = row_tiles<kDotsA>(M), tiles_b = row_tiles<kDotsB>(N);
  for (int64_t n = 0, j = 0; n < N; ++j) {
    const int64_t columns = j < tiles_b.high ? tiles_b.rows : tiles_b.rows - 1;
    for (int64_t m = 0, i = 0; m < M; ++i) {
      const int64_t rows = i < tiles_a.high ? tiles_a.rows : tiles_a.rows - 1;
      kDotsTiles<T>[rows][columns](K, a + m* lda, lda, b + n* ldb, ldb, lanes);
      for (int64_t s = 0; s < rows * columns; s += Q) sums_of_lanes<T>(lanes + s, sums + s);
      const T* sum = sums;
      for (int64_t r = m; r < m + rows; ++r) {
        for (int64_t s = n; s < n + columns; ++s) {
          T total = *sum++;
          for (int64_t k = K / kLanes<T> * kLanes<T>; k < K; ++k) total += a[r * lda + k] * b[s * ldb + k];
          T* to = c + r * ldc + s;
          *to = add ? *to + total : total;
        }
      }
      m += rows;
    }
    n += columns;
  }
}

}  // namespace mtml::MTML_ISA
