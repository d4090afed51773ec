// The losses of heads on rows of one task, with the gradients of the rows and of the head while both are in the cache.
// A row's loss, and its derivative by z, before the division by what the task's rows count:
//
//     cross_entropy   sum_c t_c (log sum exp z - z_c)     s p - t     p = softmax(z),  s = sum_c t_c
//     mse             sum_c (z - y)^2                     2 (z - y)
//     bce             sum_c [ softplus(z) - y z ]         sigmoid(z) - y
//     huber           sum_c d^2 / 2 where |d| < delta, else delta (|d| - delta / 2)     d within -delta..delta, d = z -
//     y
//
// For the class y with weights w and smoothing u of C classes, t_c = (1 - u) w_y [c = y] + u w_c / C.
#pragma once

#include "core/heads.h"
#include "core/losses.h"

namespace mtml::MTML_ISA {

// What all rows of a task share: the smoothed part of t, its sum, and which columns exist.
template <class T>
struct ClassTargets {
  const T* smooth;  // u w_c / C  [padded(C)], or null where u is 0
  T smooth_sum;
  Columns<T> has;

  ClassTargets(const HeadTargets<T>& targets, int64_t C, T* memory) : smooth(nullptr), smooth_sum(0), has(C, nullptr) {
    if (targets.label_smoothing == 0) return;
    const double each = targets.label_smoothing / static_cast<double>(C);
    double total = 0;
    for (int64_t c = 0; c < padded<T>(C); ++c) {
      memory[c] = c < C ? static_cast<T>(targets.class_weights ? each * targets.class_weights[c] : each) : 0;
      total += memory[c];
    }
    smooth = memory;
    smooth_sum = static_cast<T>(total);
  }
};

// The class of a row and its part (1 - u) w_y of t; a row that takes no part has the class -1.
template <class T>
struct RowTarget {
  int64_t label;
  T part;

  MTML_INLINE RowTarget(const HeadTargets<T>& targets, int64_t row, int64_t C) : label(-1), part(0) {
    const int64_t given = targets.labels[row];
    if (given == targets.ignore_index || given < 0 || given >= C) return;
    if (targets.row_mask && !targets.row_mask[row]) return;
    label = given;
    const T weight = targets.class_weights ? targets.class_weights[label] : T(1);
    part = targets.label_smoothing == 0 ? weight : static_cast<T>(1 - targets.label_smoothing) * weight;
  }
};

// Rows of one vector: as many rows as there are lanes change places with the columns, so that a lane is a row.
template <class T>
double short_cross_entropy(const HeadTargets<T>& targets, const ClassTargets<T>& shared, int64_t row, int64_t n,
                           int64_t C, T* z, T scale) {
  using V = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  double loss = 0;
  for (int64_t first = 0; first < n; first += L, z += L * L) {
    const int64_t rows = first + L < n ? L : n - first;
    V columns[L], label = all<T>(T(-1)), part{};
    unroll<L>([&](auto r) { columns[r] = load<V>(z + (r < rows ? r : 0) * L); });
    transpose_lanes<T>(columns);
    for (int64_t r = 0; r < rows; ++r) {
      const RowTarget<T> target(targets, row + first + r, C);
      label[r] = static_cast<T>(target.label);
      part[r] = target.part;
    }

    V top = all<T>(static_cast<T>(-__builtin_inf())), at_label{};
    for (int64_t c = 0; c < C; ++c) {
      top = columns[c] > top ? columns[c] : top;
      at_label = label == static_cast<T>(c) ? columns[c] : at_label;
    }
    V sum{}, below{};
    for (int64_t c = 0; c < C; ++c) {
      const V difference = columns[c] - top;
      if (shared.smooth) below += shared.smooth[c] * difference;
      columns[c] = exp_of_negative<T>(difference);
      sum += columns[c];
    }
    const V log_sum = log_from_one<T>(sum), takes_part = label >= V{} ? all<T>(1) : V{};
    V value = part * (log_sum + (top - at_label));
    if (shared.smooth) value += shared.smooth_sum * log_sum - below;
    T losses[L];
    store(losses, takes_part > V{} ? value : V{});
    for (int64_t r = 0; r < rows; ++r) loss += losses[r];

    const V share = (part + shared.smooth_sum) / sum;
    for (int64_t c = 0; c < L; ++c) {
      V slope{};
      if (c < C) {
        // t in one number, rounded as s is: the slope of a single class is zero
        V target = label == static_cast<T>(c) ? part : V{};
        if (shared.smooth) target += shared.smooth[c];
        slope = takes_part > V{} ? scale * (columns[c] * share - target) : V{};
      }
      columns[c] = slope;
    }
    transpose_lanes<T>(columns);
    unroll<L>([&](auto r) {
      if (r < rows) store(z + r * L, columns[r]);
    });
  }
  return loss;
}

template <class T>
double wide_cross_entropy(const HeadTargets<T>& targets, const ClassTargets<T>& shared, int64_t row, int64_t n,
                          int64_t C, int64_t ld, T* z, T scale) {
  using V = Vector<T>;
  const V minus_infinity = all<T>(static_cast<T>(-__builtin_inf()));
  double loss = 0;
  for (int64_t i = 0; i < n; ++i, z += ld) {
    const RowTarget<T> target(targets, row + i, C);
    if (target.label < 0) {
      for (int64_t c = 0; c < ld; c += kLanes<T>) store(z + c, V{});
      continue;
    }
    V top = minus_infinity;
    shared.has.for_each(ld, [&](int64_t c, auto pick) __attribute__((always_inline)) {
      const V x = pick(load<V>(z + c), minus_infinity);
      top = x > top ? x : top;
    });
    top = max_of_lanes<T>(top);
    const T above = top[0] - z[target.label];
    ShortSums<T> sum, below;
    shared.has.for_each(ld, [&](int64_t c, auto pick) __attribute__((always_inline)) {
      const V difference = pick(load<V>(z + c), minus_infinity) - top;
      if (shared.smooth) below.add(pick(load<V>(shared.smooth + c) * difference, V{}));
      // again, as the difference is NaN for a top that is
      const V value = pick(exp_of_negative<T>(difference), V{});
      sum.add(value);
      store(z + c, value);
    });
    const V total = sum.result();
    const T log_sum = log_from_one<T>(total)[0];
    T value = target.part * (log_sum + above);
    if (shared.smooth) value += shared.smooth_sum * log_sum - below.result()[0];
    loss += value;

    const V share = all<T>(target.part + shared.smooth_sum) / total;
    const T at_label = z[target.label] * share[0] - target.part;
    shared.has.for_each(ld, [&](int64_t c, auto pick) __attribute__((always_inline)) {
      V slope = load<V>(z + c) * share;
      if (shared.smooth) slope -= load<V>(shared.smooth + c);
      store(z + c, pick(scale * slope, V{}));
    });
    z[target.label] = scale * (shared.smooth ? at_label - shared.smooth[target.label] : at_label);
  }
  return loss;
}

// The others: each output is on its own. f(z, y) = {value, derivative}
template <class T>
struct OutputSlope {
  Vector<T> value, derivative;
};

template <class T, class F>
MTML_INLINE double loss_of_outputs(const HeadTargets<T>& targets, const Columns<T>& has, int64_t row, int64_t n,
                                   int64_t rows, int64_t C, int64_t ld, T* z, T scale, F f) {
  using V = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  double loss = 0;
  V part{};
  int64_t terms = 0;
  for (int64_t i = row; i < row + n; ++i, z += ld) {
    const bool takes_part = !targets.row_mask || targets.row_mask[i];
    has.for_each(ld, [&](int64_t c, auto pick) __attribute__((always_inline)) {
      const int64_t at = i * C + c, columns = C - c;
      // behind the row stand the next rows' targets: only at the end must the rest be loaded with care
      const V y = columns <= 0         ? V{}
                  : at + L <= rows * C ? load<V>(targets.targets + at)
                                       : load_first(targets.targets + at, columns < L ? columns : L);
      Integers<T> counts = takes_part ? ~Integers<T>{} : Integers<T>{};
      if (targets.output_mask) {
        for (int64_t l = 0; l < L && l < columns; ++l) counts[l] = targets.output_mask[at + l] ? -1 : 0;
      }
      const OutputSlope<T> output = f(load<V>(z + c), y);
      part += pick(counts ? output.value : V{}, V{});
      store(z + c, pick(counts ? scale * output.derivative : V{}, V{}));
      if (++terms % kShortSum == 0) {
        loss += row_sum<T>(part)[0];
        part = V{};
      }
    });
  }
  return loss + row_sum<T>(part)[0];
}

// The sum of the losses of the n rows from `row` on; z [n, ld] becomes the derivative of `scale` times it.
template <class T>
double loss_of_rows(const HeadTargets<T>& targets, const ClassTargets<T>& shared, int64_t row, int64_t n, int64_t rows,
                    int64_t C, int64_t ld, T* z, T scale) {
  using V = Vector<T>;
  const auto of_outputs = [&](auto f) {
    return loss_of_outputs(targets, shared.has, row, n, rows, C, ld, z, scale, f);
  };
  switch (targets.loss) {
    case HeadLoss::kMse:
      return of_outputs([](V z, V y) __attribute__((always_inline)) {
        const V difference = z - y;
        return OutputSlope<T>{difference * difference, T(2) * difference};
      });
    case HeadLoss::kHuber: {
      const T delta = static_cast<T>(targets.delta);
      return of_outputs([delta](V z, V y) __attribute__((always_inline)) {
        const V difference = z - y, size = magnitude<T>(difference);
        const V bounded = difference > delta ? all<T>(delta) : difference < -delta ? all<T>(-delta) : difference;
        const V square = T(0.5) * difference * difference, line = delta * (size - T(0.5) * delta);
        return OutputSlope<T>{size < delta ? square : line, bounded};
      });
    }
    case HeadLoss::kBce:
      return of_outputs([](V z, V y) __attribute__((always_inline)) {
        const V e = exp_of_negative<T>(-magnitude<T>(z));
        const V p = (z < V{} ? e : all<T>(1)) / (T(1) + e);
        // in torch's order, which decides what infinities give
        return OutputSlope<T>{(T(1) - y) * z - ((z < V{} ? z : V{}) - log1p_of_unit<T>(e)), p - y};
      });
    case HeadLoss::kCrossEntropy:
      break;
  }
  return ld == kLanes<T> ? short_cross_entropy(targets, shared, row, n, C, z, scale)
                         : wide_cross_entropy(targets, shared, row, n, C, ld, z, scale);
}

template <class T>
double heads_loss(const HeadCall<T>& call, const HeadTargets<T>& targets, double scale, const HeadTensors<T>& gradient,
                  T* memory) {
  Scratch<T> scratch(memory);
  HeadPass<T> pass(call, scratch);
  pass.set(call, gradient, /*outputs=*/true);
  const ClassTargets<T> shared(targets, call.outputs, scratch.take(pass.ld_z));
  double loss = 0;
  pass.for_each_block(call, [&](int64_t n, int64_t row, const T* x) {
    pass.forward_hidden(n, x);
    pass.forward_outputs(n, x, pass.z);
    loss += loss_of_rows(targets, shared, row, n, call.rows, pass.C, pass.ld_z, pass.z, static_cast<T>(scale));
    if (pass.wants_any()) pass.backward(n, row, x, pass.z, pass.ld_z);
  });
  return loss;
}

}  // namespace mtml::MTML_ISA
