// One SGD step on a parameter tree of T tasks, and its reverse. Per task, over all leaves:
//
//     scale = min(1, clip / (|g| + 1e-6))          |g| over all leaves of the task
//     d     = scale * g + weight_decay * p
//     m'    = momentum * m + d
//     p'    = p - lr * m'
//
// With cotangents u of p' and w of m', and s = w - lr * u:
//
//     dlr = -u * m'      dm = momentum * s      dp = u + weight_decay * s
//     dg  = scale * s - clip / (|g| (|g| + 1e-6)^2) * <s, g> * g      (second term only where scale < 1)
#pragma once

#include <cstdint>

#include "core/sgd_step_args.h"
#include "core/simd.h"
// after simd.h, which brings what it needs
#include "core/sgd_step_row.h"

namespace mtml::MTML_ISA {

template <class T>
double gradient_norm(const SgdLeaf<T>* leaves, int64_t num_leaves, int64_t t) {
  double squares = 0;
  for (int64_t l = 0; l < num_leaves; ++l) {
    const T* g = leaves[l].g + t * leaves[l].size;
    squares += sum<T>(leaves[l].size, [&](int64_t i, auto lane) {
      using V = decltype(lane);
      const V value = load<V>(g + i);
      return value * value;
    });
  }
  return __builtin_sqrt(squares);
}

template <class T>
void sgd_step(const SgdLeaf<T>* leaves, int64_t num_leaves, const SgdOptions& options, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const double scale = clips(options) ? clip_factor(gradient_norm(leaves, num_leaves, t), options.clip) : 1;
    for (int64_t l = 0; l < num_leaves; ++l) {
      const SgdLeaf<T>& leaf = leaves[l];
      const Row<T> row(leaf, options, scale, t);
      T* new_p = leaf.new_p + t * leaf.size;
      T* new_m = leaf.new_m ? leaf.new_m + t * leaf.size : nullptr;
      for_each<T>(leaf.size, [&](int64_t i, auto lane) { step_element<decltype(lane)>(new_p, new_m, row, i); });
    }
  }
}

template <class T>
void sgd_step_backward(const SgdLeaf<T>* leaves, const SgdLeafGradient<T>* gradients, int64_t num_leaves,
                       const SgdOptions& options, double* scale, int64_t begin, int64_t end) {
  bool any_dg = false;
  for (int64_t l = 0; l < num_leaves; ++l) any_dg = any_dg || gradients[l].dg;

  for (int64_t t = begin; t < end; ++t) {
    scale[t] = 1;
    double through_norm = 0;  // factor of g in dg
    if (clips(options)) {
      const double norm = gradient_norm(leaves, num_leaves, t);
      scale[t] = clip_factor(norm, options.clip);
      if (any_dg && scale[t] != 1) {
        double s_dot_g = 0;
        for (int64_t l = 0; l < num_leaves; ++l) {
          const Row<T> row(leaves[l], options, scale[t], t);
          const CotangentRow<T> cotangent(gradients[l], t * leaves[l].size);
          s_dot_g += sum<T>(leaves[l].size, [&](int64_t i, auto lane) {
            using V = decltype(lane);
            return cotangent.template at<V>(row, i) * load<V>(row.g + i);
          });
        }
        through_norm = clip_slope(norm, options.clip, s_dot_g);
      }
    }
    const T norm_factor = static_cast<T>(through_norm);

    for (int64_t l = 0; l < num_leaves; ++l) {
      const SgdLeaf<T>& leaf = leaves[l];
      const SgdLeafGradient<T>& to = gradients[l];
      const Row<T> row(leaf, options, scale[t], t);
      const int64_t start = t * leaf.size;
      const CotangentRow<T> cotangent(to, start);
      if (to.dp || to.dg || to.dm) {
        for_each<T>(leaf.size, [&](int64_t i, auto lane) {
          step_element_backward<decltype(lane)>(to, row, cotangent, norm_factor, start, i);
        });
      }
      if (to.dlr && leaf.lr_task != 0) {
        for_each<T>(leaf.size, [&](int64_t i, auto lane) {
          store(to.dlr + start + i, -cotangent.template minus_dlr<decltype(lane)>(row, i));
        });
      }
      if (to.dlr_task) {
        to.dlr_task[t] -= sum<T>(
            leaf.size, [&](int64_t i, auto lane) { return cotangent.template minus_dlr<decltype(lane)>(row, i); });
      }
    }
  }
}

template <class T>
void sgd_step_shared_rate_backward(const SgdLeaf<T>& leaf, const SgdLeafGradient<T>& gradient,
                                   const SgdOptions& options, const double* scale, int64_t num_tasks, int64_t begin,
                                   int64_t end) {
  // a block of elements, whose sums over the tasks stay in the first cache
  constexpr int64_t kBlock = 256;
  T part[kBlock];
  double total[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = first + kBlock < end ? kBlock : end - first;
    for (int64_t i = 0; i < n; ++i) total[i] = 0;
    for (int64_t task = 0; task < num_tasks; task += kShortSum) {
      const int64_t task_end = task + kShortSum < num_tasks ? task + kShortSum : num_tasks;
      for (int64_t i = 0; i < n; ++i) part[i] = 0;
      for (int64_t t = task; t < task_end; ++t) {
        const Row<T> row(leaf, options, scale[t], t);
        const CotangentRow<T> cotangent(gradient, t * leaf.size);
        for_each<T>(n, [&](int64_t i, auto lane) {
          using V = decltype(lane);
          store(part + i, load<V>(part + i) + cotangent.template minus_dlr<V>(row, first + i));
        });
      }
      for (int64_t i = 0; i < n; ++i) total[i] -= part[i];
    }
    for (int64_t i = 0; i < n; ++i) gradient.dlr[first + i] = static_cast<T>(total[i]);
  }
}

}  // namespace mtml::MTML_ISA
