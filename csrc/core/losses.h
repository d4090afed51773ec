// The loss of one task: a mean over its N rows and, for mse and bce, over its outputs. A row has C outputs in ld >= C
// columns, ld a multiple of kLanes<T>; `mask` [C] tells which of them the task has (null: all). Columns that do not
// exist are read but never counted, whatever they hold.
//
//     cross_entropy  p = softmax(z)   d = (p - onehot) / N               Rd = (p * Rz - p <p, Rz>) / N
//     mse            p unused         d = 2 (z - target) / (N count)     Rd = 2 Rz / (N count)
//     bce            p = sigmoid(z)   d = (p - target) / (N count)       Rd = p (1 - p) Rz / (N count)
#pragma once

#include "core/lanes.h"
#include "core/mlp_adapt_args.h"
#include "core/vector_math.h"

namespace mtml::MTML_ISA {

// Which of C columns exist, a vector of them at a time.
template <class T>
struct Columns {
  static constexpr int64_t kKept = 64;

  const bool* mask;
  int64_t full;             // vectors that lie within C
  int64_t count;            // columns that exist
  Integers<T> rest;         // of the vector behind them
  Integers<T> kept[kKept];  // of the first ones, where there is a mask

  Columns(int64_t C, const bool* mask) : mask(mask), full(C / kLanes<T>), count(C), rest{} {
    for (int64_t l = 0; l < C % kLanes<T>; ++l) rest[l] = !mask || mask[full * kLanes<T> + l] ? -1 : 0;
    if (!mask) return;
    count = 0;
    for (int64_t c = 0; c < C; ++c) count += mask[c];
    for (int64_t v = 0; v < full && v < kKept; ++v) kept[v] = from_mask(v);
  }

  // all bits of an element set where its column exists; v >= full where there is no mask
  MTML_INLINE Integers<T> operator[](int64_t v) const {
    if (v >= full) return v == full ? rest : Integers<T>{};
    return v < kKept ? kept[v] : from_mask(v);
  }

  Integers<T> from_mask(int64_t v) const {
    Integers<T> exists{};
    for (int64_t l = 0; l < kLanes<T>; ++l) exists[l] = mask[v * kLanes<T> + l] ? -1 : 0;
    return exists;
  }

  // f(column, pick) over the vectors of a row: pick(x, y) is x where the column exists, else y.
  template <class F>
  MTML_INLINE void for_each(int64_t ld, F f) const {
    using V = Vector<T>;
    int64_t v = 0;
    if (!mask) {
      for (; v < full; ++v) f(v * kLanes<T>, [](V x, V) __attribute__((always_inline)) { return x; });
    }
    for (; v < ld / kLanes<T>; ++v) {
      const Integers<T> exists = (*this)[v];
      f(v * kLanes<T>, [&](V x, V y) __attribute__((always_inline)) { return exists ? x : y; });
    }
  }
};

// every lane changes places with the one at a distance of a power of two
template <int Distance>
struct SwapLanes {
  static constexpr int at(int lane) { return lane ^ Distance; }
};

// the lanes combined by f, in every lane
template <class T, int Distance = 1, class V, class F>
MTML_INLINE V reduce_lanes(V x, F f) {
  if constexpr (Distance < kLanes<T>) {
    return reduce_lanes<T, 2 * Distance>(f(x, shuffle<T, SwapLanes<Distance>>(x, x)), f);
  } else {
    return x;
  }
}
template <class T>
MTML_INLINE Vector<T> max_of_lanes(Vector<T> x) {
  return reduce_lanes<T>(x, [](auto a, auto b) { return a > b ? a : b; });
}
template <class T>
MTML_INLINE Vector<T> row_sum(Vector<T> x) {
  return reduce_lanes<T>(x, [](auto a, auto b) { return a + b; });
}

// a sum over vectors that adds at most kShortSum of them before they go into the total
template <class T>
struct ShortSums {
  Vector<T> total{}, part{};
  int64_t terms = 0;
  MTML_INLINE void add(Vector<T> x) {
    part += x;
    if (++terms % kShortSum == 0) {
      total += part;
      part = Vector<T>{};
    }
  }
  MTML_INLINE Vector<T> result() const { return row_sum<T>(total + part); }
};

// Rows of one vector: as many rows as there are lanes change places with the columns, so that a lane is a row.
template <class T>
double short_cross_entropy_forward(int64_t N, const T* z, const int64_t* labels, int64_t C, const bool* mask, T* p,
                                   T* d) {
  using V = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  const V infinity = all<T>(static_cast<T>(__builtin_inf()));
  const T mean = T(1) / static_cast<T>(N);
  double loss = 0;
  for (int64_t first = 0; first < N; first += L) {
    const int64_t rows = first + L < N ? L : N - first;
    V columns[L], slopes[L], label{};
    unroll<L>([&](auto r) { columns[r] = load<V>(z + (first + (r < rows ? r : 0)) * L); });
    transpose_lanes<T>(columns);
    for (int64_t r = 0; r < rows; ++r) label[r] = static_cast<T>(labels[first + r]);

    V top = -infinity;
    // NaN where no class is the label's, and infinite where it is absent
    V at_label = all<T>(static_cast<T>(__builtin_nan("")));
    for (int64_t c = 0; c < C; ++c) {
      if (mask && !mask[c]) columns[c] = -infinity;
      top = columns[c] > top ? columns[c] : top;
      at_label = label == static_cast<T>(c) ? columns[c] : at_label;
    }
    V sum{};
    for (int64_t c = 0; c < C; ++c) {
      if (mask && !mask[c]) continue;
      columns[c] = exp_of_negative<T>(columns[c] - top);
      sum += columns[c];
    }
    T losses[L];
    store(losses, log_from_one<T>(sum) + (top - at_label));
    for (int64_t r = 0; r < rows; ++r) loss += losses[r];
    if (!p && !d) continue;

    const V scale = T(1) / sum;
    for (int64_t c = 0; c < L; ++c) {
      const bool exists = c < C && !(mask && !mask[c]);
      columns[c] = exists ? columns[c] * scale : V{};
      slopes[c] = exists ? mean * (columns[c] - (label == static_cast<T>(c) ? all<T>(1) : V{})) : V{};
    }
    const auto write = [&](V* block, T* to) {
      transpose_lanes<T>(block);
      unroll<L>([&](auto r) {
        if (r < rows) store(to + (first + r) * L, block[r]);
      });
    };
    if (p) write(columns, p);
    if (d) write(slopes, d);
  }
  return loss / static_cast<double>(N);
}

template <class T>
double cross_entropy_forward(int64_t N, int64_t ld, const T* z, const int64_t* labels, int64_t C, const Columns<T>& has,
                             T* p, T* d) {
  using V = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  const V minus_infinity = all<T>(static_cast<T>(-__builtin_inf()));
  const T mean = T(1) / static_cast<T>(N);
  T* const e = d ? d : p;  // where exp(z - top) waits for its sum
  constexpr int64_t kRows = 64;
  // a row's loss is log(sum) + above, its largest output above the label's
  T sums[kRows], above[kRows];
  double loss = 0;
  for (int64_t first = 0; first < N; first += kRows) {
    const int64_t rows = first + kRows < N ? kRows : N - first;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = (first + i) * ld;
      V top = minus_infinity;
      has.for_each(ld, [&](int64_t c, auto pick) __attribute__((always_inline)) {
        const V x = pick(load<V>(z + row + c), minus_infinity);
        top = x > top ? x : top;
      });
      top = max_of_lanes<T>(top);
      ShortSums<T> sum;
      has.for_each(ld, [&](int64_t c, auto pick) __attribute__((always_inline)) {
        const V x = exp_of_negative<T>(pick(load<V>(z + row + c), minus_infinity) - top);
        // again, as the difference is NaN for a top that is
        const V value = pick(x, V{});
        sum.add(value);
        if (e) store(e + row + c, value);
      });
      const V total = sum.result();
      sums[i] = total[0];
      const int64_t label = labels[first + i];
      const bool inside = label >= 0 && label < C;
      const bool exists = inside && (!has.mask || has.mask[label]);
      above[i] = exists   ? top[0] - z[row + label]
                 : inside ? static_cast<T>(__builtin_inf())
                          : static_cast<T>(__builtin_nan(""));
      if (!e) continue;
      const V scale = T(1) / total;
      const T at_label = exists ? e[row + label] * scale[0] : 0;
      has.for_each(ld, [&](int64_t c, auto pick) __attribute__((always_inline)) {
        const V value = pick(load<V>(e + row + c) * scale, V{});
        if (p) store(p + row + c, value);
        if (d) store(d + row + c, mean * value);
      });
      if (d && exists) d[row + label] = mean * (at_label - T(1));
    }
    for (int64_t i = rows; i < (rows + L - 1) / L * L; ++i) sums[i] = 1, above[i] = 0;
    for (int64_t i = 0; i < rows; i += L) store(sums + i, log_from_one<T>(load<V>(sums + i)) + load<V>(above + i));
    for (int64_t i = 0; i < rows; ++i) loss += sums[i];
  }
  return loss / static_cast<double>(N);
}

// mse and bce: each output is on its own. f(z, target) = {value, derivative, p}
template <class T>
struct OutputLoss {
  Vector<T> value, derivative, p;
};

template <class T, class F>
MTML_INLINE double output_loss_forward(int64_t N, int64_t C, int64_t ld, const T* z, const T* targets,
                                       const Columns<T>& has, T* p, T* d, F f) {
  using V = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  const double outputs = static_cast<double>(N * (has.count ? has.count : 1));
  const T mean = static_cast<T>(1 / outputs);
  double loss = 0;
  V part{};
  int64_t terms = 0;
  for (int64_t i = 0; i < N; ++i) {
    has.for_each(ld, [&](int64_t c, auto pick) __attribute__((always_inline)) {
      const int64_t at = i * ld + c, target = i * C + c, columns = C - c;
      // behind the row stand the next rows' targets: only at the end must the rest be loaded with care
      const V t = columns <= 0          ? V{}
                  : target + L <= N * C ? load<V>(targets + target)
                                        : load_first(targets + target, columns < L ? columns : L);
      const OutputLoss<T> output = f(load<V>(z + at), t);
      part += pick(output.value, V{});
      if (p) store(p + at, pick(output.p, V{}));
      if (d) store(d + at, pick(mean * output.derivative, V{}));
      if (++terms % kShortSum == 0) {
        loss += row_sum<T>(part)[0];
        part = V{};
      }
    });
  }
  return (loss + row_sum<T>(part)[0]) / outputs;
}

// The task's loss; d = dL/dz [N, ld] and p [N, ld] are written unless null, with zeros in columns that do not exist.
// targets [N, C]. A label outside of 0 <= label < C makes the loss NaN.
template <class T>
T loss_forward(Loss loss, int64_t N, int64_t C, int64_t ld, const T* z, const int64_t* labels, const T* targets,
               const bool* mask, T* p, T* d) {
  using V = Vector<T>;
  if (N == 0) return 0;
  if (loss == Loss::kCrossEntropy) {
    if (ld == kLanes<T>) return static_cast<T>(short_cross_entropy_forward(N, z, labels, C, mask, p, d));
    return static_cast<T>(cross_entropy_forward(N, ld, z, labels, C, Columns<T>(C, mask), p, d));
  }
  const Columns<T> has(C, mask);
  if (loss == Loss::kMse) {
    return static_cast<T>(output_loss_forward(N, C, ld, z, targets, has, static_cast<T*>(nullptr), d, [](V z, V t) {
      const V difference = z - t;
      return OutputLoss<T>{difference * difference, T(2) * difference, V{}};
    }));
  }
  return static_cast<T>(output_loss_forward(N, C, ld, z, targets, has, p, d, [](V z, V t) {
    const V e = exp_of_negative<T>(-magnitude<T>(z));
    const V p = (z < V{} ? e : all<T>(1)) / (T(1) + e);
    // in torch's order, which decides what infinities give
    return OutputLoss<T>{(T(1) - t) * z - ((z < V{} ? z : V{}) - log1p_of_unit<T>(e)), p - t, p};
  }));
}

// Rd [N, ld] from Rz and loss_forward's p (not read for mse), with zeros in columns that do not exist.
template <class T>
void loss_tangent(Loss loss, int64_t N, int64_t C, int64_t ld, const T* p, const T* Rz, const bool* mask, T* Rd) {
  using V = Vector<T>;
  const Columns<T> has(C, mask);
  const int64_t terms = loss == Loss::kCrossEntropy ? N : N * (has.count ? has.count : 1);
  const T mean = static_cast<T>(1.0 / static_cast<double>(terms));
  // f(at): Rd / mean of the vector at `at`
  const auto write = [&](int64_t row, auto f) __attribute__((always_inline)) {
    has.for_each(ld, [&](int64_t c, auto pick)
                         __attribute__((always_inline)) { store(Rd + row + c, pick(mean * f(row + c), V{})); });
  };
  switch (loss) {
    case Loss::kMse:
      for (int64_t row = 0; row < N * ld; row += ld) {
        write(row, [&](int64_t at) __attribute__((always_inline)) { return T(2) * load<V>(Rz + at); });
      }
      return;
    case Loss::kBce:
      for (int64_t row = 0; row < N * ld; row += ld) {
        write(row, [&](int64_t at) __attribute__((always_inline)) {
          const V q = load<V>(p + at);
          return q * (T(1) - q) * load<V>(Rz + at);
        });
      }
      return;
    case Loss::kCrossEntropy:
      for (int64_t row = 0; row < N * ld; row += ld) {
        ShortSums<T> sum;
        has.for_each(ld, [&](int64_t c, auto pick) __attribute__((always_inline)) {
          sum.add(pick(load<V>(p + row + c) * load<V>(Rz + row + c), V{}));
        });
        const V dot = sum.result();
        write(row,
              [&](int64_t at) __attribute__((always_inline)) { return load<V>(p + at) * (load<V>(Rz + at) - dot); });
      }
  }
}

}  // namespace mtml::MTML_ISA
