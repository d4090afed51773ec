// Batch norm over the N rows of one task, with its reverse, its tangent (R-operator) and the tangent of its reverse.
// With
// <.> the mean over the rows, per channel:
//
//     r   = 1 / sqrt(<(z - <z>)^2> + eps)    xh = (z - <z>) r    y = gain xh + shift
//     q   = d - <d> - xh <d xh>              dz = gain r q       dgain = sum d xh, dshift = sum d
//     s   = <xh Rz>    Rxh = r (Rz - <Rz> - xh s)    Rr = -r^2 s    Ry = gain Rxh + Rgain xh + Rshift
//     Rdz = (Rgain r + gain Rr) q + gain r (Rd - <Rd> - Rxh <d xh> - xh <Rd xh + d Rxh>)
//     Rdgain = sum (Rd xh + d Rxh)           Rdshift = sum Rd
//
// Rows have ld columns, a multiple of kLanes<T>; channels are independent, so columns may hold anything where no
// channel is. Where a result is as large as an operand it may be that operand.
#pragma once

#include "core/vector_math.h"

namespace mtml::MTML_ISA {

// Two sums over rows at once.
template <class V>
struct TwoSums {
  V first{}, second{};
  MTML_INLINE TwoSums& operator+=(const TwoSums& other) {
    first += other.first;
    second += other.second;
    return *this;
  }
};

// the sum of f(i) over 0 <= i < rows: short sums that go into a total, in an order that depends on the rows alone
template <class V, class F>
MTML_INLINE V sum_over_rows(int64_t rows, F f) {
  V total{};
  for (int64_t i = 0; i < rows;) {
    const int64_t end = i + 4 * kShortSum < rows ? i + 4 * kShortSum : rows;
    V even{}, odd{};
    for (; i + 2 <= end; i += 2) {
      even += f(i);
      odd += f(i + 1);
    }
    for (; i < end; ++i) even += f(i);
    even += odd;
    total += even;
  }
  return total;
}

template <class T>
void batch_norm(int64_t N, int64_t ld, const T* z, const T* gain, const T* shift, double eps, T* y, T* xh, T* r) {
  using V = Vector<T>;
  const T mean_of = T(1) / static_cast<T>(N);
  for (int64_t c = 0; c < ld; c += kLanes<T>) {
    const V mean = mean_of * sum_over_rows<V>(N, [&](int64_t i) { return load<V>(z + i * ld + c); });
    const V variance = mean_of * sum_over_rows<V>(N, [&](int64_t i) {
                         const V centered = load<V>(z + i * ld + c) - mean;
                         return centered * centered;
                       });
    const V scale = T(1) / sqrt_<T>(variance + static_cast<T>(eps));
    store(r + c, scale);
    const V g = load<V>(gain + c), b = load<V>(shift + c);
    for (int64_t i = c; i < N * ld; i += ld) {
      const V normal = (load<V>(z + i) - mean) * scale;
      store(xh + i, normal);
      store(y + i, normal * g + b);
    }
  }
}

template <class T>
void batch_norm_backward(int64_t N, int64_t ld, const T* d, const T* xh, const T* r, const T* gain, T* dz, T* dgain,
                         T* dshift) {
  using V = Vector<T>;
  const T mean_of = T(1) / static_cast<T>(N);
  for (int64_t c = 0; c < ld; c += kLanes<T>) {
    const auto sums = sum_over_rows<TwoSums<V>>(N, [&](int64_t i) {
      const V di = load<V>(d + i * ld + c);
      return TwoSums<V>{di, di * load<V>(xh + i * ld + c)};
    });
    store(dshift + c, sums.first);
    store(dgain + c, sums.second);
    const V mean_d = mean_of * sums.first, mean_dx = mean_of * sums.second;
    const V scale = load<V>(gain + c) * load<V>(r + c);
    for (int64_t i = c; i < N * ld; i += ld) {
      store(dz + i, scale * (load<V>(d + i) - mean_d - load<V>(xh + i) * mean_dx));
    }
  }
}

// Rgain and Rshift may be null: zeros
template <class T>
void batch_norm_tangent(int64_t N, int64_t ld, const T* Rz, const T* xh, const T* r, const T* gain, const T* Rgain,
                        const T* Rshift, T* Rxh, T* Rr, T* Ry) {
  using V = Vector<T>;
  const T mean_of = T(1) / static_cast<T>(N);
  for (int64_t c = 0; c < ld; c += kLanes<T>) {
    const auto sums = sum_over_rows<TwoSums<V>>(N, [&](int64_t i) {
      const V Rzi = load<V>(Rz + i * ld + c);
      return TwoSums<V>{Rzi, Rzi * load<V>(xh + i * ld + c)};
    });
    const V mean = mean_of * sums.first, s = mean_of * sums.second;
    const V scale = load<V>(r + c), g = load<V>(gain + c);
    const V Rg = Rgain ? load<V>(Rgain + c) : V{}, Rb = Rshift ? load<V>(Rshift + c) : V{};
    store(Rr + c, -(scale * scale * s));
    for (int64_t i = c; i < N * ld; i += ld) {
      const V x = load<V>(xh + i);
      const V Rx = scale * (load<V>(Rz + i) - mean - x * s);
      store(Rxh + i, Rx);
      store(Ry + i, g * Rx + (Rg * x + Rb));
    }
  }
}

// Rgain may be null: zeros
template <class T>
void batch_norm_backward_tangent(int64_t N, int64_t ld, const T* d, const T* Rd, const T* xh, const T* Rxh, const T* r,
                                 const T* Rr, const T* gain, const T* Rgain, T* Rdz, T* Rdgain, T* Rdshift) {
  using V = Vector<T>;
  const T mean_of = T(1) / static_cast<T>(N);
  for (int64_t c = 0; c < ld; c += kLanes<T>) {
    const auto sums = sum_over_rows<TwoSums<V>>(N, [&](int64_t i) {
      const V di = load<V>(d + i * ld + c);
      return TwoSums<V>{di, di * load<V>(xh + i * ld + c)};
    });
    const auto Rsums = sum_over_rows<TwoSums<V>>(N, [&](int64_t i) {
      const int64_t at = i * ld + c;
      const V Rdi = load<V>(Rd + at);
      return TwoSums<V>{Rdi, Rdi * load<V>(xh + at) + load<V>(d + at) * load<V>(Rxh + at)};
    });
    store(Rdshift + c, Rsums.first);
    store(Rdgain + c, Rsums.second);
    const V mean_d = mean_of * sums.first, mean_dx = mean_of * sums.second;
    const V mean_Rd = mean_of * Rsums.first, mean_Rdx = mean_of * Rsums.second;
    const V g = load<V>(gain + c), scale = load<V>(r + c);
    const V gr = g * scale;
    V Rgr = g * load<V>(Rr + c);
    if (Rgain) Rgr += load<V>(Rgain + c) * scale;
    for (int64_t i = c; i < N * ld; i += ld) {
      const V x = load<V>(xh + i);
      const V q = load<V>(d + i) - mean_d - x * mean_dx;
      const V Rq = load<V>(Rd + i) - mean_Rd - load<V>(Rxh + i) * mean_dx - x * mean_Rdx;
      store(Rdz + i, Rgr * q + gr * Rq);
    }
  }
}

}  // namespace mtml::MTML_ISA
