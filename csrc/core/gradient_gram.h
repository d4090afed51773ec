// The Gram matrix of T gradients, M_ij = <g_i, g_j> over all columns, in double whatever the gradients are; and its
// reverse, dg_i = sum_j S_ij g_j with S = dM + dM^T.
//
// A block of columns of all tasks stays in the caches for all pairs of tasks. The sums of a pair stay in the lanes of a
// vector until the last column.
#pragma once

#include "core/gemm.h"
#include "core/gradient_args.h"

namespace mtml::MTML_ISA {

// f(leaf, first, last) for the parts of the leaves that columns [begin, end) lie in
template <class T, class F>
MTML_INLINE void for_each_part(const GradientLeaves<T>& g, int64_t begin, int64_t end, F f) {
  for (int64_t l = 0, start = 0; l < g.count && start < end; start += g.leaves[l++].size) {
    const int64_t first = begin > start ? begin - start : 0;
    const int64_t last = end - start < g.leaves[l].size ? end - start : g.leaves[l].size;
    if (first < last) f(l, first, last);
  }
}

// as many numbers as doubles fit a vector
template <class T>
MTML_INLINE Vector<double> load_wide(const T* from) {
  typedef T Some __attribute__((vector_size(kLanes<double> * sizeof(T))));
  const Some values = load<Some>(from);
  if constexpr (sizeof(T) == sizeof(double)) {
    return values;
  } else {
    // GCC converts halves and puts them together, which takes three times as long
#if MTML_VECTOR_BYTES == 64 && !defined(__clang__)
    constexpr int kAll = 0xff, kRounding = 4;
    return __builtin_ia32_cvtps2pd512_mask(values, Vector<double>{}, kAll, kRounding);
#elif MTML_VECTOR_BYTES == 32 && !defined(__clang__)
    return __builtin_ia32_cvtps2pd256(values);
#else
    return __builtin_convertvector(values, Vector<double>);
#endif
  }
}

// columns of a block, in which T rows should fit the second cache: the pairs' sums are touched once a block
inline int64_t block_columns(int64_t tasks) {
  constexpr int64_t kElements = 1 << 16, kMost = 512, kLeast = 64;
  const int64_t columns = (kElements / (tasks > 0 ? tasks : 1)) & -kLeast;
  return columns > kMost ? kMost : columns < kLeast ? kLeast : columns;
}

// R rows of a with S rows of b, or, where S is 0, each with itself and those behind it: what the lanes of the R S, or
// R (R + 1) / 2, dot products add up to, by rows. K is whole vectors; `ahead` columns on is what will be read next.
template <class T, int R, int S>
void pairs_tile(int64_t K, const T* a, const T* b, int64_t ld, int64_t ahead, Vector<double>* sums_out) {
  using Lanes = Vector<double>;
  constexpr int kPairs = S ? R * S : R * (R + 1) / 2;
  Lanes sums[kPairs];
  unroll<kPairs>([&](auto i) { sums[i] = Lanes{}; });
  // every third row has a pointer
  constexpr int kPointersA = (R + 2) / 3, kPointersB = (S + 2) / 3;
  const T *rows_a[kPointersA], *rows_b[kPointersB ? kPointersB : 1];
  unroll<kPointersA>([&](auto g) { rows_a[g] = a + 3 * g * ld; });
  unroll<kPointersB>([&](auto g) { rows_b[g] = b + 3 * g * ld; });
  for (int64_t k = K / kLanes<double>; k > 0; --k) {
    if constexpr (S == 0) {
      Lanes row[R];
      unroll<R>([&](auto r) {
        const T* from = rows_a[r / 3] + r % 3 * ld;
        row[r] = load_wide(from);
        // each row is in one triangle
        __builtin_prefetch(from + ahead);
      });
      unroll<R>([&](auto r) {
        unroll<R>([&](auto s) {
          // pairs before those of row r: R + (R - 1) + ...
          if constexpr (s >= r) sums[r * (2 * R - r + 1) / 2 + s - r] += row[r] * row[s];
        });
      });
    } else {
      Lanes right[S];
      unroll<S>([&](auto s) { right[s] = load_wide(rows_b[s / 3] + s % 3 * ld); });
      unroll<R>([&](auto r) {
        const Lanes left = load_wide(rows_a[r / 3] + r % 3 * ld);
        unroll<S>([&](auto s) { sums[r * S + s] += left * right[s]; });
      });
    }
    unroll<kPointersA>([&](auto g) {
      rows_a[g] += kLanes<double>;
      forget(rows_a[g]);
    });
    unroll<kPointersB>([&](auto g) {
      rows_b[g] += kLanes<double>;
      forget(rows_b[g]);
    });
  }
  unroll<kPairs>([&](auto i) { sums_out[i] = sums[i]; });
}

template <class T>
using PairsTile = void (*)(int64_t K, const T* a, const T* b, int64_t ld, int64_t ahead, Vector<double>* sums);

// by the rows of a and of b
template <class T, int R, int S>
constexpr PairsTile<T> kPairsTile = pairs_tile<T, (R < kDotsA ? R : kDotsA), (S < kDotsB ? S : kDotsB)>;
template <class T, int R>
constexpr PairsTile<T> kPairsTilesOfRow[] = {kPairsTile<T, R, 0>, kPairsTile<T, R, 1>, kPairsTile<T, R, 2>,
                                             kPairsTile<T, R, 3>, kPairsTile<T, R, 4>, kPairsTile<T, R, 5>};
template <class T>
constexpr const PairsTile<T>* kPairsTiles[] = {nullptr,
                                               kPairsTilesOfRow<T, 1>,
                                               kPairsTilesOfRow<T, 2>,
                                               kPairsTilesOfRow<T, 3>,
                                               kPairsTilesOfRow<T, 4>,
                                               kPairsTilesOfRow<T, 5>};

// f(i, rows, j, columns) over tiles of pairs: rows i.. beside the rows j.. behind them, or beside themselves, where
// j = i and columns = 0
template <class F>
MTML_INLINE void for_each_tile(int64_t tasks, F f) {
  const auto height = [](const RowTiles& tiles, int64_t n) { return n < tiles.high ? tiles.rows : tiles.rows - 1; };
  const RowTiles down = row_tiles<kDotsA>(tasks);
  for (int64_t i = 0, m = 0; i < tasks; ++m) {
    const int64_t rows = height(down, m), rest = i + rows;
    f(i, rows, i, int64_t{0});
    const RowTiles across = row_tiles<kDotsB>(tasks - rest);
    for (int64_t j = rest, n = 0; j < tasks; ++n) {
      const int64_t columns = height(across, n);
      f(i, rows, j, columns);
      j += columns;
    }
    i += rows;
  }
}

// a vector a pair, and one a task
inline int64_t gradient_gram_scratch(int64_t tasks) { return ((tasks + 1) * tasks / 2 + tasks) * kLanes<double>; }

template <class T>
void gradient_gram(const GradientLeaves<T>& g, int64_t begin, int64_t end, double* products, double* scratch) {
  using Lanes = Vector<double>;
  constexpr int64_t L = kLanes<double>;
  const int64_t tasks = g.tasks, most = block_columns(tasks);
  double* const all_sums = scratch;
  T* const rest = reinterpret_cast<T*>(scratch + (tasks + 1) * tasks / 2 * L);  // [T, L]
  for (int64_t i = 0; i < (tasks + 1) * tasks / 2 * L; ++i) all_sums[i] = 0;

  const auto add_block = [&](int64_t K, const T* block, int64_t ld) {
    double* sums = all_sums;
    for_each_tile(tasks, [&](int64_t i, int64_t rows, int64_t j, int64_t columns) {
      // a triangle is no more than a tile
      Lanes lanes[kDotsA * kDotsB];
      kPairsTiles<T>[rows][columns](K, block + i* ld, block + j* ld, ld, K, lanes);
      const int64_t count = columns ? rows * columns : rows * (rows + 1) / 2;
      for (int64_t s = 0; s < count; ++s, sums += L) store(sums, load<Lanes>(sums) + lanes[s]);
    });
  };
  for_each_part(g, begin, end, [&](int64_t l, int64_t first, int64_t last) {
    const GradientLeaf<T>& leaf = g.leaves[l];
    while (last - first >= L) {
      const int64_t n = last - first < most ? (last - first) & -L : most;
      add_block(n, leaf.g + first, leaf.size);
      first += n;
    }
    if (first == last) return;
    for (int64_t t = 0; t < tasks; ++t) {
      for (int64_t k = 0; k < L; ++k) rest[t * L + k] = first + k < last ? leaf.g[t * leaf.size + first + k] : T(0);
    }
    add_block(L, rest, L);
  });

  const double* sums = all_sums;
  for_each_tile(tasks, [&](int64_t i, int64_t rows, int64_t j, int64_t columns) {
    for (int64_t r = i; r < i + rows; ++r) {
      for (int64_t s = columns ? j : r; s < (columns ? j + columns : i + rows); ++s) {
        double total = 0;
        for (int64_t l = 0; l < kLanes<double>; ++l) total += *sums++;
        products[r * tasks + s] = products[s * tasks + r] = total;
      }
    }
  });
}

// blocks of all tasks, before and after
inline int64_t gradient_gram_backward_scratch(int64_t tasks) { return 2 * tasks * block_columns(tasks); }

template <class T>
void gradient_gram_backward(const GradientLeaves<T>& g, int64_t begin, int64_t end, const double* s, double* scratch) {
  const int64_t tasks = g.tasks, ld = block_columns(tasks);
  double *const block = scratch, *const result = scratch + tasks * ld;
  for_each_part(g, begin, end, [&](int64_t l, int64_t first, int64_t last) {
    const GradientLeaf<T>& leaf = g.leaves[l];
    if (!leaf.to) return;
    for (; first < last; first += ld) {
      const int64_t n = last - first < ld ? last - first : ld;
      for (int64_t t = 0; t < tasks; ++t) {
        for (int64_t k = 0; k < n; ++k) block[t * ld + k] = leaf.g[t * leaf.size + first + k];
        for (int64_t k = n; k < padded<double>(n); ++k) block[t * ld + k] = 0;
      }
      const Product<double> weighted = {{s, tasks, 1}, {block, ld, kPanel<double>}, tasks};
      product<double>(tasks, n, result, ld, kZero, nullptr, weighted);
      for (int64_t t = 0; t < tasks; ++t) {
        for (int64_t k = 0; k < n; ++k) leaf.to[t * leaf.size + first + k] = static_cast<T>(result[t * ld + k]);
      }
    }
  });
}

}  // namespace mtml::MTML_ISA
