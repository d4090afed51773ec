// What a linear head's inner steps do to the rows of a task, in the space of its outputs: the lanes of a warp share
// rows, and a group of them has kGroupRows rows at once, a class a lane (or every 32nd class, where there are more).
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "core/mlp_adapt_args.h"
#include "cuda/block.h"

namespace mtml::cuda {

constexpr int kGroupRows = 4;

// Which rows and classes a thread has; depends on the number of classes alone, but for who takes which rows.
struct Group {
  int lanes;    // that share a row: a power of two
  int lane;     // of this thread
  int index;    // of the group in its warp
  int of_warp;  // the warp's first group
  int count;    // in the block

  __device__ explicit Group(int classes) : lanes(1) {
    while (lanes < kWarp && lanes < classes) lanes *= 2;
    lane = threadIdx.x % lanes;
    index = threadIdx.x % kWarp / lanes;
    of_warp = threadIdx.x / kWarp * (kWarp / lanes);
    count = blockDim.x / lanes;
  }

  // f(first) for the first of each kGroupRows of n rows, and for 0 where there are none. All lanes of a warp call it
  // equally often, so that f may exchange values: a warp's last call may be beyond n.
  template <class F>
  __device__ __forceinline__ void for_rows(int n, const F& f) const {
    for (int tile = of_warp; tile == 0 || tile * kGroupRows < n; tile += count) f((tile + index) * kGroupRows);
  }
};

// the sum over the lanes of a group, in each of them
template <class T>
__device__ __forceinline__ void group_sum(const Group& group, T (&values)[kGroupRows]) {
  for (int distance = group.lanes / 2; distance > 0; distance /= 2)
    for (T& value : values) value += __shfl_xor_sync(~0u, value, distance);
}
template <class T>
__device__ __forceinline__ void group_max(const Group& group, T (&values)[kGroupRows]) {
  for (int distance = group.lanes / 2; distance > 0; distance /= 2) {
    for (T& value : values) {
      const T other = __shfl_xor_sync(~0u, value, distance);
      value = other > value ? other : value;
    }
  }
}

// product[r] = sum_m gram[m][first + r] v[m][c] of a symmetric gram [n][ld], ld a multiple of 4; sum = sum_m v[m][c]
template <class T>
__device__ __forceinline__ void gram_times(const T* gram, int ld, const T* v, int n, int classes, int first, int c,
                                           T (&product)[kGroupRows], T& sum) {
  struct alignas(16) Four {
    T at[kGroupRows];
  };
  for (T& value : product) value = 0;
  sum = 0;
  for (int m = 0; m < n; ++m) {
    const T x = v[m * classes + c];
    sum += x;
    if (first >= n) continue;
    const Four row = *reinterpret_cast<const Four*>(gram + m * ld + first);
    for (int r = 0; r < kGroupRows; ++r) product[r] += row.at[r] * x;
  }
}

// A task's labels, or targets, and how its loss weighs a row: the formulas stand in core/losses.h.
template <class T>
struct Judge {
  Loss loss;
  int classes, rows;
  const int64_t* labels;
  const T* targets;
  const bool* mask;  // [C], or null
  double terms;      // of which the loss is the mean; 1 without rows
  T mean;            // 1 / terms

  __device__ Judge(Loss loss, int classes, const MlpRows<T>& of, int64_t first, int rows, const bool* mask)
      : loss(loss),
        classes(classes),
        rows(rows),
        labels(of.labels ? of.labels + first : nullptr),
        targets(of.targets ? of.targets + first * classes : nullptr),
        mask(mask) {
    int count = loss == Loss::kCrossEntropy ? 1 : classes;
    if (loss != Loss::kCrossEntropy && mask) {
      count = 0;
      for (int c = 0; c < classes; ++c) count += mask[c];
    }
    terms = static_cast<double>((rows ? rows : 1) * (count ? count : 1));
    mean = static_cast<T>(1 / terms);
  }

  __device__ __forceinline__ bool labelled() const { return labels || targets; }
  __device__ __forceinline__ bool has(int c) const { return !mask || mask[c]; }
};

// put(i, p, d) for each element i = row * classes + class of the rows from `first` on: what the tangent asks for, and
// the loss's derivative by the output z(i); zeros where the task has no such output. Where kLosses, losses[r] is the
// row's loss times the terms.
template <bool kLosses, class T, class Z, class Put>
__device__ void loss_rows(const Judge<T>& judge, const Group& group, int first, const Z& z, const Put& put,
                          T (&losses)[kGroupRows]) {
  const T nan = static_cast<T>(NAN);
  T top[kGroupRows], sum[kGroupRows] = {};
  for (T& value : top) value = -static_cast<T>(INFINITY);
  if (judge.loss == Loss::kCrossEntropy) {
    for (int c = group.lane; c < judge.classes; c += group.lanes) {
      if (!judge.has(c)) continue;
      for (int r = 0; r < kGroupRows; ++r) {
        const T x = first + r < judge.rows ? z((first + r) * judge.classes + c) : T(0);
        top[r] = x > top[r] ? x : top[r];
      }
    }
    group_max(group, top);
    for (int c = group.lane; c < judge.classes; c += group.lanes) {
      if (!judge.has(c)) continue;
      for (int r = 0; r < kGroupRows; ++r)
        if (first + r < judge.rows) sum[r] += std::exp(z((first + r) * judge.classes + c) - top[r]);
    }
    group_sum(group, sum);
  }
  for (T& value : losses) value = 0;
  for (int c = group.lane; c < judge.classes; c += group.lanes) {
    const bool has = judge.has(c);
    for (int r = 0; r < kGroupRows; ++r) {
      const int row = first + r, i = row * judge.classes + c;
      if (row >= judge.rows) continue;
      T value = 0, p = 0, d = 0;
      if (judge.loss == Loss::kCrossEntropy) {
        const int64_t label = judge.labels[row];
        const bool inside = label >= 0 && label < judge.classes;
        // the host does not see the labels: one that is none shows
        if (has) {
          p = inside ? std::exp(z(i) - top[r]) / sum[r] : nan;
          d = p - (c == label ? T(1) : T(0));
        }
        if (kLosses && c == label) value = has ? std::log(sum[r]) + (top[r] - z(i)) : static_cast<T>(INFINITY);
        if (kLosses && c == 0 && !inside) value = nan;
      } else if (has) {
        const T x = z(i), target = judge.targets[i];
        if (judge.loss == Loss::kMse) {
          value = (x - target) * (x - target);
          d = T(2) * (x - target);
        } else {
          const T e = std::exp(x < T(0) ? x : -x);
          p = (x < T(0) ? e : T(1)) / (T(1) + e);
          d = p - target;
          // in torch's order, which decides what infinities give
          if (kLosses) value = (T(1) - target) * x - ((x < T(0) ? x : T(0)) - std::log1p(e));
        }
      }
      losses[r] += value;
      put(i, p, judge.mean * d);
    }
  }
  if (kLosses) group_sum(group, losses);
}

// put(i, Rd) from p(i) and Rz = rz(i), for the rows from `first` on
template <class T, class P, class Rz, class Put>
__device__ void tangent_rows(const Judge<T>& judge, const Group& group, int first, const P& p, const Rz& rz,
                             const Put& put) {
  T dot[kGroupRows] = {};
  if (judge.loss == Loss::kCrossEntropy) {
    for (int c = group.lane; c < judge.classes; c += group.lanes) {
      if (!judge.has(c)) continue;
      for (int r = 0; r < kGroupRows; ++r) {
        const int i = (first + r) * judge.classes + c;
        if (first + r < judge.rows) dot[r] += p(i) * rz(i);
      }
    }
    group_sum(group, dot);
  }
  for (int c = group.lane; c < judge.classes; c += group.lanes) {
    const bool has = judge.has(c);
    for (int r = 0; r < kGroupRows; ++r) {
      const int row = first + r, i = row * judge.classes + c;
      if (row >= judge.rows) continue;
      T rd = 0;
      if (has && judge.loss == Loss::kCrossEntropy) rd = p(i) * (rz(i) - dot[r]);
      if (has && judge.loss == Loss::kMse) rd = T(2) * rz(i);
      if (has && judge.loss == Loss::kBce) rd = p(i) * (T(1) - p(i)) * rz(i);
      put(i, judge.mean * rd);
    }
  }
}

}  // namespace mtml::cuda
