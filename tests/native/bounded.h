// Numbers with a bound, for the plain loops that a result is held against: what a formula gives, computed wider than in
// T, and how far a correct program in T may be from it, in whatever order it adds and whether or not it fuses. The
// bound follows from the sizes and the number of the terms by the rules of rounding: |rounded - exact| <= u |exact|,
// and n u sum |terms| for a sum of n.
#pragma once

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <limits>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "fuzz.h"

namespace mtml {
namespace {

template <class T>
struct Bounded {
  using Wide = std::conditional_t<sizeof(T) == sizeof(float), double, long double>;
  // of the program and, as it may be no wider, of this one
  static constexpr Wide kUnit =
      (static_cast<Wide>(std::numeric_limits<T>::epsilon()) + static_cast<Wide>(std::numeric_limits<Wide>::epsilon())) /
      2;
  // what is smaller may become zero
  static constexpr Wide kSmallest = std::numeric_limits<T>::min();

  Wide value = 0, error = 0;

  Bounded() = default;
  // exact
  Bounded(T x) : value(x) {}  // NOLINT
  Bounded(Wide x, Wide e) : value(x), error(e) {}

  // with the error of so many roundings of a number of the result's size besides `e`
  static Bounded rounded(Wide x, Wide e = 0, Wide roundings = 1) {
    return {x, e + roundings * kUnit * (std::abs(x) + e) + kSmallest};
  }

  Bounded operator-() const { return {-value, error}; }
  friend Bounded operator+(Bounded a, Bounded b) { return rounded(a.value + b.value, a.error + b.error); }
  friend Bounded operator-(Bounded a, Bounded b) { return a + -b; }
  friend Bounded operator*(Bounded a, Bounded b) {
    return rounded(a.value * b.value, std::abs(a.value) * b.error + std::abs(b.value) * a.error + a.error * b.error);
  }
  friend Bounded operator/(Bounded a, Bounded b) {
    const Wide quotient = a.value / b.value;
    return rounded(quotient, (std::abs(quotient) * b.error + a.error) / (std::abs(b.value) - b.error));
  }
};

// its rounding is one unit; those of the others below are three, as in core/vector_math.h
template <class T>
Bounded<T> square_root(Bounded<T> x) {
  const auto root = std::sqrt(x.value);
  return Bounded<T>::rounded(root, root > 0 ? std::min(std::sqrt(x.error), x.error / root) : std::sqrt(x.error));
}
constexpr int kFunctionRoundings = 6;  // halves of a unit
template <class T>
Bounded<T> exponential(Bounded<T> x) {
  const auto e = std::exp(x.value);
  return Bounded<T>::rounded(e, e * std::expm1(x.error), kFunctionRoundings);
}
template <class T>
Bounded<T> logarithm(Bounded<T> x) {
  return Bounded<T>::rounded(std::log(x.value), x.error / (x.value - x.error), kFunctionRoundings);
}

// f of a number that is not known exactly, where neither f nor the first two of its derivatives are above 4 between its
// kinks and steps; to compute it takes so many roundings of numbers that are at most as large as 1 and as the result
template <class T, class F>
Bounded<T> apply(F f, Bounded<T> x, int roundings) {
  const auto at = f(x.value);
  const auto around = std::max(std::abs(f(x.value + x.error) - at), std::abs(f(x.value - x.error) - at));
  using Wide = typename Bounded<T>::Wide;
  const Wide rounding = roundings * Bounded<T>::kUnit * std::max<Wide>(1, std::abs(at));
  return {at, around + 4 * x.error * x.error + rounding};
}

// x below `limit` ? a : b, where both may be right
template <class T>
Bounded<T> below(Bounded<T> x, Bounded<T> limit, Bounded<T> a, Bounded<T> b) {
  Bounded<T> result = x.value < limit.value ? a : b;
  if (std::abs(x.value - limit.value) <= x.error + limit.error) {
    result.error = std::max(a.error, b.error) + std::abs(a.value - b.value);
  }
  return result;
}

// of any order
template <class T>
class Sum {
 public:
  void add(Bounded<T> term) {
    value_ += term.value;
    error_ += term.error;
    size_ += std::abs(term.value) + term.error;
    ++terms_;
  }
  Bounded<T> result() const {
    const auto units = terms_ * Bounded<T>::kUnit;
    return {value_, error_ + units / (1 - units) * size_};
  }

 private:
  typename Bounded<T>::Wide value_ = 0, error_ = 0, size_ = 0;
  int64_t terms_ = 0;
};

// the results of a call, beside what they should be
template <class T>
void expect_close(const std::vector<T>& results, const std::vector<Bounded<T>>& expected, const std::string& what) {
  if (results.size() != expected.size()) return expect(false, what + ": number of results");
  for (size_t i = 0; i < results.size(); ++i) {
    const auto& [value, bound] = expected[i];
    const auto error = std::abs(static_cast<typename Bounded<T>::Wide>(results[i]) - value);
    // NaN is never within
    if (error <= bound) continue;
    std::ostringstream text;
    text << std::setprecision(9) << what << "[" << i << "] = " << results[i] << " for " << value << " +- " << bound;
    return expect(false, text.str());
  }
}

}  // namespace
}  // namespace mtml
