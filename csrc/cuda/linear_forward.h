// The forward kernel of linear_adapt.
#pragma once

#include "cuda/linear_task.h"

namespace mtml::cuda {

// c_k and e_k: the part of W_0 in W_k and in the velocity
template <class T>
__device__ void write_coefficients(const Task<T>& task) {
  const Call<T>& call = task.call;
  double c = 1, e = 0;
  for (int k = 0; k <= call.steps; ++k) {
    task.state[call.at.c + k] = static_cast<T>(c);
    task.state[call.at.ec + k] = static_cast<T>(e);
    if (k == call.steps || !call.weight.moves) continue;
    e = static_cast<double>(call.momentum) * e + static_cast<double>(call.decay) * c;
    c -= static_cast<double>(task.rate(call.weight, k)) * e;
  }
}

// b_k from D_k-1's sum over the rows; the same in every group, and one of them writes it
template <class T>
__device__ __forceinline__ T move_bias(const Task<T>& task, int k, int c, T sum, bool writes) {
  const Call<T>& call = task.call;
  if (!call.bias.start) return 0;
  T b = task.bias(k + 1)[c], moment = task.bias_moment(k + 1)[c];
  if (call.bias.moves) {
    moment = call.momentum * moment + sum + call.decay * b;
    b -= task.rate(call.bias, k - 1) * moment;
  }
  if (writes) {
    task.bias(k)[c] = task.state[call.at.b + k * call.classes + c] = b;
    task.bias_moment(k)[c] = task.state[call.at.n + k * call.classes + c] = moment;
  }
  return b;
}

// D_k of the rows and classes of a thread, handed to the others in exchanged(k), and what follows from it alone
template <class T>
__device__ void step(const Task<T>& task, const Judge<T>& judge, int k) {
  const Call<T>& call = task.call;
  const int C = call.classes, n = task.n;
  const bool moves = call.weight.moves, has_momentum = call.momentum != 0;
  // X times the part of the velocity and of the weight, and both in terms of the rows
  T *zw = task.own(0), *e = task.own(1), *v = task.own(2), *f = task.own(3);
  T* out = task.exchanged(k);
  const T* last = task.exchanged(k + 1);
  const T rate = task.rate(call.weight, k), rate_before = k ? task.rate(call.weight, k - 1) : T(0);
  // what the backward kernel asks for
  T* const kept = task.state + k * n * C;
  const Group group(C);
  group.for_rows(n, [&](int first) {
    for (int c = group.lane; c < C; c += group.lanes) {
      T moved[kGroupRows] = {}, sum = 0;
      if (k > 0) gram_times(task.gram(), call.at.ld, last, n, C, moves ? first : n, c, moved, sum);
      const T b = k > 0 ? move_bias(task, k, c, sum, first == 0) : task.bias(0)[c];
      for (int r = 0; r < kGroupRows; ++r) {
        const int i = (first + r) * C + c;
        if (first + r >= n) continue;
        if (moves && k > 0) {
          T velocity = moved[r] + call.decay * zw[i];
          if (has_momentum) velocity = v[i] = call.momentum * v[i] + velocity;
          zw[i] -= rate_before * velocity;
        }
        out[i] = zw[i] + b;
      }
    }
    const auto z = [&](int i) { return out[i]; };
    const auto put = [&](int i, T p, T d) {
      T factor = moves ? d - call.decay * e[i] : T(0);
      if (moves && has_momentum) factor = f[i] = call.momentum * f[i] + factor;
      e[i] += rate * factor;
      kept[call.at.p + i] = p;
      kept[call.at.f + i] = factor;
      kept[call.at.e + n * C + i] = e[i];
      out[i] = d;
    };
    T losses[kGroupRows];
    loss_rows<false>(judge, group, first, z, put, losses);
  });
}

template <class T>
__device__ void query_results(const Task<T>& task, const Judge<T>& judge) {
  const Call<T>& call = task.call;
  const int size = task.q * call.classes;
  const int64_t all_rows = task.query_rows();
  const T nothing = call.loss == Loss::kCrossEntropy ? -static_cast<T>(INFINITY) : T(0);
  const Group group(call.classes);
  for (int s = 0; s < call.evaluations; ++s) {
    const T* zq = task.state + call.at.zq + s * size;
    if (call.outputs) {
      T* outputs = call.outputs + (s * all_rows + task.first_query) * call.classes;
      for (int i = threadIdx.x; i < size; i += blockDim.x) outputs[i] = judge.has(i % call.classes) ? zq[i] : nothing;
    }
    if (!call.losses || !judge.labelled()) continue;
    T* to = task.state + call.at.row_losses + s * task.q;
    group.for_rows(task.q, [&](int first) {
      T losses[kGroupRows];
      loss_rows<true>(judge, group, first, [&](int i) { return zq[i]; }, [](int, T, T) {}, losses);
      for (int r = 0; r < kGroupRows; ++r)
        if (group.lane == 0 && first + r < task.q) to[first + r] = losses[r];
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) linear_adapt(const __grid_constant__ Call<T> call) {
  for (int64_t t = blockIdx.x; t < call.tasks; t += gridDim.x) {
    const Task<T> task(call, t);
    const Layout& at = call.at;
    const int n = task.n, C = call.classes, D = call.features;
    T* const state = task.state;

    const auto put_gram = [&](int i, int j, T value) {
      task.gram()[i * at.ld + j] = task.gram()[j * at.ld + i] = value;
      state[at.gram + i * at.ld + j] = state[at.gram + j * at.ld + i] = value;
    };
    const auto put_z = [&](int i, int j, T value) { task.own(0)[i * C + j] = state[at.z0 + i * C + j] = value; };
    const int turn = row_dots(task.x(), task.x(), true, 0, put_gram);
    row_dots(task.x(), task.w0(), false, turn, put_z);
    for (int i = threadIdx.x; i < n * C; i += blockDim.x) {
      state[at.e + i] = task.own(1)[i] = 0;
      if (call.momentum != 0) task.own(2)[i] = task.own(3)[i] = 0;
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
      const T b = call.bias.start ? call.bias.start[t * call.bias.task_stride + c] : T(0);
      state[at.b + c] = task.bias(0)[c] = b;
      state[at.n + c] = task.bias_moment(0)[c] = 0;
    }
    if (threadIdx.x == 0) write_coefficients(task);
    __syncthreads();

    {
      const Judge<T> judge = task.support_judge();
      for (int k = 0; k < call.steps; ++k) {
        step(task, judge, k);
        __syncthreads();
      }
    }
    for (int c = threadIdx.x; c < C && call.steps > 0; c += blockDim.x) {
      T sum = 0;
      for (int m = 0; m < n; ++m) sum += task.exchanged(call.steps + 1)[m * C + c];
      move_bias(task, call.steps, c, sum, true);
    }

    // W_k = c_k W_0 - E_k^T X
    for (int s = 0; s < call.evaluations; ++s) {
      const int k = task.steps_before(s);
      combine(task.weight(s), [&](Tile<T>& tile) {
        tile.add_rows(state[at.c + k], task.w0());
        tile.add(T(-1), state + at.e + k * n * C, 1, C, task.x());
      });
    }
    __syncthreads();

    // of all evaluations at once
    const Matrix<const T> weights(state + at.w, call.evaluations * C, D);
    row_dots(task.xq(), weights, false, 0, [&](int i, int j, T value) {
      const int s = j / C, c = j % C;
      const T b = call.bias.start ? state[at.b + task.steps_before(s) * C + c] : T(0);
      state[at.zq + (s * task.q + i) * C + c] = value + b;
    });
    if (call.fast) {
      T* fast = call.fast + t * at.params_size;
      const T* last = task.weight(call.evaluations - 1).start;
      for (int i = threadIdx.x; i < at.params_size; i += blockDim.x)
        fast[i] = i < C * D ? last[i] : state[at.b + call.steps * C + i - C * D];
    }
    __syncthreads();

    const Judge<T> judge = task.query_judge();
    query_results(task, judge);
    __syncthreads();

    for (int s = threadIdx.x / kWarp; s < call.evaluations && call.losses; s += blockDim.x / kWarp) {
      const T* rows = state + at.row_losses + s * task.q;
      const double sum = warp_sum_of(judge.labelled() ? task.q : 0, [&](int i) { return rows[i]; });
      if (threadIdx.x % kWarp == 0) call.losses[s * call.tasks + t] = static_cast<T>(sum / judge.terms);
    }
  }
}

}  // namespace mtml::cuda
