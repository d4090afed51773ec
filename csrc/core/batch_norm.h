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
// Rows have ld columns, of which the first `channels` are worked on: on a CPU whole vectors, as channels are
// independent and columns may hold anything where no channel is. Where a result is as large as an operand it may be
// that operand. What for_channels and sqrt_ are, whoever includes this has said.
#pragma once

namespace mtml::MTML_ISA {

// sums[k] = f(i, Index<k>{}, ...f(0, Index<k>{}, 0)...) for i < rows: f adds a row's term to what it is given. Short
// sums that go into a total.
template <int W, class V, class F>
MTML_INLINE void sum_over_rows(int64_t rows, V (&sums)[W], F f) {
  unroll<W>([&](auto k) { sums[k] = V{}; });
  for (int64_t i = 0; i < rows;) {
    const int64_t end = i + kShortSum < rows ? i + kShortSum : rows;
    V part[W];
    unroll<W>([&](auto k) { part[k] = V{}; });
    for (; i < end; ++i) unroll<W>([&](auto k) { part[k] = f(i, k, part[k]); });
    unroll<W>([&](auto k) { sums[k] += part[k]; });
  }
}

template <class T>
MTML_FUNCTION void batch_norm(int64_t N, int64_t channels, int64_t ld, const T* z, const T* gain, const T* shift,
                              double eps, T* y, T* xh, T* r) {
  using V = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  const T mean_of = T(1) / static_cast<T>(N);
  // <squares> + eps, in an order that no compiler contracts in one place and not in the other
  const T sum_of_eps = static_cast<T>(eps * static_cast<double>(N));
  for_channels<T>(channels, [&](int64_t c, auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    V mean[W], scale[W];
    sum_over_rows(N, mean, [&](int64_t i, auto k, V sum) { return sum + load<V>(z + i * ld + c + k * L); });
    unroll<W>([&](auto k) { mean[k] *= mean_of; });
    // What the mean's rounding leaves is taken away too, as the reverse counts on rows of xh that add up to nothing: a
    // channel's mean may be far larger than its deviation.
    V sums[2 * W];  // of what is centered, and of its squares
    sum_over_rows(N, sums, [&](int64_t i, auto k, V sum) {
      const V centered = load<V>(z + i * ld + c + k % W * L) - mean[k % W];
      return k < W ? sum + centered : sum + centered * centered;
    });
    unroll<W>([&](auto k) {
      sums[k] *= mean_of;
      scale[k] = T(1) / sqrt_<T>((sums[k + W] + sum_of_eps) * mean_of - sums[k] * sums[k]);
      store(r + c + k * L, scale[k]);
    });
    V g[W], b[W];
    unroll<W>([&](auto k) {
      g[k] = load<V>(gain + c + k * L);
      b[k] = load<V>(shift + c + k * L);
    });
    for (int64_t i = 0; i < N; ++i) {
      unroll<W>([&](auto k) {
        const int64_t at = i * ld + c + k * L;
        const V x = (load<V>(z + at) - mean[k] - sums[k]) * scale[k];
        store(xh + at, x);
        store(y + at, x * g[k] + b[k]);
      });
    }
  });
}

template <class T>
MTML_FUNCTION void batch_norm_backward(int64_t N, int64_t channels, int64_t ld, const T* d, const T* xh, const T* r,
                                       const T* gain, T* dz, T* dgain, T* dshift) {
  using V = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  const T mean_of = T(1) / static_cast<T>(N);
  for_channels<T>(channels, [&](int64_t c, auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    V sums[2 * W];  // of d, then of d * xh
    sum_over_rows(N, sums, [&](int64_t i, auto k, V sum) {
      const int64_t at = i * ld + c + k % W * L;
      return k < W ? sum + load<V>(d + at) : sum + load<V>(d + at) * load<V>(xh + at);
    });
    V scale[W];
    unroll<W>([&](auto k) {
      const int64_t channel = c + k * L;
      store(dshift + channel, sums[k]);
      store(dgain + channel, sums[k + W]);
      scale[k] = load<V>(gain + channel) * load<V>(r + channel);
    });
    unroll<2 * W>([&](auto k) { sums[k] *= mean_of; });
    for (int64_t i = 0; i < N; ++i) {
      unroll<W>([&](auto k) {
        const int64_t at = i * ld + c + k * L;
        store(dz + at, scale[k] * (load<V>(d + at) - sums[k] - load<V>(xh + at) * sums[k + W]));
      });
    }
  });
}

// Rgain and Rshift may be null: zeros
template <class T>
MTML_FUNCTION void batch_norm_tangent(int64_t N, int64_t channels, int64_t ld, const T* Rz, const T* xh, const T* r,
                                      const T* gain, const T* Rgain, const T* Rshift, T* Rxh, T* Rr, T* Ry) {
  using V = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  const T mean_of = T(1) / static_cast<T>(N);
  for_channels<T>(channels, [&](int64_t c, auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    V sums[2 * W];  // of Rz, then of Rz * xh
    sum_over_rows(N, sums, [&](int64_t i, auto k, V sum) {
      const int64_t at = i * ld + c + k % W * L;
      return k < W ? sum + load<V>(Rz + at) : sum + load<V>(Rz + at) * load<V>(xh + at);
    });
    unroll<2 * W>([&](auto k) { sums[k] *= mean_of; });
    V scale[W], g[W], Rg[W], Rb[W];
    unroll<W>([&](auto k) {
      const int64_t channel = c + k * L;
      scale[k] = load<V>(r + channel);
      g[k] = load<V>(gain + channel);
      Rg[k] = Rgain ? load<V>(Rgain + channel) : V{};
      Rb[k] = Rshift ? load<V>(Rshift + channel) : V{};
      store(Rr + channel, -(scale[k] * scale[k] * sums[k + W]));
    });
    for (int64_t i = 0; i < N; ++i) {
      unroll<W>([&](auto k) {
        const int64_t at = i * ld + c + k * L;
        const V x = load<V>(xh + at);
        const V Rx = scale[k] * (load<V>(Rz + at) - sums[k] - x * sums[k + W]);
        store(Rxh + at, Rx);
        store(Ry + at, g[k] * Rx + (Rg[k] * x + Rb[k]));
      });
    }
  });
}

// Rgain may be null: zeros
template <class T>
MTML_FUNCTION void batch_norm_backward_tangent(int64_t N, int64_t channels, int64_t ld, const T* d, const T* Rd,
                                               const T* xh, const T* Rxh, const T* r, const T* Rr, const T* gain,
                                               const T* Rgain, T* Rdz, T* Rdgain, T* Rdshift) {
  using V = Vector<T>;
  constexpr int64_t L = kLanes<T>;
  const T mean_of = T(1) / static_cast<T>(N);
  for_channels<T>(channels, [&](int64_t c, auto width) __attribute__((always_inline)) {
    constexpr int W = width;
    V sums[2 * W], Rsums[2 * W];  // of d and d * xh, and of their tangents
    sum_over_rows(N, sums, [&](int64_t i, auto k, V sum) {
      const int64_t at = i * ld + c + k % W * L;
      return k < W ? sum + load<V>(d + at) : sum + load<V>(d + at) * load<V>(xh + at);
    });
    sum_over_rows(N, Rsums, [&](int64_t i, auto k, V sum) {
      const int64_t at = i * ld + c + k % W * L;
      if constexpr (k < W) {
        return sum + load<V>(Rd + at);
      } else {
        // one product after the other: a sum of two could be contracted in two ways
        sum += load<V>(Rd + at) * load<V>(xh + at);
        return sum + load<V>(d + at) * load<V>(Rxh + at);
      }
    });
    V scale[W], Rscale[W];  // gain * r and its tangent
    unroll<W>([&](auto k) {
      const int64_t channel = c + k * L;
      store(Rdshift + channel, Rsums[k]);
      store(Rdgain + channel, Rsums[k + W]);
      scale[k] = load<V>(gain + channel) * load<V>(r + channel);
      Rscale[k] = load<V>(gain + channel) * load<V>(Rr + channel);
      if (Rgain) Rscale[k] += load<V>(Rgain + channel) * load<V>(r + channel);
    });
    unroll<2 * W>([&](auto k) {
      sums[k] *= mean_of;
      Rsums[k] *= mean_of;
    });
    for (int64_t i = 0; i < N; ++i) {
      unroll<W>([&](auto k) {
        const int64_t at = i * ld + c + k * L;
        const V x = load<V>(xh + at);
        const V q = load<V>(d + at) - sums[k] - x * sums[k + W];
        const V Rq = load<V>(Rd + at) - Rsums[k] - load<V>(Rxh + at) * sums[k + W] - x * Rsums[k + W];
        store(Rdz + at, Rscale[k] * q + scale[k] * Rq);
      });
    }
  });
}

}  // namespace mtml::MTML_ISA
