// What core/activation_formulas.h and core/batch_norm.h ask of whoever includes them, on a GPU: CUDA's own functions on
// one element (exp, erfc and the like, within 2 units in the last place), and a channel for each thread of a block.
#pragma once

#include "cuda/element.h"

namespace mtml::cuda {

template <class T>
using Vector = T;
template <class T>
constexpr int64_t kLanes = 1;

// a sum adds at most this many terms before they go into a total: the error does not grow with the length
constexpr int64_t kShortSum = 16;

template <int I>
struct Index {
  MTML_INLINE constexpr operator int() const { return I; }
};
// f(Index<0>{}), ..., f(Index<N - 1>{})
template <int N, int I = 0, class F>
MTML_INLINE void unroll(const F& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    unroll<N, I + 1>(f);
  }
}

// f(c, Index<1>{}) for the channels of this thread
template <class T, class F>
__device__ __forceinline__ void for_channels(int64_t channels, const F& f) {
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) f(c, Index<1>{});
}

template <class T>
MTML_INLINE T all(T value) {
  return value;
}
template <class T>
MTML_INLINE T sqrt_(T x) {
  return sqrt(x);
}
template <class T>
MTML_INLINE T exp_(T x) {
  return exp(x);
}
template <class T>
MTML_INLINE T expm1_of_negative(T x) {
  return expm1(x);
}
template <class T>
MTML_INLINE T tanh_(T x) {
  return tanh(x);
}
// log(1 + e^-|x|): what softplus and the loss of a logit add to their straight parts
template <class T>
MTML_INLINE T log1p_exp_of_negative_magnitude(T x) {
  return log1p(exp(-fabs(x)));
}

// sigmoid(x) and its derivative; rest = 1 - value and slope = value * rest are no differences of close numbers
template <class V>
struct Sigmoid {
  V value, rest, slope;
};
template <class T>
MTML_INLINE Sigmoid<T> sigmoid_and_slope(T x) {
  const T e = exp(-fabs(x)), large = T(1) / (T(1) + e), small = e / (T(1) + e);
  return x < T(0) ? Sigmoid<T>{small, large, small * large} : Sigmoid<T>{large, small, small * large};
}
template <class T>
MTML_INLINE T sigmoid_(T x) {
  return sigmoid_and_slope<T>(x).value;
}

// the normal distribution at y: its density and the probability below y
template <class V>
struct Normal {
  V density, below;
};
template <class T>
MTML_INLINE Normal<T> normal(T y) {
  constexpr T kRootHalf = T(0.70710678118654752440), kDensityAtZero = T(0.39894228040143267794);
  return {kDensityAtZero * exp(T(-0.5) * y * y), T(0.5) * erfc(-y * kRootHalf)};
}

}  // namespace mtml::cuda
