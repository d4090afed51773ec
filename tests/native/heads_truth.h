// What heads and heads_loss of one task are, by plain loops: the formulas at the top of csrc/core/heads.h and
// csrc/core/heads_loss.h, in the same names.
#pragma once

#include "bounded.h"
#include "heads.h"

namespace mtml {
namespace {

template <class T>
struct Matrix {
  int64_t rows = 0, cols = 0;
  std::vector<Bounded<T>> values;

  Matrix() = default;
  Matrix(int64_t rows, int64_t cols) : rows(rows), cols(cols), values(rows * cols) {}
  // zeros, where there are no values
  Matrix(int64_t rows, int64_t cols, const T* from) : Matrix(rows, cols) {
    for (int64_t i = 0; from && i < rows * cols; ++i) values[i] = from[i];
  }
  Bounded<T>& operator()(int64_t i, int64_t j) { return values[i * cols + j]; }
  const Bounded<T>& operator()(int64_t i, int64_t j) const { return values[i * cols + j]; }
};

// each element is f(i, j)
template <class T, class F>
Matrix<T> elements(int64_t rows, int64_t cols, F f) {
  Matrix<T> result(rows, cols);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) result(i, j) = f(i, j);
  }
  return result;
}

// each element is the sum of what f(i, j, sum) adds
template <class T, class F>
Matrix<T> sums(int64_t rows, int64_t cols, F f) {
  return elements<T>(rows, cols, [&](int64_t i, int64_t j) {
    Sum<T> sum;
    f(i, j, sum);
    return sum.result();
  });
}

// A B, A B^T, A^T B: an element's terms, added to a sum
template <class T>
void add_ab(Sum<T>& sum, const Matrix<T>& a, const Matrix<T>& b, int64_t i, int64_t j) {
  for (int64_t k = 0; k < a.cols; ++k) sum.add(a(i, k) * b(k, j));
}
template <class T>
void add_abt(Sum<T>& sum, const Matrix<T>& a, const Matrix<T>& b, int64_t i, int64_t j) {
  for (int64_t k = 0; k < a.cols; ++k) sum.add(a(i, k) * b(j, k));
}
template <class T>
void add_atb(Sum<T>& sum, const Matrix<T>& a, const Matrix<T>& b, int64_t i, int64_t j) {
  for (int64_t k = 0; k < a.rows; ++k) sum.add(a(k, i) * b(k, j));
}

// An activation and its first two derivatives; at kinks as torch has it.
template <class W>
struct ActivationValues {
  W act, d1, d2;
};

template <class W>
ActivationValues<W> activation_at(Activation activation, W y) {
  const W pi = std::acos(W(-1)), s = 1 / (1 + std::exp(-y));
  switch (activation) {
    case Activation::kIdentity:
      return {y, 1, 0};
    case Activation::kRelu:
      return y > 0 ? ActivationValues<W>{y, 1, 0} : ActivationValues<W>{0, 0, 0};
    case Activation::kLeakyRelu:
      return y > 0 ? ActivationValues<W>{y, 1, 0} : ActivationValues<W>{y / 100, W(1) / 100, 0};
    case Activation::kElu:
      return {y > 0 ? y : std::expm1(y), y > 0 ? 1 : std::exp(y), y < 0 ? std::exp(y) : 0};
    case Activation::kTanh: {
      const W h = std::tanh(y);
      return {h, 1 - h * h, -2 * h * (1 - h * h)};
    }
    case Activation::kSigmoid:
      return {s, s * (1 - s), s * (1 - s) * (1 - 2 * s)};
    case Activation::kSilu:
      return {y * s, s + y * s * (1 - s), s * (1 - s) * (2 + y * (1 - 2 * s))};
    case Activation::kSoftplus:
      if (y > 20) return {y, 1, 0};
      return {std::max<W>(y, 0) + std::log1p(std::exp(-std::abs(y))), s, y >= 20 ? 0 : s * (1 - s)};
    case Activation::kGelu: {
      const W less = std::erfc(-y / std::sqrt(W(2))) / 2, density = std::exp(-y * y / 2) / std::sqrt(2 * pi);
      return {y * less, less + y * density, density * (2 - y * y)};
    }
    case Activation::kGeluTanh: {
      const W scale = std::sqrt(8 / pi), cubic = W(44715) / 1000000;
      const W v = scale * (y + cubic * y * y * y), v1 = scale * (1 + 3 * cubic * y * y), v2 = scale * 6 * cubic * y;
      const W p = 1 / (1 + std::exp(-v)), slope = p * (1 - p);
      return {y * p, p + y * slope * v1, slope * (2 * v1 + y * v2) + y * slope * (1 - 2 * p) * v1 * v1};
    }
  }
  return {};
}

// The head of a task on its rows.
template <class T>
struct HeadTruth {
  using Wide = typename Bounded<T>::Wide;

  int64_t R, D, H, C, I;
  Activation act;
  Matrix<T> x, W, b, V, c;  // b [1, C], c [1, H]
  Matrix<T> a, h, z;        // h is x without a hidden layer

  explicit HeadTruth(const HeadsBatch<T>& one)
      : R(one.rows()),
        D(one.features),
        H(one.hidden),
        C(one.outputs()),
        I(H ? H : D),
        act(one.activation),
        x(R, D, one.in.x),
        W(C, I, one.in.weight),
        b(1, C, one.in.bias),
        V(H, D, one.in.hidden_weight),
        c(1, H, one.in.hidden_bias),
        h(x) {
    if (H) {
      a = sums<T>(R, H, [&](int64_t i, int64_t j, Sum<T>& sum) {
        add_abt(sum, x, V, i, j);
        sum.add(c(0, j));
      });
      h = of_a(&ActivationValues<Wide>::act);
    }
    z = sums<T>(R, C, [&](int64_t i, int64_t j, Sum<T>& sum) {
      add_abt(sum, h, W, i, j);
      sum.add(b(0, j));
    });
  }

  // the activation or a derivative of it at a
  Matrix<T> of_a(Wide ActivationValues<Wide>::* which) const {
    // the longest takes some 16 roundings, of numbers up to 1 or so
    constexpr int kRoundings = 16;
    const auto f = [&](Wide y) { return activation_at(act, y).*which; };
    return elements<T>(R, H, [&](int64_t i, int64_t j) { return apply(f, a(i, j), kRoundings); });
  }

  // what a pass gives for each tensor, in the axes of HeadTensors
  struct Gradients {
    Matrix<T> x, weight, bias, hidden_weight, hidden_bias;
  };

  static Matrix<T> times(const Matrix<T>& a, const Matrix<T>& b) {
    return elements<T>(a.rows, a.cols, [&](int64_t i, int64_t j) { return a(i, j) * b(i, j); });
  }
  static Matrix<T> ab(const Matrix<T>& a, const Matrix<T>& b) {
    return sums<T>(a.rows, b.cols, [&](int64_t i, int64_t j, Sum<T>& sum) { add_ab(sum, a, b, i, j); });
  }
  static Matrix<T> atb(const Matrix<T>& a, const Matrix<T>& b) {
    return sums<T>(a.cols, b.cols, [&](int64_t i, int64_t j, Sum<T>& sum) { add_atb(sum, a, b, i, j); });
  }
  static Matrix<T> columns(const Matrix<T>& a) {
    return sums<T>(1, a.cols, [&](int64_t, int64_t j, Sum<T>& sum) {
      for (int64_t i = 0; i < a.rows; ++i) sum.add(a(i, j));
    });
  }

  Gradients backward(const Matrix<T>& q) const {
    Gradients g{ab(q, W), atb(q, h), columns(q), {}, {}};
    if (!H) return g;
    const Matrix<T> da = times(g.x, of_a(&ActivationValues<Wide>::d1));
    g.x = ab(da, V);
    g.hidden_weight = atb(da, x);
    g.hidden_bias = columns(da);
    return g;
  }

  // cotangents in the axes of `one`; the gradient of q besides
  Gradients double_backward(const Matrix<T>& q, const HeadTensors<const T>& g, Matrix<T>& d_q) const {
    const Matrix<T> gx(R, D, g.x), gW(C, I, g.weight), gb(1, C, g.bias), gV(H, D, g.hidden_weight),
        gc(1, H, g.hidden_bias);
    Matrix<T> h1 = gx;
    Gradients to{ab(q, gW), {}, Matrix<T>(1, C), {}, {}};
    if (H) {
      const Matrix<T> a1 = sums<T>(R, H, [&](int64_t i, int64_t j, Sum<T>& sum) {
        add_abt(sum, gx, V, i, j);
        add_abt(sum, x, gV, i, j);
        sum.add(gc(0, j));
      });
      const Matrix<T> d1 = of_a(&ActivationValues<Wide>::d1), d2 = of_a(&ActivationValues<Wide>::d2);
      const Matrix<T> e = ab(q, W), da = times(d1, e);
      h1 = times(d1, a1);
      const Matrix<T> r = elements<T>(
          R, H, [&](int64_t i, int64_t j) { return d1(i, j) * to.x(i, j) + e(i, j) * d2(i, j) * a1(i, j); });
      to.hidden_weight = sums<T>(H, D, [&](int64_t i, int64_t j, Sum<T>& sum) {
        add_atb(sum, r, x, i, j);
        add_atb(sum, da, gx, i, j);
      });
      to.hidden_bias = columns(r);
      to.x = sums<T>(R, D, [&](int64_t i, int64_t j, Sum<T>& sum) {
        add_ab(sum, r, V, i, j);
        add_ab(sum, da, gV, i, j);
      });
    }
    to.weight = atb(q, h1);
    d_q = sums<T>(R, C, [&](int64_t i, int64_t j, Sum<T>& sum) {
      add_abt(sum, h1, W, i, j);
      add_abt(sum, h, gW, i, j);
      sum.add(gb(0, j));
    });
    return to;
  }

  // The mean loss, and its derivative by z.
  Bounded<T> loss(const HeadsTargets<T>& to, Matrix<T>& q) const {
    q = Matrix<T>(R, C);
    Sum<T> total, count;
    for (int64_t i = 0; i < R; ++i) {
      if (to.row_mask && !to.row_mask[i]) continue;
      if (to.loss(0) == HeadLoss::kCrossEntropy) {
        const int64_t label = to.labels[i];
        if (label == to.ignore_index) continue;
        count.add(to.class_weights ? to.class_weights[label] : T(1));
        total.add(cross_entropy(to, i, label, q));
        continue;
      }
      for (int64_t j = 0; j < C; ++j) {
        if (to.output_mask && !to.output_mask[i * C + j]) continue;
        count.add(T(1));
        total.add(output_loss(to, z(i, j), to.targets[i * C + j], q(i, j)));
      }
    }
    const Bounded<T> n = count.result();
    if (n.value == 0) {
      q = Matrix<T>(R, C);
      return {};
    }
    const Bounded<T> scale = Bounded<T>(1) / n;
    for (Bounded<T>& slope : q.values) slope = slope * scale;
    return total.result() * scale;
  }

 private:
  Bounded<T> cross_entropy(const HeadsTargets<T>& to, int64_t i, int64_t label, Matrix<T>& q) const {
    Bounded<T> top = z(i, 0);
    for (int64_t j = 1; j < C; ++j) top = below(top, z(i, j), z(i, j), top);
    Sum<T> sum, smooth_sum, below_top;
    std::vector<Bounded<T>> target(C), power(C);
    const auto weight = [&](int64_t j) { return to.class_weights ? Bounded<T>(to.class_weights[j]) : T(1); };
    for (int64_t j = 0; j < C; ++j) {
      const Bounded<T> difference = z(i, j) - top;
      power[j] = exponential(difference);
      sum.add(power[j]);
      if (to.label_smoothing == 0) continue;
      target[j] = Bounded<T>::rounded(Wide(to.label_smoothing) / C) * weight(j);
      smooth_sum.add(target[j]);
      below_top.add(target[j] * difference);
    }
    const Bounded<T> part = Bounded<T>::rounded(1 - Wide(to.label_smoothing)) * weight(label);
    target[label] = target[label] + part;
    const Bounded<T> all = part + smooth_sum.result(), log_sum = logarithm(sum.result());
    for (int64_t j = 0; j < C; ++j) q(i, j) = power[j] / sum.result() * all - target[j];
    return part * (log_sum + (top - z(i, label))) + smooth_sum.result() * log_sum - below_top.result();
  }

  // of one output, with its derivative
  static Bounded<T> output_loss(const HeadsTargets<T>& to, Bounded<T> z, Bounded<T> y, Bounded<T>& slope) {
    const Bounded<T> difference = z - y;
    if (to.loss(0) == HeadLoss::kMse) {
      slope = difference + difference;
      return difference * difference;
    }
    if (to.loss(0) == HeadLoss::kHuber) {
      const Bounded<T> delta = Bounded<T>::rounded(to.delta), half = T(0.5);
      const Bounded<T> size(std::abs(difference.value), difference.error);
      slope = below(size, delta, difference, difference.value < 0 ? -delta : delta);
      return below(size, delta, half * difference * difference, delta * (size - half * delta));
    }
    const auto sigmoid = [](Wide z) { return 1 / (1 + std::exp(-z)); };
    const auto soft = [](Wide z) { return std::log1p(std::exp(-std::abs(z))); };
    slope = apply(sigmoid, z, kFunctionRoundings + 3) - y;
    const Bounded<T> least(std::min<Wide>(z.value, 0), z.error);
    return (Bounded<T>(1) - y) * z - least + apply(soft, z, kFunctionRoundings + 3);
  }
};

}  // namespace
}  // namespace mtml
