// What the threads of a block do together in mlp_adapt: small matrix products, sums over rows, activations, losses.
// None of it waits for others: barriers stand where these are called. A sum runs in an order of its own, so an
// element's bits depend neither on the other rows nor on where arrays lie.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block.h"
#include "cuda/element_math.h"
#include "cuda/mlp_network.h"
// after element_math.h, which brings what they need
#include "core/activation_formulas.h"
#include "core/batch_norm.h"

namespace mtml::cuda {

// rows that share what a thread reads of the other factor: five-way tasks have as many, or a multiple
constexpr int kTileRows = 5;
// terms of a product that are added before they go into a total
constexpr int kLongSum = 64;

// Four numbers in one read, from where there are as many; by `quads` they are aligned.
template <class T>
struct alignas(16) Quad {
  T v[4];
};
template <class T>
__device__ __forceinline__ Quad<T> load_quad(const T* from, bool quads) {
  if (quads) return *reinterpret_cast<const Quad<T>*>(from);
  return {{from[0], from[1], from[2], from[3]}};
}

// A product's factors: a(row, i) = a[row * lda + i], b(i, column) = b[i * ldb + column * b_column].
template <class T>
struct Factors {
  const T* a;
  int64_t lda;
  bool quads;
  const T* b;
  int64_t ldb, b_column;
  int terms;  // i < terms
};

template <class T>
__device__ __forceinline__ void add_products(const Factors<T>& f, int64_t row, int64_t rows, int64_t column,
                                             T (&sum)[kTileRows]) {
  const T* a[kTileRows];
  // rows behind the last are the last again, and nobody takes them
  unroll<kTileRows>([&](auto r) { a[r] = f.a + (row + r < rows ? row + r : rows - 1) * f.lda; });
  const T* b = f.b + column * f.b_column;
  int i = 0;
  while (i < f.terms) {
    T part[kTileRows] = {};
    const int end = i + kLongSum < f.terms ? i + kLongSum : f.terms;
    for (; i + 4 <= end; i += 4) {
      const T b0 = b[0], b1 = b[f.ldb], b2 = b[2 * f.ldb], b3 = b[3 * f.ldb];
      b += 4 * f.ldb;
      unroll<kTileRows>([&](auto r) {
        const Quad<T> x = load_quad(a[r] + i, f.quads);
        part[r] += x.v[0] * b0;
        part[r] += x.v[1] * b1;
        part[r] += x.v[2] * b2;
        part[r] += x.v[3] * b3;
      });
    }
    for (; i < end; ++i, b += f.ldb) unroll<kTileRows>([&](auto r) { part[r] += a[r][i] * *b; });
    unroll<kTileRows>([&](auto r) { sum[r] += part[r]; });
  }
}

// f(row, column, element) for the elements [rows, columns] of first plus second
template <class T, class F>
__device__ __forceinline__ void products(int64_t rows, int columns, const Factors<T>& first, const Factors<T>& second,
                                         const F& f) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows * columns;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
    const int column = static_cast<int>(tile % columns);
    const int64_t row = tile / columns * kTileRows;
    T sum[kTileRows] = {};
    add_products(first, row, rows, column, sum);
    add_products(second, row, rows, column, sum);
    unroll<kTileRows>([&](auto r) {
      if (row + r < rows) f(row + r, column, sum[r]);
    });
  }
}

// The sums over rows of a(row, o) b(row, i), two arrays [rows, lda] and [rows, ldb]; none where rows is 0.
template <class T>
struct Outer {
  const T* a;
  int64_t lda;
  const T* b;
  int64_t ldb;
  int64_t rows;
};

template <class T>
__device__ __forceinline__ void add_outer(const Outer<T>& f, int o, int count, int i, T (&sum)[4]) {
  const T *a = f.a + o, *b = f.b + i;
  int64_t row = 0;
  while (row < f.rows) {
    T part[4] = {};
    const int64_t end = row + kLongSum < f.rows ? row + kLongSum : f.rows;
    if (count == 4) {
      for (; row < end; ++row, a += f.lda, b += f.ldb) {
        const Quad<T> x = load_quad(a, true);
        unroll<4>([&](auto j) { part[j] += x.v[j] * *b; });
      }
    } else {
      for (; row < end; ++row, a += f.lda, b += f.ldb)
        unroll<4>([&](auto j) { part[j] += a[j < count ? static_cast<int>(j) : 0] * *b; });
    }
    unroll<4>([&](auto j) { sum[j] += part[j]; });
  }
}

// f(o, i, element) for the elements [out, in] of first plus second; lda is a multiple of four
template <class T, class F>
__device__ __forceinline__ void outer_products(int out, int in, const Outer<T>& first, const Outer<T>& second,
                                               const F& f) {
  const int64_t tiles = static_cast<int64_t>((out + 3) / 4) * in;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
    const int i = static_cast<int>(tile % in), o = static_cast<int>(tile / in) * 4;
    const int count = out - o < 4 ? out - o : 4;
    T sum[4] = {};
    add_outer(first, o, count, i, sum);
    add_outer(second, o, count, i, sum);
    unroll<4>([&](auto j) {
      if (j < count) f(o + j, i, sum[j]);
    });
  }
}

// the sum over the rows of a column
template <class T>
__device__ __forceinline__ T column_sum(const T* x, int64_t ld, int64_t rows) {
  T total = 0;
  for (int64_t row = 0; row < rows;) {
    T part = 0;
    const int64_t end = row + kShortSum < rows ? row + kShortSum : rows;
    for (; row < end; ++row) part += x[row * ld];
    total += part;
  }
  return total;
}

// Activations: relu here, the others by a call, which keeps their code in one place.
enum class Order { kValue, kFirst, kSecond };

template <class T>
__device__ __attribute__((noinline)) T smooth_activation(Activation activation, Order order, T y, T h) {
  return with_activation(activation, [&](auto named) -> T {
    using Act = ActivationOf<decltype(named)::kValue, T>;
    if (order == Order::kValue) return Act::act(y);
    if (order == Order::kFirst) return Act::d1(y, h);
    if constexpr (Act::kLinear) {
      return T(0);
    } else {
      return Act::d2(y, h);
    }
  });
}

template <class T>
__device__ __forceinline__ T activate(Activation activation, T y) {
  if (activation == Activation::kRelu) return ActivationOf<Activation::kRelu, T>::act(y);
  return smooth_activation(activation, Order::kValue, y, y);
}

// e act'(y); where the activation selects, an infinite e is not multiplied by zero
template <class T>
__device__ __forceinline__ T times_slope(Activation activation, T e, T y, T h) {
  if (activation == Activation::kRelu) return ActivationOf<Activation::kRelu, T>::times_d1(e, y, h);
  return e * smooth_activation(activation, Order::kFirst, y, h);
}

// Re act'(y) + e act''(y) Ry
template <class T>
__device__ __forceinline__ T slope_tangent(Activation activation, T Re, T e, T Ry, T y, T h) {
  return Re * smooth_activation(activation, Order::kFirst, y, h) +
         e * smooth_activation(activation, Order::kSecond, y, h) * Ry;
}

// One row of C outputs, by one thread, or by a warp where there are many.
template <class T>
struct LossRow {
  Loss loss;
  int outputs;
  const bool* mask;  // null: all outputs exist
  int lane, lanes;

  __device__ bool has(int c) const { return !mask || mask[c]; }

  __device__ T largest(T x) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const T other = __shfl_xor_sync(~0u, x, distance);
      x = other > x ? other : x;
    }
    return x;
  }
  __device__ T total(T x) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
  }

  // The loss, and the derivatives by the outputs z times `scale`, where d is not null; p, where not null, is what the
  // tangent needs, and may be z.
  __device__ T forward(const T* z, int64_t label, const T* targets, T scale, T* p, T* d) const {
    if (loss == Loss::kCrossEntropy) return cross_entropy(z, label, scale, p, d);
    T sum = 0;
    for (int c = lane; c < outputs; c += lanes) {
      const bool exists = has(c);
      const T x = z[c], t = exists ? targets[c] : T(0);
      T value, slope, at = 0;
      if (loss == Loss::kMse) {
        value = (x - t) * (x - t);
        slope = T(2) * (x - t);
      } else {
        const T e = exp(-fabs(x));
        at = (x < T(0) ? e : T(1)) / (T(1) + e);
        // in torch's order, which decides what infinities give
        value = (T(1) - t) * x - ((x < T(0) ? x : T(0)) - log1p(e));
        slope = at - t;
      }
      if (exists) sum += value;
      if (p) p[c] = exists ? at : T(0);
      if (d) d[c] = exists ? scale * slope : T(0);
    }
    return total(sum);
  }

  __device__ T cross_entropy(const T* z, int64_t label, T scale, T* p, T* d) const {
    T top = -T(INFINITY), sum = 0, at_label = 0;
    for (int c = lane; c < outputs; c += lanes)
      if (has(c) && z[c] > top) top = z[c];
    top = largest(top);
    for (int c = lane; c < outputs; c += lanes) {
      if (has(c)) sum += exp(z[c] - top);
      if (c == label) at_label = z[c];
    }
    sum = total(sum);
    at_label = total(at_label);
    const bool inside = label >= 0 && label < outputs;
    // NaN where no class is the label's, and infinite where it is absent
    if (!inside) at_label = T(NAN);
    if (inside && !has(static_cast<int>(label))) at_label = -T(INFINITY);
    const T broken = inside ? T(0) : T(NAN);
    for (int c = lane; c < outputs; c += lanes) {
      const bool exists = has(c);
      const T value = exists ? exp(z[c] - top) / sum + broken : T(0);
      if (p) p[c] = value;
      if (d) d[c] = exists ? scale * (value - (c == label ? T(1) : T(0))) : T(0);
    }
    return log(sum) + (top - at_label);
  }

  // Rd from Rz, where it may stand, and p
  __device__ void tangent(const T* p, T scale, T* x) const {
    T dot = 0;
    if (loss == Loss::kCrossEntropy) {
      for (int c = lane; c < outputs; c += lanes)
        if (has(c)) dot += p[c] * x[c];
      dot = total(dot);
    }
    for (int c = lane; c < outputs; c += lanes) {
      T value = 0;
      if (has(c)) {
        value = loss == Loss::kMse   ? T(2) * x[c]
                : loss == Loss::kBce ? p[c] * (T(1) - p[c]) * x[c]
                                     : p[c] * (x[c] - dot);
        value *= scale;
      }
      x[c] = value;
    }
  }
};

// f(row, LossRow) for the rows of a task
template <class T, class F>
__device__ __forceinline__ void for_loss_rows(Loss loss, int64_t rows, int outputs, const bool* mask, const F& f) {
  const bool by_warps = outputs > kWarp;
  const int lanes = by_warps ? kWarp : 1;
  const int64_t workers = blockDim.x / lanes;
  const LossRow<T> one{loss, outputs, mask, static_cast<int>(threadIdx.x % lanes), lanes};
  for (int64_t row = threadIdx.x / lanes; row < rows; row += workers) f(row, one);
}

}  // namespace mtml::cuda
