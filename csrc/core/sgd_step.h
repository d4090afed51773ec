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

namespace mtml::MTML_ISA {

constexpr double kClipEpsilon = 1e-6;

// a NaN norm gives a NaN factor: the comparison is false, and a broken task must not pass for a clipped one
MTML_INLINE double clip_factor(double norm, double clip) {
  // the norm's derivative at zero is infinite: a zero gradient is not clipped, so it takes no part
  if (norm == 0) return 1;
  const double factor = clip / (norm + kClipEpsilon);
  return factor >= 1 ? 1 : factor;
}

MTML_INLINE bool clips(const SgdOptions& options) { return options.clip < __builtin_inf(); }

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

// The rows of one task in one leaf, and what one element needs.
template <class T>
struct Row {
  const T *p, *g, *m;
  const T* lr;  // null where one rate serves the whole row: lr_row
  T lr_row, momentum, weight_decay, scale;

  MTML_INLINE Row(const SgdLeaf<T>& leaf, const SgdOptions& options, double scale, int64_t t)
      : p(leaf.p + t * leaf.size),
        g(leaf.g + t * leaf.size),
        m(leaf.m ? leaf.m + t * leaf.size : nullptr),
        lr(leaf.lr_element ? leaf.lr + t * leaf.lr_task : nullptr),
        lr_row(leaf.lr_element ? 0 : leaf.lr[t * leaf.lr_task]),
        momentum(static_cast<T>(options.momentum)),
        weight_decay(static_cast<T>(options.weight_decay)),
        scale(static_cast<T>(scale)) {}

  template <class V>
  MTML_INLINE V rate(int64_t i) const {
    return lr ? load<V>(lr + i) : V{} + lr_row;
  }

  // m'; a term whose factor is 0 is left out, so that an infinite p or m does not turn into NaN
  template <class V>
  MTML_INLINE V direction(int64_t i) const {
    V d = scale * load<V>(g + i);
    if (weight_decay != 0) d += weight_decay * load<V>(p + i);
    if (m) d += momentum * load<V>(m + i);
    return d;
  }
};

template <class T>
void sgd_step(const SgdLeaf<T>* leaves, int64_t num_leaves, const SgdOptions& options, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const double scale = clips(options) ? clip_factor(gradient_norm(leaves, num_leaves, t), options.clip) : 1;
    for (int64_t l = 0; l < num_leaves; ++l) {
      const SgdLeaf<T>& leaf = leaves[l];
      const Row<T> row(leaf, options, scale, t);
      T* new_p = leaf.new_p + t * leaf.size;
      T* new_m = leaf.new_m ? leaf.new_m + t * leaf.size : nullptr;
      for_each<T>(leaf.size, [&](int64_t i, auto lane) {
        using V = decltype(lane);
        const V d = row.template direction<V>(i);
        if (new_m) store(new_m + i, d);
        store(new_p + i, load<V>(row.p + i) - row.template rate<V>(i) * d);
      });
    }
  }
}

// s = w - lr * u, at element i of a task
template <class V, class T>
MTML_INLINE V cotangent(const Row<T>& row, const T* u, const T* w, int64_t i) {
  const V s = -(row.template rate<V>(i) * load<V>(u + i));
  return w ? s + load<V>(w + i) : s;
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
          const T* u = gradients[l].u + t * leaves[l].size;
          const T* w = gradients[l].w ? gradients[l].w + t * leaves[l].size : nullptr;
          s_dot_g += sum<T>(leaves[l].size, [&](int64_t i, auto lane) {
            using V = decltype(lane);
            return cotangent<V>(row, u, w, i) * load<V>(row.g + i);
          });
        }
        const double damped = norm + kClipEpsilon;
        through_norm = options.clip / (norm * damped * damped) * s_dot_g;
      }
    }
    const T norm_factor = static_cast<T>(through_norm);

    for (int64_t l = 0; l < num_leaves; ++l) {
      const SgdLeaf<T>& leaf = leaves[l];
      const SgdLeafGradient<T>& to = gradients[l];
      const Row<T> row(leaf, options, scale[t], t);
      const int64_t start = t * leaf.size;
      const T* u = to.u + start;
      const T* w = to.w ? to.w + start : nullptr;
      if (to.dp || to.dg || to.dm) {
        for_each<T>(leaf.size, [&](int64_t i, auto lane) {
          using V = decltype(lane);
          const V s = cotangent<V>(row, u, w, i);
          if (to.dg) {
            V dg = row.scale * s;
            if (norm_factor != 0) dg -= norm_factor * load<V>(row.g + i);
            store(to.dg + start + i, dg);
          }
          if (to.dp) {
            V dp = load<V>(u + i);
            if (row.weight_decay != 0) dp += row.weight_decay * s;
            store(to.dp + start + i, dp);
          }
          if (to.dm) store(to.dm + start + i, row.momentum * s);
        });
      }
      if (to.dlr && leaf.lr_task != 0) {
        for_each<T>(leaf.size, [&](int64_t i, auto lane) {
          using V = decltype(lane);
          store(to.dlr + start + i, -(load<V>(u + i) * row.template direction<V>(i)));
        });
      }
      if (to.dlr_task) {
        to.dlr_task[t] -= sum<T>(leaf.size, [&](int64_t i, auto lane) {
          using V = decltype(lane);
          return load<V>(u + i) * row.template direction<V>(i);
        });
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
        const T* u = gradient.u + t * leaf.size;
        for_each<T>(n, [&](int64_t i, auto lane) {
          using V = decltype(lane);
          store(part + i, load<V>(part + i) + load<V>(u + first + i) * row.template direction<V>(first + i));
        });
      }
      for (int64_t i = 0; i < n; ++i) total[i] -= part[i];
    }
    for (int64_t i = 0; i < n; ++i) gradient.dlr[first + i] = static_cast<T>(total[i]);
  }
}

}  // namespace mtml::MTML_ISA
