// The backward kernel of linear_adapt, and the sums over tasks. V_s is the cotangent of an evaluation's weight, U_k
// that of W_k, R_k that of the velocity, P_k that of Z_k.
#pragma once

#include "cuda/linear_task.h"

namespace mtml::cuda {

// dJ/dZq
template <class T>
__device__ void query_cotangents(const Task<T>& task) {
  const Call<T>& call = task.call;
  const int size = task.q * call.classes;
  const int64_t all_rows = task.query_rows();
  const Judge<T> judge = task.query_judge();
  const Group group(call.classes);
  for (int s = 0; s < call.evaluations; ++s) {
    const T* zq = task.state + call.at.zq + s * size;
    const T* own = call.d_outputs ? call.d_outputs + (s * all_rows + task.first_query) * call.classes : nullptr;
    T* qd = task.work + call.at.qd + s * size;
    const auto own_part = [&](int i) { return own && judge.has(i % call.classes) ? own[i] : T(0); };
    if (!call.d_losses || !judge.labelled()) {
      for (int i = threadIdx.x; i < size; i += blockDim.x) qd[i] = own_part(i);
      continue;
    }
    const T weight = call.d_losses[s * call.tasks + task.t];
    group.for_rows(task.q, [&](int first) {
      T losses[kGroupRows];
      const auto put = [&](int i, T, T d) { qd[i] = weight * d + own_part(i); };
      loss_rows<false>(judge, group, first, [&](int i) { return zq[i]; }, put, losses);
    });
  }
}

// The bias's part of R_k+1, from the sum of P_k+1 over the rows; it keeps that of U_k but for what P_k adds.
template <class T>
__device__ __forceinline__ T move_bias_back(const Task<T>& task, int k, int c, T sum, bool writes) {
  const Call<T>& call = task.call;
  if (!call.bias.start) return 0;
  T u = task.bias(k + 1)[c] + sum, r = 0;
  if (k + 1 < call.steps && call.every_step) u += task.work[call.at.qd_sums + (k + 1) * call.classes + c];
  if (call.bias.moves) r = call.momentum * task.bias_moment(k + 1)[c] - task.rate(call.bias, k) * u;
  if (writes) {
    task.bias(k)[c] = u + call.decay * r;
    task.bias_moment(k)[c] = r;
    task.work[call.at.bn + k * call.classes + c] = u * task.state[call.at.n + (k + 1) * call.classes + c];
  }
  return r;
}

// P_k of the rows and classes of a thread, handed to the others in exchanged(k), and what follows from it alone
template <class T>
__device__ void step_back(const Task<T>& task, const Judge<T>& judge, int k) {
  const Call<T>& call = task.call;
  const int C = call.classes, n = task.n, evaluation = task.evaluation(k + 1);
  const bool moves = call.weight.moves, is_last = k + 1 == call.steps;
  const bool sums_f = call.weight.rate_sums && moves, sums_z = sums_f && call.second_order && call.decay != 0;
  // X U^T, X R^T, and the sum of the c_k P_k
  T *xu = task.own(0), *z0 = task.own(1), *xr = task.own(2);
  T* out = task.exchanged(k);
  const T* last = task.exchanged(k + 1);
  const T rate = task.rate(call.weight, k), c_k = task.state[call.at.c + k];
  const T* const kept = task.state + k * n * C;
  T* pk = call.support.x_gradient ? task.work + call.at.pk + k * n * C : nullptr;
  const T* xv = evaluation >= 0 ? task.work + call.at.xv + evaluation * n * C : nullptr;
  const Group group(C);
  group.for_rows(n, [&](int first) {
    T sums[kGroupRows] = {};
    const auto write_sums = [&](int to) {
      group_sum(group, sums);
      for (int r = 0; r < kGroupRows; ++r)
        if (group.lane == 0 && first + r < n) task.work[to + k * n + first + r] = sums[r];
    };
    for (int c = group.lane; c < C; c += group.lanes) {
      T moved[kGroupRows] = {}, sum = 0;
      if (!is_last && call.second_order)
        gram_times(task.gram(), call.at.ld, last, n, C, moves ? first : n, c, moved, sum);
      const T r_bias = move_bias_back(task, k, c, sum, first == 0);
      for (int r = 0; r < kGroupRows; ++r) {
        const int i = (first + r) * C + c;
        if (first + r >= n) continue;
        out[i] = r_bias;
        if (!moves) continue;
        T u = is_last ? T(0) : xu[i] + moved[r];
        if (xv) u += xv[i];
        T along = -rate * u;
        if (call.momentum != 0) along = xr[i] = along + call.momentum * xr[i];
        xu[i] = u + call.decay * along;
        out[i] += along;
        sums[r] += u * kept[call.at.f + i];
      }
    }
    if (sums_f) write_sums(call.at.yf);
    if (!call.second_order) return;
    const auto put = [&](int i, T value) {
      out[i] = value;
      z0[i] += c_k * value;
      if (pk) pk[i] = value;
    };
    tangent_rows(judge, group, first, [&](int i) { return kept[call.at.p + i]; }, [&](int i) { return out[i]; }, put);
    if (!sums_z) return;
    for (int r = 0; r < kGroupRows; ++r) {
      sums[r] = 0;
      for (int c = group.lane; c < C && first + r < n; c += group.lanes)
        sums[r] += out[(first + r) * C + c] * task.state[call.at.z0 + (first + r) * C + c];
    }
    write_sums(call.at.pz);
  });
}

// da_k = -<U_k+1, velocity k+1>, the weight's by its part in X and its part in W_0; by one warp
template <class T>
__device__ void rate_gradients(const Task<T>& task) {
  const Call<T>& call = task.call;
  const int steps = call.steps, lane = threadIdx.x % kWarp;
  const T *state = task.state, *work = task.work;
  const bool decays = call.decay != 0 && call.weight.moves;
  // <U_k, W_0> and <R_k, W_0>
  double u = decays && call.weight.rate_sums ? work[call.at.vw + call.evaluations - 1] : T(0), r = 0;
  for (int k = steps - 1; k >= 0 && call.weight.rate_sums; --k) {
    double sum = warp_sum_of(call.weight.moves ? task.n : 0, [&](int i) { return work[call.at.yf + k * task.n + i]; });
    if (decays) {
      sum += static_cast<double>(state[call.at.ec + k + 1]) * u;
      r = call.momentum * r - task.rate(call.weight, k) * u;
      u += call.decay * r;
      if (call.second_order) u += warp_sum_of(task.n, [&](int i) { return work[call.at.pz + k * task.n + i]; });
      if (call.every_step) u += work[call.at.vw + k];
    }
    if (lane == 0) call.weight.rate_sums[task.t * steps + k] = -sum;
  }
  for (int k = 0; k < steps && call.bias.rate_sums; ++k) {
    const double sum =
        warp_sum_of(call.bias.moves ? call.classes : 0, [&](int c) { return work[call.at.bn + k * call.classes + c]; });
    if (lane == 0) call.bias.rate_sums[task.t * steps + k] = -sum;
  }
}

// H + H^T of H = -sum_k P_k E_k^T, the cotangent of the Gram matrix, in its place
template <class T>
__device__ void gram_cotangent(const Task<T>& task) {
  constexpr int kSide = 4;
  const int n = task.n, C = task.call.classes, sides = (n + kSide - 1) / kSide, ld = task.call.at.ld;
  for (int tile = threadIdx.x; tile < sides * sides; tile += blockDim.x) {
    const int i0 = tile / sides * kSide, j0 = tile % sides * kSide;
    if (j0 > i0) continue;
    T sums[kSide][kSide] = {};
    // E_0 is zero
    for (int k = 1; k < task.call.steps; ++k) {
      const T* p = task.work + task.call.at.pk + k * n * C;
      const T* e = task.state + task.call.at.e + k * n * C;
      for (int c = 0; c < C; ++c) {
        T pi[kSide], pj[kSide], ei[kSide], ej[kSide];
        for (int s = 0; s < kSide; ++s) {
          const int i = (i0 + s < n ? i0 + s : n - 1) * C + c, j = (j0 + s < n ? j0 + s : n - 1) * C + c;
          pi[s] = p[i], ei[s] = e[i], pj[s] = p[j], ej[s] = e[j];
        }
        for (int i = 0; i < kSide; ++i)
          for (int j = 0; j < kSide; ++j) sums[i][j] -= pi[i] * ej[j] + pj[j] * ei[i];
      }
    }
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j)
        if (i0 + i < n && j0 + j <= i0 + i)
          task.gram()[(i0 + i) * ld + j0 + j] = task.gram()[(j0 + j) * ld + i0 + i] = sums[i][j];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) linear_adapt_backward(const __grid_constant__ Call<T> call) {
  for (int64_t t = blockIdx.x; t < call.tasks; t += gridDim.x) {
    const Task<T> task(call, t);
    const Layout& at = call.at;
    const int n = task.n, C = call.classes, D = call.features, K = call.steps, S = call.evaluations;
    const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    T *const state = task.state, *const work = task.work;
    const T* d_fast = call.d_fast ? call.d_fast + t * at.params_size : nullptr;

    query_cotangents(task);
    // rows are padded: what is behind them nobody has written
    for (int i = threadIdx.x; i < n * n && call.second_order && call.weight.moves; i += blockDim.x)
      task.gram()[i / n * at.ld + i % n] = state[at.gram + i / n * at.ld + i % n];
    for (int i = threadIdx.x; i < n * C; i += blockDim.x) {
      task.own(1)[i] = 0;
      if (call.momentum != 0) task.own(2)[i] = 0;
    }
    __syncthreads();

    // V_s = Qd_s^T Xq
    for (int s = 0; s < S; ++s) {
      combine(task.cotangent(s), [&](Tile<T>& tile) {
        if (d_fast && s == S - 1) tile.add_rows(T(1), Matrix<const T>(d_fast, C, D));
        tile.add(T(1), work + at.qd + s * task.q * C, 1, C, task.xq());
      });
    }
    for (int i = warp; i < S * C; i += warps) {
      const T* qd = work + at.qd + i / C * task.q * C + i % C;
      const double sum = warp_sum_of(task.q, [&](int row) { return qd[row * C]; });
      if (threadIdx.x % kWarp == 0) work[at.qd_sums + i] = static_cast<T>(sum);
    }
    if (call.query.x_gradient) {
      combine(Matrix<T>(call.query.x_gradient + task.first_query * D, task.q, D), [&](Tile<T>& tile) {
        for (int s = 0; s < S; ++s) tile.add(T(1), work + at.qd + s * task.q * C, C, 1, task.weight(s));
      });
    }
    __syncthreads();

    // X V_s^T of all evaluations at once
    row_dots(task.x(), Matrix<const T>(work + at.v, S * C, D), false, 0,
             [&](int i, int j, T value) { work[at.xv + (j / C * n + i) * C + j % C] = value; });
    for (int s = warp; s < S && call.weight.rate_sums && call.decay != 0; s += warps) {
      const T *v = task.cotangent(s).start, *w0 = task.w0().start;
      const double sum = warp_sum_of(C * D, [&](int i) { return v[i] * w0[i]; });
      if (threadIdx.x % kWarp == 0) work[at.vw + s] = static_cast<T>(sum);
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
      task.bias(K)[c] = work[at.qd_sums + (S - 1) * C + c] + (d_fast && call.bias.start ? d_fast[C * D + c] : T(0));
      task.bias_moment(K)[c] = 0;
    }
    __syncthreads();

    {
      const Judge<T> judge = task.support_judge();
      for (int k = K - 1; k >= 0; --k) {
        step_back(task, judge, k);
        __syncthreads();
      }
    }

    T* const share = call.shares + t * at.share_size;
    if (call.support.x_gradient && call.second_order && call.weight.moves) gram_cotangent(task);
    if (call.bias.gradient) {
      T* gradient = call.bias.task_stride ? call.bias.gradient + t * C : share + C * D;
      for (int c = threadIdx.x; c < C; c += blockDim.x) {
        T u = task.bias(0)[c];
        for (int m = 0; m < n && call.second_order && K > 0; ++m) u += task.exchanged(0)[m * C + c];
        if (K > 0 && call.every_step) u += work[at.qd_sums + c];
        gradient[c] = u;
      }
    }
    __syncthreads();

    const T* z0 = task.own(1);
    if (call.weight.gradient) {
      combine(Matrix<T>(call.weight.task_stride ? call.weight.gradient + t * C * D : share, C, D), [&](Tile<T>& tile) {
        for (int s = 0; s < S; ++s) tile.add_rows(state[at.c + task.steps_before(s)], task.cotangent(s));
        if (call.second_order) tile.add(T(1), z0, 1, C, task.x());
      });
    }
    if (call.support.x_gradient) {
      combine(Matrix<T>(call.support.x_gradient + task.first_support * D, n, D), [&](Tile<T>& tile) {
        if (!call.second_order) return;
        tile.add(T(1), z0, C, 1, task.w0());
        if (!call.weight.moves) return;
        tile.add(T(1), task.gram(), at.ld, 1, task.x());
        for (int s = 0; s < S; ++s)
          tile.add(T(-1), state + at.e + task.steps_before(s) * n * C, C, 1, task.cotangent(s));
      });
    }
    if (warp == warps - 1) rate_gradients(task);
    // the next task's
    __syncthreads();
  }
}

// The gradients of shared starts: a thread adds up the tasks of one element, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) linear_adapt_sums(const __grid_constant__ Call<T> call) {
  constexpr int kShortSum = 16;
  const int weights = call.classes * call.features;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < call.at.params_size; i += gridDim.x * blockDim.x) {
    const MlpParameter<T>& param = i < weights ? call.weight : call.bias;
    if (!param.gradient || param.task_stride) continue;
    double total = 0;
    for (int64_t t = 0; t < call.tasks;) {
      T part = 0;
      for (int n = 0; n < kShortSum && t < call.tasks; ++n, ++t) part += call.shares[t * call.at.share_size + i];
      total += part;
    }
    param.gradient[i < weights ? i : i - weights] = static_cast<T>(total);
  }
}

}  // namespace mtml::cuda
