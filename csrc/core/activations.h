// The activations of a network and their derivatives on contiguous elements; the formulas are activation_formulas.h.
#pragma once

#include "core/vector_math.h"
// after vector_math.h, which brings what it needs
#include "core/activation_formulas.h"

namespace mtml::MTML_ISA {

// out[i] = f(in[i]...) over 0 <= i < n; out may be one of the inputs
template <class T, class F, class... In>
MTML_INLINE void map(int64_t n, T* out, F f, const In*... in) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(out + i, f(load<Vector<T>>(in + i)...));
  if (i < n) store_first(out + i, f(load_first(in + i, n - i)...), n - i);
}

// h = act(y)
template <Activation A, class T>
void activate(int64_t n, const T* y, T* h) {
  map(n, h, [](auto y) { return ActivationOf<A, T>::act(y); }, y);
}

// dy = e * act'(y)
template <Activation A, class T>
void activate_backward(int64_t n, const T* e, const T* y, const T* h, T* dy) {
  using Act = ActivationOf<A, T>;
  if constexpr (Act::kNeedsInput) {
    map(n, dy, [](auto e, auto y) { return Act::times_d1(e, y, y); }, e, y);
  } else {
    map(n, dy, [](auto e, auto h) { return Act::times_d1(e, h, h); }, e, h);
  }
}

// Rh = act'(y) * Ry
template <Activation A, class T>
void activate_tangent(int64_t n, const T* Ry, const T* y, const T* h, T* Rh) {
  activate_backward<A>(n, Ry, y, h, Rh);
}

// RdY = Re * act'(y) + e * act''(y) * Ry; e and Ry are not read where the activation is linear
template <Activation A, class T>
void activate_backward_tangent(int64_t n, const T* Re, const T* e, const T* Ry, const T* y, const T* h, T* RdY) {
  using Act = ActivationOf<A, T>;
  if constexpr (Act::kLinear) {
    activate_backward<A>(n, Re, y, h, RdY);
  } else {
    // one of y and h is all that the derivatives read
    const T* at = Act::kNeedsInput ? y : h;
    map(
        n, RdY, [](auto Re, auto e, auto Ry, auto at) { return Re * Act::d1(at, at) + e * Act::d2(at, at) * Ry; }, Re,
        e, Ry, at);
  }
}

}  // namespace mtml::MTML_ISA
