// The activations of a network, with their first and second derivatives, on contiguous elements. A struct an activation
// has, with h = act(y):
//
//     act(y)        the value
//     d1(y, h)      the first derivative
//     d2(y, h)      the second derivative
//     kNeedsInput   whether the derivatives read y; else y may be null, and h alone is read
//     kLinear       whether d2 is zero everywhere
//
// At kinks, infinities and NaN they do as torch's own derivatives do.
#pragma once

#include "core/mlp_adapt_args.h"
#include "core/vector_math.h"

namespace mtml::MTML_ISA {

template <Activation A, class T>
struct ActivationOf;

template <class T>
struct ActivationOf<Activation::kIdentity, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = false, kLinear = true;
  static MTML_INLINE V act(V y) { return y; }
  static MTML_INLINE V d1(V, V) { return all<T>(1); }
  static MTML_INLINE V times_d1(V e, V, V) { return e; }
};

template <class T>
struct ActivationOf<Activation::kRelu, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = false, kLinear = true;
  // written so that NaN stays NaN
  static MTML_INLINE V act(V y) { return y <= V{} ? V{} : y; }
  static MTML_INLINE V d1(V, V h) { return h <= V{} ? V{} : all<T>(1); }
  static MTML_INLINE V times_d1(V e, V, V h) { return h <= V{} ? V{} : e; }
};

template <class T>
struct ActivationOf<Activation::kLeakyRelu, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = false, kLinear = true;
  static constexpr T kSlope = T(0.01);
  static MTML_INLINE V act(V y) { return y > V{} ? y : kSlope * y; }
  static MTML_INLINE V d1(V, V h) { return h > V{} ? all<T>(1) : all<T>(kSlope); }
  static MTML_INLINE V times_d1(V e, V, V h) { return h > V{} ? e : kSlope * e; }
};

// activations without a select of their own
template <class Derived, class T>
struct Smooth {
  using V = Vector<T>;
  static constexpr bool kLinear = false;
  static MTML_INLINE V times_d1(V e, V y, V h) { return e * Derived::d1(y, h); }
};

template <class T>
struct ActivationOf<Activation::kElu, T> : Smooth<ActivationOf<Activation::kElu, T>, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = false;
  static MTML_INLINE V act(V y) { return y > V{} ? y : expm1_of_negative<T>(y); }
  // torch: the second derivative at zero is zero, and NaN counts as positive
  static MTML_INLINE V d1(V, V h) { return h <= V{} ? h + T(1) : all<T>(1); }
  static MTML_INLINE V d2(V, V h) { return h < V{} ? h + T(1) : V{}; }
};

template <class T>
struct ActivationOf<Activation::kTanh, T> : Smooth<ActivationOf<Activation::kTanh, T>, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = false;
  static MTML_INLINE V act(V y) { return tanh_<T>(y); }
  static MTML_INLINE V d1(V, V h) { return T(1) - h * h; }
  static MTML_INLINE V d2(V, V h) { return T(-2) * h * (T(1) - h * h); }
};

template <class T>
struct ActivationOf<Activation::kSigmoid, T> : Smooth<ActivationOf<Activation::kSigmoid, T>, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = false;
  static MTML_INLINE V act(V y) { return sigmoid_<T>(y); }
  static MTML_INLINE V d1(V, V h) { return h * (T(1) - h); }
  static MTML_INLINE V d2(V, V h) { return h * (T(1) - h) * (T(1) - T(2) * h); }
};

template <class T>
struct ActivationOf<Activation::kSilu, T> : Smooth<ActivationOf<Activation::kSilu, T>, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = true;
  static MTML_INLINE V act(V y) { return y / (T(1) + exp_<T>(-y)); }
  static MTML_INLINE V d1(V y, V) {
    const Sigmoid<V> s = sigmoid_and_slope<T>(y);
    return s.value + y * s.slope;
  }
  static MTML_INLINE V d2(V y, V) {
    const Sigmoid<V> s = sigmoid_and_slope<T>(y);
    // the slope first: it is zero where y times anything might be infinite
    return s.slope * T(2) + s.slope * y * (s.rest - s.value);
  }
};

// Torch goes over to the identity behind y = 20, in its second derivative at 20 already.
template <class T>
struct ActivationOf<Activation::kSoftplus, T> : Smooth<ActivationOf<Activation::kSoftplus, T>, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = true;
  static constexpr T kThreshold = 20;
  static MTML_INLINE V act(V y) {
    const V curved = (y > V{} ? y : V{}) + log1p_exp_of_negative_magnitude<T>(y);
    return y > kThreshold ? y : curved;
  }
  static MTML_INLINE V d1(V y, V) { return y > kThreshold ? all<T>(1) : sigmoid_and_slope<T>(y).value; }
  static MTML_INLINE V d2(V y, V) { return y >= kThreshold ? V{} : sigmoid_and_slope<T>(y).slope; }
};

// y P(standard normal < y)
template <class T>
struct ActivationOf<Activation::kGelu, T> : Smooth<ActivationOf<Activation::kGelu, T>, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = true;
  static MTML_INLINE V act(V y) { return y * normal<T>(y).below; }
  static MTML_INLINE V d1(V y, V) {
    const Normal<V> at = normal<T>(y);
    return at.below + y * at.density;
  }
  static MTML_INLINE V d2(V y, V) {
    const Normal<V> at = normal<T>(y);
    // the factors one after the other: y * y may be infinite where the density is zero
    return T(2) * at.density - y * at.density * y;
  }
};

// y / 2 (1 + tanh(u)) = y sigmoid(2 u), u = sqrt(2 / pi) (y + 0.044715 y^3)
template <class T>
struct ActivationOf<Activation::kGeluTanh, T> : Smooth<ActivationOf<Activation::kGeluTanh, T>, T> {
  using V = Vector<T>;
  static constexpr bool kNeedsInput = true;
  static constexpr T kLinearPart = T(1.59576912160573071176);  // 2 sqrt(2 / pi)
  static constexpr T kCubicPart = T(0.07135481627260024878);   // and times 0.044715
  // y^2, but not infinite: the sigmoid is 0 or 1 long before
  static MTML_INLINE V square(V y) {
    constexpr T kFar = 1000;
    const V y2 = y * y;
    return y2 > kFar ? all<T>(kFar) : y2;
  }
  static MTML_INLINE V act(V y) { return y * sigmoid_<T>(y * (kLinearPart + kCubicPart * (y * y))); }
  static MTML_INLINE V d1(V y, V) {
    const V y2 = square(y);
    const Sigmoid<V> s = sigmoid_and_slope<T>(y * (kLinearPart + kCubicPart * y2));
    return s.value + y * s.slope * (kLinearPart + T(3) * kCubicPart * y2);
  }
  static MTML_INLINE V d2(V y, V) {
    const V y2 = square(y);
    const Sigmoid<V> s = sigmoid_and_slope<T>(y * (kLinearPart + kCubicPart * y2));
    // with v = 2 u: v' and y v''
    const V v1 = kLinearPart + T(3) * kCubicPart * y2, y_v2 = T(6) * kCubicPart * y2;
    return s.slope * (T(2) * v1 + y_v2) + s.slope * y * ((s.rest - s.value) * (v1 * v1));
  }
};

// f(Named<A>{}): one switch a call, so that loops know their activation at compile time
template <Activation A>
struct Named {
  static constexpr Activation kValue = A;
};

template <class F>
auto with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kRelu:
      return f(Named<Activation::kRelu>{});
    case Activation::kTanh:
      return f(Named<Activation::kTanh>{});
    case Activation::kGelu:
      return f(Named<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(Named<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return f(Named<Activation::kSilu>{});
    case Activation::kElu:
      return f(Named<Activation::kElu>{});
    case Activation::kLeakyRelu:
      return f(Named<Activation::kLeakyRelu>{});
    case Activation::kSigmoid:
      return f(Named<Activation::kSigmoid>{});
    case Activation::kSoftplus:
      return f(Named<Activation::kSoftplus>{});
    case Activation::kIdentity:
      break;
  }
  return f(Named<Activation::kIdentity>{});
}

inline bool needs_input(Activation activation) {
  return with_activation(activation,
                         [](auto named) { return ActivationOf<decltype(named)::kValue, float>::kNeedsInput; });
}

inline bool is_linear(Activation activation) {
  return with_activation(activation, [](auto named) { return ActivationOf<decltype(named)::kValue, float>::kLinear; });
}

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
