// What sgd_step does to the elements of one task in one leaf; the formulas stand in core/sgd_step.h. For any processor:
// the including file names it (MTML_ISA), says how to inline (MTML_INLINE), and brings load and store. V is a vector of
// T, or T itself.
#pragma once

#include <cstdint>

#include "core/sgd_step_args.h"

namespace mtml::MTML_ISA {

constexpr double kClipEpsilon = 1e-6;

// a NaN norm gives a NaN factor: the comparison is false, and a broken task must not pass for a clipped one
MTML_INLINE double clip_factor(double norm, double clip) {
  // the norm's derivative at zero is infinite: a zero gradient is not clipped, so it takes no part
  if (norm == 0) return 1;
  const double factor = clip / (norm + kClipEpsilon);
  return factor >= 1 ? 1 : factor;
}

// the factor of g in dg: what the clipping factor of a norm contributes, where that is not 1
MTML_INLINE double clip_slope(double norm, double clip, double s_dot_g) {
  const double damped = norm + kClipEpsilon;
  return clip / (norm * damped * damped) * s_dot_g;
}

MTML_INLINE bool clips(const SgdOptions& options) { return options.clip < __builtin_inf(); }

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

// The same rows of the cotangents.
template <class T>
struct CotangentRow {
  const T *u, *w;

  MTML_INLINE CotangentRow(const SgdLeafGradient<T>& gradient, int64_t start)
      : u(gradient.u + start), w(gradient.w ? gradient.w + start : nullptr) {}

  // s = w - lr * u
  template <class V>
  MTML_INLINE V at(const Row<T>& row, int64_t i) const {
    const V s = -(row.template rate<V>(i) * load<V>(u + i));
    return w ? s + load<V>(w + i) : s;
  }

  // -dlr
  template <class V>
  MTML_INLINE V minus_dlr(const Row<T>& row, int64_t i) const {
    return load<V>(u + i) * row.template direction<V>(i);
  }
};

// element i of the rows new_p and new_m, which is null without momentum; by value, or each store would reload them
template <class V, class T>
MTML_INLINE void step_element(T* new_p, T* new_m, const Row<T>& row, int64_t i) {
  const V d = row.template direction<V>(i);
  if (new_m) store(new_m + i, d);
  store(new_p + i, load<V>(row.p + i) - row.template rate<V>(i) * d);
}

// element i of a task whose row begins at `start`; norm_factor: the clip_slope of the task, 0 where it is not clipped
template <class V, class T>
MTML_INLINE void step_element_backward(const SgdLeafGradient<T>& to, const Row<T>& row, const CotangentRow<T>& from,
                                       T norm_factor, int64_t start, int64_t i) {
  const V s = from.template at<V>(row, i);
  if (to.dg) {
    V dg = row.scale * s;
    if (norm_factor != 0) dg -= norm_factor * load<V>(row.g + i);
    store(to.dg + start + i, dg);
  }
  if (to.dp) {
    V dp = load<V>(from.u + i);
    if (row.weight_decay != 0) dp += row.weight_decay * s;
    store(to.dp + start + i, dp);
  }
  if (to.dm) store(to.dm + start + i, row.momentum * s);
}

}  // namespace mtml::MTML_ISA
