// The activations of a network, with their first and second derivatives: the formulas, for vectors or for one element.
// What exp_, tanh_ and the like are, whoever includes this has said. A struct an activation has, with h = act(y):
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
MTML_FUNCTION auto with_activation(Activation activation, F f) {
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

MTML_FUNCTION inline bool needs_input(Activation activation) {
  return with_activation(activation,
                         [](auto named) { return ActivationOf<decltype(named)::kValue, float>::kNeedsInput; });
}

MTML_FUNCTION inline bool is_linear(Activation activation) {
  return with_activation(activation, [](auto named) { return ActivationOf<decltype(named)::kValue, float>::kLinear; });
}

}  // namespace mtml::MTML_ISA
