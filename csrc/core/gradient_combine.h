// The weighted sum of T gradients, d = w^T g, and its reverse, dg_t = w_t u and dw_t = <u, g_t>.
#pragma once

#include "core/gradient_gram.h"

namespace mtml::MTML_ISA {

template <class T>
void gradient_combine(const GradientLeaves<T>& g, int64_t begin, int64_t end, const T* w) {
  // Tasks that are read at a time: a processor foresees what a few rows come to next. Their sum goes into a total, so
  // that chains stay short.
  constexpr int64_t kTasks = 8, kBlock = 4096;
  for_each_part(g, begin, end, [&](int64_t l, int64_t begin_of_part, int64_t last) {
    const GradientLeaf<T>& leaf = g.leaves[l];
    for (int64_t first = begin_of_part; first < last; first += kBlock) {
      const int64_t n = last - first < kBlock ? last - first : kBlock;
      T* const to = leaf.to + first;
      if (g.tasks == 0) {
        for (int64_t i = 0; i < n; ++i) to[i] = 0;
      }
      const auto add = [&](auto count, int64_t t) __attribute__((always_inline)) {
        const T* rows = leaf.g + t * leaf.size + first;
        for_each<T>(n, [&](int64_t i, auto lane) __attribute__((always_inline)) {
          using V = decltype(lane);
          V sum = w[t] * load<V>(rows + i);
          unroll<count - 1>([&](auto r) { sum += w[t + r + 1] * load<V>(rows + (r + 1) * leaf.size + i); });
          store(to + i, t ? load<V>(to + i) + sum : sum);
        });
      };
      int64_t t = 0;
      for (; t + kTasks <= g.tasks; t += kTasks) add(Index<kTasks>{}, t);
      for (; t + 2 <= g.tasks; t += 2) add(Index<2>{}, t);
      if (t < g.tasks) add(Index<1>{}, t);
    }
  });
}

// products[t] += <u, row t of g>, in double, for T rows
template <class T>
void add_products(int64_t tasks, int64_t n, const T* g, int64_t ld, const T* u, double* products) {
  constexpr int64_t L = kLanes<double>, kBlock = 256;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t columns = n - first < kBlock ? n - first : kBlock, whole = columns & -L;
    for (int64_t t = 0; t < tasks; t += kDotsA) {
      const int64_t rows = tasks - t < kDotsA ? tasks - t : kDotsA;
      Vector<double> lanes[kDotsA];
      kPairsTiles<T>[rows][1](whole, g + t* ld + first, u + first, ld, 0, lanes);
      for (int64_t r = 0; r < rows; ++r) {
        double total = 0;
        for (int64_t l = 0; l < L; ++l) total += lanes[r][l];
        for (int64_t i = first + whole; i < first + columns; ++i) {
          total += static_cast<double>(g[(t + r) * ld + i]) * static_cast<double>(u[i]);
        }
        products[t + r] += total;
      }
    }
  }
}

template <class T>
void gradient_combine_backward(const GradientLeaves<T>& g, int64_t begin, int64_t end, const T* w, const T* const* u,
                               double* products) {
  for (int64_t t = 0; products && t < g.tasks; ++t) products[t] = 0;
  for_each_part(g, begin, end, [&](int64_t l, int64_t first, int64_t last) {
    const GradientLeaf<T>& leaf = g.leaves[l];
    const T* of_result = u[l] + first;
    const int64_t n = last - first;
    for (int64_t t = 0; leaf.to && t < g.tasks; ++t) {
      T* const to = leaf.to + t * leaf.size + first;
      for_each<T>(n, [&](int64_t i, auto lane) {
        using V = decltype(lane);
        store(to + i, w[t] * load<V>(of_result + i));
      });
    }
    if (products) add_products(g.tasks, n, leaf.g + first, leaf.size, of_result, products);
  });
}

}  // namespace mtml::MTML_ISA
