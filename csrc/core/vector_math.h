// exp, tanh, sigmoid, softplus, log and the normal distribution on vectors: polynomials and a few selects, no calls. T
// is float or double, V is Vector<T> (a rest of a loop is loaded as a vector too: see load_first), so that an element's
// bits do not depend on its place. Errors are below 3 units in the last place (tests/test_vector_math.py has the
// figures); results below the smallest normal number may be zero; NaN stays NaN.
#pragma once

#include "core/simd.h"

namespace mtml::MTML_ISA {

template <class T>
constexpr bool kIsFloat = sizeof(T) == sizeof(float);

// a vector of integers as wide as T, as comparisons give it
template <class T>
using Integers = decltype(Vector<T>{} < Vector<T>{});

template <class T>
constexpr int kFractionBits = kIsFloat<T> ? 23 : 52;
// sums of bit patterns, which may wrap: lanes of NaN hold anything
template <class T>
struct UnsignedOf;
template <>
struct UnsignedOf<float> {
  typedef uint32_t type __attribute__((vector_size(MTML_VECTOR_BYTES)));
};
template <>
struct UnsignedOf<double> {
  typedef uint64_t type __attribute__((vector_size(MTML_VECTOR_BYTES)));
};

template <class T>
constexpr int kExponentBias = kIsFloat<T> ? 127 : 1023;

template <class To, class From>
MTML_INLINE To bits_as(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// value in every lane
template <class T>
MTML_INLINE Vector<T> all(T value) {
  return Vector<T>{} + value;
}

// the first n < kLanes<T> elements, zeros behind them
template <class T>
MTML_INLINE Vector<T> load_first(const T* from, int64_t n) {
  Vector<T> value{};
  if (n == 1) {
    value[0] = *from;
    return value;
  }
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = from[i];
  return load<Vector<T>>(lanes);
}
template <class T>
MTML_INLINE void store_first(T* to, Vector<T> value, int64_t n) {
  T lanes[kLanes<T>];
  store(lanes, value);
  for (int64_t i = 0; i < n; ++i) to[i] = lanes[i];
}

template <class T>
MTML_INLINE Integers<T> add_bits(Integers<T> a, Integers<T> b) {
  using U = typename UnsignedOf<T>::type;
  return bits_as<Integers<T>>(bits_as<U>(a) + bits_as<U>(b));
}

template <class T>
MTML_INLINE Integers<T> sign_bit() {
  return ~Integers<T>{} << (8 * sizeof(T) - 1);
}
template <class T, class V>
MTML_INLINE V magnitude(V x) {
  return bits_as<V>(bits_as<Integers<T>>(x) & ~sign_bit<T>());
}
// x >= 0 with the sign of another number
template <class T, class V>
MTML_INLINE V with_sign_of(V x, V sign) {
  return bits_as<V>(bits_as<Integers<T>>(x) | (bits_as<Integers<T>>(sign) & sign_bit<T>()));
}

template <class T, class V>
MTML_INLINE V sqrt_(V x) {
  for (int64_t i = 0; i < kLanes<T>; ++i) {
    if constexpr (kIsFloat<T>) {
      x[i] = __builtin_sqrtf(x[i]);
    } else {
      x[i] = __builtin_sqrt(x[i]);
    }
  }
  return x;
}

// coefficients from the highest power to the lowest
template <class V, class T, class... Ts>
MTML_INLINE V polynomial(V x, T highest, Ts... lower) {
  V sum = V{} + highest;
  ((sum = sum * x + lower), ...);
  return sum;
}

// x = n log 2 + r, |r| <= log(2) / 2
template <class T, class V>
struct ReducedExponent {
  V r;
  Integers<T> n_shifted;  // n where the exponent of T lies
};

template <class T, class V>
MTML_INLINE ReducedExponent<T, V> reduce_exponent(V x) {
  // adding 1.5 * 2^kFractionBits rounds to an integer, which then stands in the lowest bits
  constexpr T kRound = kIsFloat<T> ? T(12582912.0) : T(6755399441055744.0);
  // the high part has trailing zeros: n times it is exact
  constexpr T kLog2High = kIsFloat<T> ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T kLog2Low = kIsFloat<T> ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
  const V rounded = x * T(1.44269504088896340736) + kRound;
  const V n = rounded - kRound;
  return {x - n * kLog2High - n * kLog2Low, bits_as<Integers<T>>(rounded) << kFractionBits<T>};
}

// (e^r - 1) for |r| <= log(2) / 2
template <class T, class V>
MTML_INLINE V expm1_polynomial(V r) {
  V q;
  if constexpr (kIsFloat<T>) {
    q = polynomial(r, 0.0001989108046f, 0.001393373072f, 0.008333310845f, 0.0416664642f, 0.1666666668f, 0.5f);
  } else {
    q = polynomial(r, 2.5100472505694996003e-8, 2.7620201591031548792e-7, 2.7557268276905696187e-6,
                   0.000024801521057868205199, 0.00019841269863171556026, 0.0013888888917367080562,
                   0.0083333333333300381973, 0.041666666666623820532, 0.1666666666666666746, 0.50000000000000010314);
  }
  return r + r * r * q;
}

// 2^n, for n of normal numbers
template <class T>
MTML_INLINE Vector<T> power_of_two(Integers<T> n_shifted) {
  return bits_as<Vector<T>>(add_bits<T>(n_shifted, bits_as<Integers<T>>(all<T>(1))));
}

template <class T, class V>
MTML_INLINE V exp_(V x) {
  constexpr T kMax = kIsFloat<T> ? T(88.72283) : T(709.782712893384);     // log of the largest number
  constexpr T kMin = kIsFloat<T> ? T(-87.33654) : T(-708.3964185322641);  // log of the smallest normal number
  const auto [r, n_shifted] = reduce_exponent<T>(x);
  // n goes to the exponent's bits by an integer addition: 2^128 times a value below 1 has no other way to be right
  V value = bits_as<V>(add_bits<T>(bits_as<Integers<T>>(T(1) + expm1_polynomial<T>(r)), n_shifted));
  value = x < kMin ? V{} : value;
  return x <= kMax ? value : x + all<T>(static_cast<T>(__builtin_inf()));  // infinity, or NaN
}

// e^x for x <= 0, which cannot overflow
template <class T, class V>
MTML_INLINE V exp_of_negative(V x) {
  constexpr T kMin = kIsFloat<T> ? T(-87.33654) : T(-708.3964185322641);
  const auto [r, n_shifted] = reduce_exponent<T>(x);
  const V scale = power_of_two<T>(n_shifted);
  return x < kMin ? V{} : scale * expm1_polynomial<T>(r) + scale;
}

// e^x and e^x - 1 for x <= 0, the latter without cancellation
template <class V>
struct Exponential {
  V value, minus_one;
};
template <class T, class V>
MTML_INLINE Exponential<V> exp_and_expm1_of_negative(V x) {
  constexpr T kMin = kIsFloat<T> ? T(-20) : T(-40);  // -1 below
  const auto [r, n_shifted] = reduce_exponent<T>(x < kMin ? all<T>(kMin) : x);
  const V scale = power_of_two<T>(n_shifted), p = expm1_polynomial<T>(r);
  return {scale * p + scale, scale * p + (scale - T(1))};
}
template <class T, class V>
MTML_INLINE V expm1_of_negative(V x) {
  return exp_and_expm1_of_negative<T>(x).minus_one;
}

template <class T, class V>
MTML_INLINE V tanh_(V x) {
  const Exponential<V> e = exp_and_expm1_of_negative<T>(T(-2) * magnitude<T>(x));
  // (1 - e) / (1 + e) near zero, 1 - 2 e / (1 + e) where e is small: what is rounded is small in both
  const auto is_small = e.value < T(0.3);
  const V ratio = (is_small ? T(2) * e.value : T(0) - e.minus_one) / (T(1) + e.value);
  return with_sign_of<T>(is_small ? T(1) - ratio : ratio, x);
}

template <class T, class V>
MTML_INLINE V sigmoid_(V x) {
  return T(1) / (T(1) + exp_<T>(-x));
}

// sigmoid(x) and its derivative; rest = 1 - value and slope = value * rest are no differences of close numbers
template <class V>
struct Sigmoid {
  V value, rest, slope;
};
template <class T, class V>
MTML_INLINE Sigmoid<V> sigmoid_and_slope(V x) {
  const V e = exp_<T>(-x);
  const V value = T(1) / (T(1) + e);
  const V rest = x < V{} ? T(1) - value : e * value;
  return {value, rest, value * rest};
}

// 2 atanh(s), s^2 <= 1/9
template <class T, class V>
MTML_INLINE V twice_atanh(V s) {
  const V w = s * s;
  V q;
  if constexpr (kIsFloat<T>) {
    q = polynomial(w, 0.2322432922f, 0.217065758f, 0.2859235799f, 0.3999970633f, 0.6666666732f);
  } else {
    q = polynomial(w, 0.1563057780092285045, 0.07492143795550767301, 0.1084517839488001482, 0.1173427906130319746,
                   0.1333517863144925584, 0.1538454396486054929, 0.1818181989796271438, 0.2222222219823677056,
                   0.2857142857160009929, 0.3999999999999952251, 0.6666666666666666689);
  }
  return T(2) * s + s * (w * q);
}

// log(1 + u), 0 <= u <= 1
template <class T, class V>
MTML_INLINE V log1p_of_unit(V u) {
  return twice_atanh<T>(u / (T(2) + u));
}

// log(1 + e^-|x|): what softplus and the loss of a logit add to their straight parts
template <class T, class V>
MTML_INLINE V log1p_exp_of_negative_magnitude(V x) {
  return log1p_of_unit<T>(exp_of_negative<T>(-magnitude<T>(x)));
}

// log(x) for x >= 1: a sum of exponentials of which the largest is 1
template <class T, class V>
MTML_INLINE V log_from_one(V x) {
  const auto bits = bits_as<Integers<T>>(x);
  const auto one = bits_as<Integers<T>>(all<T>(1));
  // an integer becomes a number by the bits of 2^kFractionBits, whose lowest bit counts one
  constexpr T kOnes = kIsFloat<T> ? T(8388608.0) : T(4503599627370496.0);
  const V exponent =
      bits_as<V>((bits >> kFractionBits<T>) | bits_as<Integers<T>>(all<T>(kOnes))) - (kOnes + kExponentBias<T>);
  const Integers<T> fraction_bits = ~(~Integers<T>{} << kFractionBits<T>);
  const V fraction = bits_as<V>((bits & fraction_bits) | one);
  const V value = exponent * T(0.69314718055994530942) + log1p_of_unit<T>(fraction - T(1));
  return x < all<T>(static_cast<T>(__builtin_inf())) ? value : x;  // infinity, or NaN
}

// The normal distribution at y: its density and the probability below y. The relative error grows with y^2 in the
// tails, as the rounding of y^2 does, but the probability is no difference of larger numbers there.
template <class V>
struct Normal {
  V density, below;
};

template <class T, class V>
MTML_INLINE Normal<V> normal(V y) {
  // the density is zero there already
  constexpr T kFar = 40;
  V a = magnitude<T>(y);
  a = a > kFar ? all<T>(kFar) : a;
  const V e = exp_of_negative<T>(T(-0.5) * a * a);
  // P(below -a) = e^(-a^2 / 2) (1/2 - a q(t) / (4 + a)), t = (a - 4) / (a + 4)
  const V inverse = T(1) / (T(4) + a);
  const V t = T(1) - T(8) * inverse;
  V q;
  if constexpr (kIsFloat<T>) {
    q = polynomial(t, 0.0001495115237f, 0.000221324412f, -0.001532255144f, 0.0005062065298f, 0.01648287566f,
                   -0.07820989023f, 0.2216246316f, -0.4703832857f, 0.8111787181f);
  } else {
    q = polynomial(t, 5.9300497994715090412e-10, -1.8148946479908792958e-9, -1.3530973163989838827e-8,
                   3.0333795444198750336e-10, 9.5539821634338044647e-8, 8.390673971918724296e-8,
                   -4.8975345751093383416e-7, -8.2588632697779572333e-7, 2.4825821338083667568e-6,
                   6.1209314837151978697e-6, -0.000015383718482307404759, -0.000041911891877979525932,
                   0.00013302169523526414846, 0.00024134664722583314333, -0.0015189743640060629258,
                   0.00050385023450533471722, 0.016480340731527917213, -0.078209948945261178148, 0.22162476362064592471,
                   -0.47038327429915002675, 0.81117871739606204863);
  }
  const V tail = e * (T(0.5) - a * inverse * q);
  return {e * T(0.39894228040143267794), y < V{} ? tail : T(1) - tail};
}

}  // namespace mtml::MTML_ISA
