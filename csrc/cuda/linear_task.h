// A call of linear_adapt as its kernels see it: where the arrays of a task lie, and what the threads of a block know of
// theirs.
#pragma once

#include <cstdint>

#include "core/mlp_adapt_args.h"
#include "cuda/block.h"
#include "cuda/linear_rows.h"
#include "cuda/products.h"

namespace mtml::cuda {

// of a block, at most
constexpr int kThreads = 512;

// In elements; N and Q are the largest tasks', ld is N rounded up to kGroupRows, S counts the evaluations.
struct Layout {
  int ld;
  // state: the Gram matrix [N, ld] and X W_0^T [N, C]; of step k p_k and F_k+1 [K, N, C], and E_k [K + 1, N, C]; the
  // bias b_k and its velocity n_k [K + 1, C]; c_k and e_k [K + 1]; the weights [S, C, D], outputs [S, Q, C] and rows'
  // losses [S, Q] of the evaluations
  int gram, z0, p, f, e, b, n, c, ec, w, zq, row_losses;
  // workspace: dJ/dZq [S, Q, C] and its sums over the rows [S, C]; V [S, C, D]; X V^T [S, N, C]; P_k [K, N, C]; sums
  // over the classes for the rates [K, N] each, products for those of the bias [K, C]; <V, W_0> [S]
  int qd, qd_sums, v, xv, pk, yf, pz, bn, vw;
  // shared memory: the Gram matrix, and then what rows hand each other in this step and the last [2, N, C]; the bias,
  // and its velocity, in both [2, C]; what only the thread that has a row and class reads [2 or 4, N, C]
  int exchange, bias, bias_moment, own;
  // a task's parameters, and what it adds to shared starts, which begins at a multiple of 16 bytes
  int params_size, share_size;
  int64_t state_size, workspace_size, shared_size;
};

template <class T>
struct Call {
  int64_t tasks;
  int features, classes, steps, evaluations;
  Loss loss;
  bool second_order, every_step;
  T momentum, decay;
  MlpParameter<T> weight, bias;  // a bias without a start is none
  MlpRows<T> support, query;
  const bool* class_mask;
  T *outputs, *losses, *fast;
  const T *d_outputs, *d_losses, *d_fast;
  Layout at;
  T* state;      // [T, state_size]
  T* workspace;  // [T, workspace_size]
  T* shares;     // what the tasks add to shared starts [T, share_size]
};
static_assert(sizeof(Call<double>) <= 4096);

template <class T>
struct Task {
  const Call<T>& call;
  int64_t t, first_support, first_query;
  int n, q;
  T *state, *work;

  __device__ Task(const Call<T>& call, int64_t t)
      : call(call),
        t(t),
        state(call.state + t * call.at.state_size),
        work(call.workspace + t * call.at.workspace_size) {
    const auto rows = [t](const MlpRows<T>& of, int64_t* first) {
      *first = of.offsets ? of.offsets[t] : t * of.max_rows;
      return static_cast<int>(of.offsets ? of.offsets[t + 1] - *first : of.max_rows);
    };
    n = rows(call.support, &first_support);
    q = rows(call.query, &first_query);
  }

  __device__ T* gram() const { return shared_memory<T>(); }
  __device__ T* exchanged(int k) const { return shared_memory<T>() + call.at.exchange + k % 2 * n * call.classes; }
  __device__ T* bias(int k) const { return shared_memory<T>() + call.at.bias + k % 2 * call.classes; }
  __device__ T* bias_moment(int k) const { return shared_memory<T>() + call.at.bias_moment + k % 2 * call.classes; }
  __device__ T* own(int i) const { return shared_memory<T>() + call.at.own + i * n * call.classes; }

  __device__ Matrix<const T> x() const { return {call.support.x + first_support * call.features, n, call.features}; }
  __device__ Matrix<const T> xq() const { return {call.query.x + first_query * call.features, q, call.features}; }
  __device__ Matrix<const T> w0() const {
    return {call.weight.start + t * call.weight.task_stride, call.classes, call.features};
  }
  // the weight of an evaluation, and its cotangent
  __device__ Matrix<T> weight(int s) const {
    return {state + call.at.w + s * call.classes * call.features, call.classes, call.features};
  }
  __device__ Matrix<T> cotangent(int s) const {
    return {work + call.at.v + s * call.classes * call.features, call.classes, call.features};
  }

  __device__ const bool* mask() const { return call.class_mask ? call.class_mask + t * call.classes : nullptr; }
  __device__ Judge<T> support_judge() const {
    return {call.loss, call.classes, call.support, first_support, n, mask()};
  }
  __device__ Judge<T> query_judge() const { return {call.loss, call.classes, call.query, first_query, q, mask()}; }
  __device__ int64_t query_rows() const {
    return call.query.offsets ? call.query.offsets[call.tasks] : call.tasks * call.query.max_rows;
  }

  // the evaluation that follows k steps, or -1
  __device__ int evaluation(int k) const { return call.every_step ? k : k == call.steps ? 0 : -1; }
  // the steps before an evaluation
  __device__ int steps_before(int s) const { return call.every_step ? s : call.steps; }
  __device__ T rate(const MlpParameter<T>& param, int k) const {
    return param.moves ? param.rate[k * param.rate_step] : T(0);
  }
};

// the sum of f(i) over i < count, by one warp
template <class F>
__device__ double warp_sum_of(int count, const F& f) {
  double total = 0;
  for (int i = threadIdx.x % kWarp; i < count; i += kWarp) total += f(i);
  return warp_sum(total);
}

}  // namespace mtml::cuda
