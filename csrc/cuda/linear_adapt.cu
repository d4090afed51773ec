// The kernels of a linear head's mlp_adapt: see cuda/linear_adapt.h. A block has a task. The features are read before
// the K steps, for the Gram matrix and the first outputs, and after them; a step is a product with the Gram matrix and
// one barrier. No atomics, and no sum depends on the number of threads or of tasks: the same bits every time, and for a
// task alone and in any batch.
#include "cuda/linear_adapt.h"

#include <algorithm>

#include "cuda/block.h"
#include "cuda/launch.h"
#include "cuda/linear_rows.h"
#include "cuda/products.h"

namespace mtml::cuda {

constexpr int kThreads = 512;
// what a block may have on every GPU from sm_80 on
constexpr int64_t kSharedLimit = 99 * 1024;

// Where the arrays of a task lie, in elements; N and Q are the largest tasks'.
struct Layout {
  // state: the Gram matrix [N, ld] and X W_0^T [N, C]; of step k p_k and F_k+1 [K, N, C], and E_k [K + 1, N, C]; the
  // bias b_k and its velocity n_k [K + 1, C]; c_k and e_k [K + 1]; the weights [S, C, D], outputs [S, Q, C] and rows'
  // losses [S, Q] of the evaluations
  int64_t ld, gram, z0, p, f, e, b, n, c, ec, w, zq, row_losses, state_size;
  // workspace: dJ/dZq [S, Q, C] and its sums over the rows [S, C]; V [S, C, D]; X V^T [S, N, C]; P_k [K, N, C]; sums
  // over the classes for the rates [K, N] each, products for those of the bias [K, C]; <V, W_0> [S]
  int64_t qd, qd_sums, v, xv, pk, yf, pz, bn, vw, workspace_size;
  int64_t shared_size, params_size;
};

template <class T>
struct Call {
  MlpOptions options;  // its widths are the host's
  int64_t features, classes, evaluations;
  MlpParameter<T> weight, bias;  // a bias without a start is none
  MlpRows<T> support, query;
  const bool* class_mask;
  T *outputs, *losses, *fast;
  const T *d_outputs, *d_losses, *d_fast;
  Layout at;
  T* state;      // [T, state_size]
  T* workspace;  // [T, workspace_size], and behind it what the tasks add to shared starts: [T, params_size]
  T* shares;
};
static_assert(sizeof(Call<double>) <= 4096);

// What the threads of a block know of its task.
template <class T>
struct Task {
  const Call<T>& call;
  const Layout& at;
  int64_t t, n, q, K, C, D;
  int64_t first_support, first_query;
  T *state, *work;
  // in shared memory: the Gram matrix, what rows hand each other in a step [2, N, C], and the bias's two numbers in
  // this step and the last [2, C] each
  T *gram, *exchange, *bias, *bias_moment;
  T* own;  // [..., N, C]: what only the thread that has a row and class reads
  T momentum, decay;
  Group group;

  __device__ Task(const Call<T>& call, int64_t t)
      : call(call),
        at(call.at),
        t(t),
        K(call.options.steps),
        C(call.classes),
        D(call.features),
        state(call.state + t * call.at.state_size),
        work(call.workspace + t * call.at.workspace_size),
        gram(shared_memory<T>()),
        momentum(static_cast<T>(call.options.momentum)),
        decay(static_cast<T>(call.options.weight_decay)),
        group(call.classes) {
    const auto rows = [t](const MlpRows<T>& of, int64_t* first) {
      *first = of.offsets ? of.offsets[t] : t * of.max_rows;
      return of.offsets ? of.offsets[t + 1] - *first : of.max_rows;
    };
    n = rows(call.support, &first_support);
    q = rows(call.query, &first_query);
    exchange = gram + call.support.max_rows * at.ld;
    bias = exchange + 2 * call.support.max_rows * C;
    bias_moment = bias + 2 * C;
    own = bias_moment + 2 * C;
  }

  __device__ T* own_array(int64_t i) const { return own + i * n * C; }
  __device__ T* exchanged(int64_t k) const { return exchange + k % 2 * n * C; }
  __device__ Matrix<const T> x() const { return {call.support.x + first_support * D, n, D}; }
  __device__ Matrix<const T> xq() const { return {call.query.x + first_query * D, q, D}; }
  __device__ Matrix<const T> w0() const { return {call.weight.start + t * call.weight.task_stride, C, D}; }
  __device__ T b0(int64_t c) const { return call.bias.start ? call.bias.start[t * call.bias.task_stride + c] : T(0); }
  __device__ const bool* mask() const { return call.class_mask ? call.class_mask + t * C : nullptr; }
  __device__ Judge<T> support_judge() const { return {call.options.loss, C, call.support, first_support, n, mask()}; }
  __device__ Judge<T> query_judge() const { return {call.options.loss, C, call.query, first_query, q, mask()}; }
  // the evaluation that follows k steps, or -1
  __device__ int64_t evaluation(int64_t k) const { return call.options.every_step ? k : k == K ? 0 : -1; }
  // the steps before an evaluation
  __device__ int64_t steps_before(int64_t s) const { return call.options.every_step ? s : K; }
  __device__ T rate(const MlpParameter<T>& param, int64_t k) const {
    return param.moves ? param.rate[k * param.rate_step] : T(0);
  }
  __device__ int64_t query_rows() const {
    return call.query.offsets ? call.query.offsets[call.options.tasks] : call.options.tasks * call.query.max_rows;
  }
};

// ---- forward

// c_k and e_k: the part of W_0 in W_k and in the velocity
template <class T>
__device__ void write_coefficients(const Task<T>& task) {
  double c = 1, e = 0;
  for (int64_t k = 0; k <= task.K; ++k) {
    task.state[task.at.c + k] = static_cast<T>(c);
    task.state[task.at.ec + k] = static_cast<T>(e);
    if (k == task.K || !task.call.weight.moves) continue;
    e = static_cast<double>(task.momentum) * e + static_cast<double>(task.decay) * c;
    c -= static_cast<double>(task.rate(task.call.weight, k)) * e;
  }
}

// b_k from D_k-1's sum over the rows; the same in every group, and one of them writes it
template <class T>
__device__ __forceinline__ T move_bias(const Task<T>& task, int64_t k, int64_t c, T sum, bool writes) {
  if (!task.call.bias.start) return 0;
  const int64_t before = (k - 1) % 2 * task.C + c, now = k % 2 * task.C + c;
  T b = task.bias[before], moment = task.bias_moment[before];
  if (task.call.bias.moves) {
    moment = task.momentum * moment + sum + task.decay * b;
    b -= task.rate(task.call.bias, k - 1) * moment;
  }
  if (writes) {
    task.bias[now] = b;
    task.bias_moment[now] = moment;
    task.state[task.at.b + k * task.C + c] = b;
    task.state[task.at.n + k * task.C + c] = moment;
  }
  return b;
}

// D_k of the rows and classes of a thread, handed to the others in exchanged(k), and what follows from it alone
template <class T>
__device__ void step(const Task<T>& task, const Judge<T>& judge, int64_t k) {
  const int64_t C = task.C, n = task.n;
  const bool moves = task.call.weight.moves, has_momentum = task.momentum != 0;
  T *zw = task.own_array(0), *e = task.own_array(1), *v = task.own_array(2), *f = task.own_array(3);
  T* out = task.exchanged(k);
  const T* last = task.exchanged(k + 1);
  const T rate = task.rate(task.call.weight, k), rate_before = k ? task.rate(task.call.weight, k - 1) : T(0);
  T* p_to = task.state + task.at.p + k * n * C;
  T* f_to = task.state + task.at.f + k * n * C;
  T* e_to = task.state + task.at.e + (k + 1) * n * C;
  task.group.for_rows(n, [&](int64_t first) {
    for (int64_t c = task.group.lane; c < C; c += task.group.lanes) {
      T moved[kGroupRows] = {}, sum = 0;
      if (k > 0) gram_times(task.gram, task.at.ld, last, n, C, moves ? first : n, c, moved, sum);
      const T b = k > 0 ? move_bias(task, k, c, sum, first == 0) : task.bias[c];
      for (int r = 0; r < kGroupRows; ++r) {
        const int64_t i = (first + r) * C + c;
        if (first + r >= n) continue;
        if (moves && k > 0) {
          T velocity = moved[r] + task.decay * zw[i];
          if (has_momentum) velocity = v[i] = task.momentum * v[i] + velocity;
          zw[i] -= rate_before * velocity;
        }
        out[i] = zw[i] + b;
      }
    }
    T losses[kGroupRows];
    const auto z = [&](int64_t row, int64_t c) { return out[row * C + c]; };
    const auto put = [&](int64_t row, int64_t c, T p, T d) {
      const int64_t i = row * C + c;
      T factor = d - task.decay * e[i];
      if (has_momentum) factor = f[i] = task.momentum * f[i] + factor;
      if (!moves) factor = 0;
      e[i] += rate * factor;
      p_to[i] = p;
      f_to[i] = factor;
      e_to[i] = e[i];
      out[i] = d;
    };
    loss_rows<false>(judge, task.group, first, z, put, losses);
  });
}

template <class T>
__device__ void query_results(const Task<T>& task, const Judge<T>& judge) {
  const Call<T>& call = task.call;
  const int64_t C = task.C, all_rows = task.query_rows();
  const T nothing = call.options.loss == Loss::kCrossEntropy ? -static_cast<T>(INFINITY) : T(0);
  for (int64_t s = 0; s < call.evaluations; ++s) {
    const T* zq = task.state + task.at.zq + s * task.q * C;
    if (call.outputs) {
      T* outputs = call.outputs + (s * all_rows + task.first_query) * C;
      for (int64_t i = threadIdx.x; i < task.q * C; i += blockDim.x) outputs[i] = judge.has(i % C) ? zq[i] : nothing;
    }
    if (!call.losses || !judge.labelled()) continue;
    T* to = task.state + task.at.row_losses + s * task.q;
    task.group.for_rows(task.q, [&](int64_t first) {
      T losses[kGroupRows];
      const auto z = [&](int64_t row, int64_t c) { return zq[row * C + c]; };
      loss_rows<true>(judge, task.group, first, z, [](int64_t, int64_t, T, T) {}, losses);
      for (int r = 0; r < kGroupRows; ++r)
        if (task.group.lane == 0 && first + r < task.q) to[first + r] = losses[r];
    });
  }
}

// the sum of f(i) over i < count, by one warp
template <class F>
__device__ double warp_sum_of(int64_t count, const F& f) {
  double total = 0;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) total += f(i);
  return warp_sum(total);
}

template <class T>
__global__ void __launch_bounds__(kThreads) linear_adapt(const __grid_constant__ Call<T> call) {
  for (int64_t t = blockIdx.x; t < call.options.tasks; t += gridDim.x) {
    const Task<T> task(call, t);
    const Layout& at = call.at;
    const int64_t n = task.n, C = task.C;
    T* const state = task.state;
    const bool has_momentum = task.momentum != 0;
    const Judge<T> support = task.support_judge(), query = task.query_judge();

    const auto put_gram = [&](int64_t i, int64_t j, T value) {
      task.gram[i * at.ld + j] = task.gram[j * at.ld + i] = value;
      state[at.gram + i * at.ld + j] = state[at.gram + j * at.ld + i] = value;
    };
    const auto put_z = [&](int64_t i, int64_t j, T value) {
      task.own_array(0)[i * C + j] = state[at.z0 + i * C + j] = value;
    };
    const int64_t turn = row_dots(task.x(), task.x(), true, 0, put_gram);
    row_dots(task.x(), task.w0(), false, turn, put_z);
    for (int64_t i = threadIdx.x; i < n * C; i += blockDim.x) {
      state[at.e + i] = task.own_array(1)[i] = 0;
      if (has_momentum) task.own_array(2)[i] = task.own_array(3)[i] = 0;
    }
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
      state[at.b + c] = task.bias[c] = task.b0(c);
      state[at.n + c] = task.bias_moment[c] = 0;
    }
    if (threadIdx.x == 0) write_coefficients(task);
    __syncthreads();

    for (int64_t k = 0; k < task.K; ++k) {
      step(task, support, k);
      __syncthreads();
    }
    for (int64_t c = threadIdx.x; c < C && task.K > 0; c += blockDim.x) {
      T sum = 0;
      for (int64_t m = 0; m < n; ++m) sum += task.exchanged(task.K + 1)[m * C + c];
      move_bias(task, task.K, c, sum, true);
    }

    // W_k = c_k W_0 - E_k^T X
    for (int64_t s = 0; s < call.evaluations; ++s) {
      const int64_t k = task.steps_before(s);
      const Matrix<T> w(state + at.w + s * C * task.D, C, task.D);
      combine(w, [&](Tile<T>& tile) {
        tile.add_rows(state[at.c + k], task.w0());
        tile.add(T(-1), state + at.e + k * n * C, 1, C, task.x());
      });
    }
    __syncthreads();

    const int64_t evaluations_of_classes = call.evaluations * C;
    const Matrix<const T> weights(state + at.w, evaluations_of_classes, task.D);
    row_dots(task.xq(), weights, false, 0, [&](int64_t i, int64_t j, T value) {
      const int64_t s = j / C, c = j % C;
      const T b = call.bias.start ? state[at.b + task.steps_before(s) * C + c] : T(0);
      state[at.zq + (s * task.q + i) * C + c] = value + b;
    });
    if (call.fast) {
      T* fast = call.fast + t * at.params_size;
      const T* last = state + at.w + (call.evaluations - 1) * C * task.D;
      for (int64_t i = threadIdx.x; i < C * task.D; i += blockDim.x) fast[i] = last[i];
      for (int64_t c = threadIdx.x; c < C && call.bias.start; c += blockDim.x)
        fast[C * task.D + c] = state[at.b + task.K * C + c];
    }
    __syncthreads();

    query_results(task, query);
    __syncthreads();

    for (int64_t s = threadIdx.x / kWarp; s < call.evaluations && call.losses; s += blockDim.x / kWarp) {
      const T* rows = state + at.row_losses + s * task.q;
      const double sum = warp_sum_of(query.labelled() ? task.q : 0, [&](int64_t i) { return rows[i]; });
      if (threadIdx.x % kWarp == 0) call.losses[s * call.options.tasks + t] = static_cast<T>(sum / query.terms);
    }
  }
}

// ---- backward: V_s is the cotangent of an evaluation's weight, U_k that of W_k, R_k that of the velocity

// dJ/dZq
template <class T>
__device__ void query_cotangents(const Task<T>& task, const Judge<T>& judge) {
  const Call<T>& call = task.call;
  const int64_t C = task.C, all_rows = task.query_rows();
  for (int64_t s = 0; s < call.evaluations; ++s) {
    const T* zq = task.state + task.at.zq + s * task.q * C;
    const T* own = call.d_outputs ? call.d_outputs + (s * all_rows + task.first_query) * C : nullptr;
    T* qd = task.work + task.at.qd + s * task.q * C;
    if (!call.d_losses || !judge.labelled()) {
      for (int64_t i = threadIdx.x; i < task.q * C; i += blockDim.x) qd[i] = own && judge.has(i % C) ? own[i] : T(0);
      continue;
    }
    const T weight = call.d_losses[s * call.options.tasks + task.t];
    task.group.for_rows(task.q, [&](int64_t first) {
      T losses[kGroupRows];
      const auto z = [&](int64_t row, int64_t c) { return zq[row * C + c]; };
      const auto put = [&](int64_t row, int64_t c, T, T d) {
        qd[row * C + c] = weight * d + (own && judge.has(c) ? own[row * C + c] : T(0));
      };
      loss_rows<false>(judge, task.group, first, z, put, losses);
    });
  }
}

// The bias's part of R_k+1, from the sum of P_k+1 over the rows; kept is its part of U_k but for what P_k adds.
template <class T>
__device__ __forceinline__ T move_bias_back(const Task<T>& task, int64_t k, int64_t c, T sum, bool writes) {
  if (!task.call.bias.start) return 0;
  const int64_t before = (k + 1) % 2 * task.C + c, now = k % 2 * task.C + c;
  T u = task.bias[before] + sum, r = 0;
  if (k + 1 < task.K && task.evaluation(k + 1) >= 0) u += task.work[task.at.qd_sums + (k + 1) * task.C + c];
  if (task.call.bias.moves) r = task.momentum * task.bias_moment[before] - task.rate(task.call.bias, k) * u;
  if (writes) {
    task.bias[now] = task.call.bias.moves ? u + task.decay * r : u;
    task.bias_moment[now] = r;
    task.work[task.at.bn + k * task.C + c] = u * task.state[task.at.n + (k + 1) * task.C + c];
  }
  return r;
}

// P_k, the cotangent of Z_k, of the rows and classes of a thread, handed to the others in exchanged(k)
template <class T>
__device__ void step_back(const Task<T>& task, const Judge<T>& judge, int64_t k) {
  const Call<T>& call = task.call;
  const int64_t C = task.C, n = task.n;
  const bool moves = call.weight.moves, second_order = !call.options.first_order;
  const bool sums_f = call.weight.rate_sums && moves, sums_z = sums_f && second_order && task.decay != 0;
  T *xu = task.own_array(0), *z0 = task.own_array(1), *xr = task.own_array(2);
  T* out = task.exchanged(k);
  const T* last = task.exchanged(k + 1);
  const T rate = task.rate(call.weight, k), c_k = task.state[task.at.c + k];
  const T* p = task.state + task.at.p + k * n * C;
  const T* f = task.state + task.at.f + k * n * C;
  const T* z_start = task.state + task.at.z0;
  T* pk = call.support.x_gradient ? task.work + task.at.pk + k * n * C : nullptr;
  const int64_t evaluation = task.evaluation(k + 1);
  const T* xv = evaluation >= 0 ? task.work + task.at.xv + evaluation * n * C : nullptr;
  task.group.for_rows(n, [&](int64_t first) {
    T with_f[kGroupRows] = {}, with_z[kGroupRows] = {};
    for (int64_t c = task.group.lane; c < C; c += task.group.lanes) {
      T moved[kGroupRows] = {}, sum = 0;
      if (k + 1 < task.K && second_order)
        gram_times(task.gram, task.at.ld, last, n, C, moves ? first : n, c, moved, sum);
      const T r_bias = move_bias_back(task, k, c, sum, first == 0);
      for (int r = 0; r < kGroupRows; ++r) {
        const int64_t i = (first + r) * C + c;
        if (first + r >= n) continue;
        out[i] = r_bias;
        if (!moves) continue;
        T u = k + 1 < task.K ? xu[i] + moved[r] : T(0);
        if (xv) u += xv[i];
        T along = -rate * u;
        if (task.momentum != 0) along = xr[i] = along + task.momentum * xr[i];
        xu[i] = u + task.decay * along;
        out[i] += along;
        with_f[r] += u * f[i];
      }
    }
    if (second_order) {
      const auto p_of = [&](int64_t row, int64_t c) { return p[row * C + c]; };
      const auto rz = [&](int64_t row, int64_t c) { return out[row * C + c]; };
      const auto put = [&](int64_t row, int64_t c, T value) {
        const int64_t i = row * C + c;
        out[i] = value;
        z0[i] += c_k * value;
        if (pk) pk[i] = value;
        if (sums_z) with_z[row - first] += value * z_start[i];
      };
      tangent_rows(judge, task.group, first, p_of, rz, put);
    }
    const auto write_sums = [&](T(&sums)[kGroupRows], int64_t to) {
      group_sum(task.group, sums);
      for (int r = 0; r < kGroupRows; ++r)
        if (task.group.lane == 0 && first + r < n) task.work[to + k * n + first + r] = sums[r];
    };
    if (sums_f) write_sums(with_f, task.at.yf);
    if (sums_z) write_sums(with_z, task.at.pz);
  });
}

// da_k = -<U_k+1, velocity k+1>, the weight's by its part in X and its part in W_0; by one warp
template <class T>
__device__ void rate_gradients(const Task<T>& task) {
  const Call<T>& call = task.call;
  const int64_t K = task.K, lane = threadIdx.x % kWarp;
  const T *state = task.state, *work = task.work;
  const bool decays = task.decay != 0, second_order = !call.options.first_order;
  // <U_k, W_0> and <R_k, W_0>
  double u = decays && call.weight.rate_sums ? work[task.at.vw + call.evaluations - 1] : T(0), r = 0;
  for (int64_t k = K - 1; k >= 0 && call.weight.rate_sums; --k) {
    double sum = 0;
    if (call.weight.moves) {
      sum = warp_sum_of(task.n, [&](int64_t i) { return work[task.at.yf + k * task.n + i]; });
      if (decays) {
        sum += static_cast<double>(state[task.at.ec + k + 1]) * u;
        r = task.momentum * r - task.rate(call.weight, k) * u;
        u += task.decay * r;
        if (second_order) u += warp_sum_of(task.n, [&](int64_t i) { return work[task.at.pz + k * task.n + i]; });
        if (task.evaluation(k) >= 0) u += work[task.at.vw + task.evaluation(k)];
      }
    }
    if (lane == 0) call.weight.rate_sums[task.t * K + k] = -sum;
  }
  for (int64_t k = 0; k < K && call.bias.rate_sums; ++k) {
    const double sum =
        warp_sum_of(call.bias.moves ? task.C : 0, [&](int64_t c) { return work[task.at.bn + k * task.C + c]; });
    if (lane == 0) call.bias.rate_sums[task.t * K + k] = -sum;
  }
}

// H + H^T of H = -sum_k P_k E_k^T, the cotangent of the Gram matrix, in its place
template <class T>
__device__ void gram_cotangent(const Task<T>& task) {
  constexpr int kSide = 4;
  const int64_t n = task.n, C = task.C, sides = (n + kSide - 1) / kSide;
  for (int64_t tile = threadIdx.x; tile < sides * sides; tile += blockDim.x) {
    const int64_t i0 = tile / sides * kSide, j0 = tile % sides * kSide;
    if (j0 > i0) continue;
    T sums[kSide][kSide] = {};
    // E_0 is zero
    for (int64_t k = 1; k < task.K; ++k) {
      const T* p = task.work + task.at.pk + k * n * C;
      const T* e = task.state + task.at.e + k * n * C;
      for (int64_t c = 0; c < C; ++c) {
        T pi[kSide], pj[kSide], ei[kSide], ej[kSide];
        for (int s = 0; s < kSide; ++s) {
          const int64_t i = (i0 + s < n ? i0 + s : n - 1) * C + c, j = (j0 + s < n ? j0 + s : n - 1) * C + c;
          pi[s] = p[i], ei[s] = e[i], pj[s] = p[j], ej[s] = e[j];
        }
        for (int i = 0; i < kSide; ++i)
          for (int j = 0; j < kSide; ++j) sums[i][j] -= pi[i] * ej[j] + pj[j] * ei[i];
      }
    }
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j)
        if (i0 + i < n && j0 + j <= i0 + i)
          task.gram[(i0 + i) * task.at.ld + j0 + j] = task.gram[(j0 + j) * task.at.ld + i0 + i] = sums[i][j];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) linear_adapt_backward(const __grid_constant__ Call<T> call) {
  for (int64_t t = blockIdx.x; t < call.options.tasks; t += gridDim.x) {
    const Task<T> task(call, t);
    const Layout& at = call.at;
    const int64_t n = task.n, C = task.C, D = task.D, K = task.K, S = call.evaluations;
    T *const state = task.state, *const work = task.work;
    const bool second_order = !call.options.first_order, moves = call.weight.moves;
    const int64_t warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const T* d_fast = call.d_fast ? call.d_fast + t * at.params_size : nullptr;
    const Judge<T> support = task.support_judge(), query = task.query_judge();
    const auto weight_of = [&](int64_t s) { return Matrix<const T>(state + at.w + s * C * D, C, D); };
    const auto cotangent_of = [&](int64_t s) { return Matrix<const T>(work + at.v + s * C * D, C, D); };

    query_cotangents(task, query);
    for (int64_t i = threadIdx.x; i < n * at.ld && second_order && moves; i += blockDim.x)
      task.gram[i] = state[at.gram + i];
    for (int64_t i = threadIdx.x; i < n * C; i += blockDim.x) {
      task.own_array(1)[i] = 0;
      if (task.momentum != 0) task.own_array(2)[i] = 0;
    }
    __syncthreads();

    // V_s = Qd_s^T Xq
    for (int64_t s = 0; s < S; ++s) {
      combine(Matrix<T>(work + at.v + s * C * D, C, D), [&](Tile<T>& tile) {
        if (d_fast && s == S - 1) tile.add_rows(T(1), {d_fast, C, D});
        tile.add(T(1), work + at.qd + s * task.q * C, 1, C, task.xq());
      });
    }
    for (int64_t i = warp; i < S * C; i += warps) {
      const T* qd = work + at.qd + i / C * task.q * C + i % C;
      const double sum = warp_sum_of(task.q, [&](int64_t row) { return qd[row * C]; });
      if (threadIdx.x % kWarp == 0) work[at.qd_sums + i] = static_cast<T>(sum);
    }
    if (call.query.x_gradient) {
      combine(Matrix<T>(call.query.x_gradient + task.first_query * D, task.q, D), [&](Tile<T>& tile) {
        for (int64_t s = 0; s < S; ++s) tile.add(T(1), work + at.qd + s * task.q * C, C, 1, weight_of(s));
      });
    }
    __syncthreads();

    row_dots(task.x(), Matrix<const T>(work + at.v, S * C, D), false, 0,
             [&](int64_t i, int64_t j, T value) { work[at.xv + (j / C * n + i) * C + j % C] = value; });
    for (int64_t s = warp; s < S && call.weight.rate_sums && task.decay != 0; s += warps) {
      const T *v = cotangent_of(s).start, *w0 = task.w0().start;
      const double sum = warp_sum_of(C * D, [&](int64_t i) { return v[i] * w0[i]; });
      if (threadIdx.x % kWarp == 0) work[at.vw + s] = static_cast<T>(sum);
    }
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
      task.bias[K % 2 * C + c] =
          work[at.qd_sums + (S - 1) * C + c] + (d_fast && call.bias.start ? d_fast[C * D + c] : T(0));
      task.bias_moment[K % 2 * C + c] = 0;
    }
    __syncthreads();

    for (int64_t k = K - 1; k >= 0; --k) {
      step_back(task, support, k);
      __syncthreads();
    }

    T* const share = call.shares + t * ((at.params_size + 3) / 4 * 4);
    if (call.support.x_gradient && second_order && moves) gram_cotangent(task);
    if (call.bias.gradient) {
      T* gradient = call.bias.task_stride ? call.bias.gradient + t * C : share + C * D;
      for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
        T u = task.bias[c];
        for (int64_t m = 0; m < n && second_order && K > 0; ++m) u += task.exchanged(0)[m * C + c];
        if (K > 0 && task.evaluation(0) >= 0) u += work[at.qd_sums + c];
        gradient[c] = u;
      }
    }
    __syncthreads();

    const T* z0 = task.own_array(1);
    if (call.weight.gradient) {
      T* gradient = call.weight.task_stride ? call.weight.gradient + t * C * D : share;
      combine(Matrix<T>(gradient, C, D), [&](Tile<T>& tile) {
        for (int64_t s = 0; s < S; ++s) tile.add_rows(state[at.c + task.steps_before(s)], cotangent_of(s));
        if (second_order) tile.add(T(1), z0, 1, C, task.x());
      });
    }
    if (call.support.x_gradient) {
      combine(Matrix<T>(call.support.x_gradient + task.first_support * D, n, D), [&](Tile<T>& tile) {
        if (!second_order) return;
        tile.add(T(1), z0, C, 1, task.w0());
        if (!moves) return;
        tile.add(T(1), task.gram, at.ld, 1, task.x());
        for (int64_t s = 0; s < S; ++s)
          tile.add(T(-1), state + at.e + task.steps_before(s) * n * C, C, 1, cotangent_of(s));
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
  const int64_t size = call.at.params_size, stride = (size + 3) / 4 * 4, weights = call.classes * call.features;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const MlpParameter<T>& param = i < weights ? call.weight : call.bias;
    if (!param.gradient || param.task_stride) continue;
    double total = 0;
    for (int64_t t = 0; t < call.options.tasks;) {
      T part = 0;
      for (int n = 0; n < kShortSum && t < call.options.tasks; ++n, ++t) part += call.shares[t * stride + i];
      total += part;
    }
    param.gradient[i < weights ? i : i - weights] = static_cast<T>(total);
  }
}

// ---- the host's side

template <class T>
Call<T> call_of(const MlpArguments<T>& a) {
  Call<T> call{};
  call.options = a.options;
  call.features = a.options.widths[0];
  call.classes = a.options.widths[1];
  call.evaluations = a.options.every_step ? a.options.steps + 1 : 1;
  call.weight = a.params[0];
  if (a.options.bias) call.bias = a.params[1];
  call.support = a.support;
  call.query = a.query;
  call.class_mask = a.class_mask;
  call.outputs = a.outputs, call.losses = a.losses, call.fast = a.fast;
  call.d_outputs = a.d_outputs, call.d_losses = a.d_losses, call.d_fast = a.d_fast;

  const int64_t N = a.support.max_rows, Q = a.query.max_rows, K = a.options.steps;
  const int64_t C = call.classes, D = call.features, S = call.evaluations;
  Layout& at = call.at;
  int64_t next = 0;
  // every array begins at a multiple of 16 bytes
  const auto place = [&](int64_t size) {
    const int64_t start = next;
    next += (size + 3) / 4 * 4;
    return start;
  };
  at.ld = (N + kGroupRows - 1) / kGroupRows * kGroupRows;
  at.gram = place(N * at.ld), at.z0 = place(N * C);
  at.p = place(K * N * C), at.f = place(K * N * C), at.e = place((K + 1) * N * C);
  at.b = place((K + 1) * C), at.n = place((K + 1) * C), at.c = place(K + 1), at.ec = place(K + 1);
  at.w = place(S * C * D), at.zq = place(S * Q * C), at.row_losses = place(S * Q);
  at.state_size = next;
  next = 0;
  at.qd = place(S * Q * C), at.qd_sums = place(S * C), at.v = place(S * C * D), at.xv = place(S * N * C);
  at.pk = place(K * N * C), at.yf = place(K * N), at.pz = place(K * N), at.bn = place(K * C), at.vw = place(S);
  at.workspace_size = next;
  const int64_t arrays = a.options.momentum != 0 ? 6 : 4;
  at.shared_size = N * at.ld + arrays * N * C + 4 * C;
  at.params_size = C * D + (a.options.bias ? C : 0);
  return call;
}

template <class T>
bool serves(const MlpArguments<T>& a) {
  if (a.options.layers != 1 || a.options.clip < INFINITY) return false;
  const auto served = [](const MlpParameter<T>& param) { return !param.moves || param.rate_element == 0; };
  if (!served(a.params[0]) || (a.options.bias && !served(a.params[1]))) return false;
  return call_of(a).at.shared_size * static_cast<int64_t>(sizeof(T)) <= kSharedLimit;
}

// as many as have a tile of the largest product
template <class T>
int threads_of(const Call<T>& call) {
  const int64_t rows = std::max({call.classes, call.support.max_rows, call.query.max_rows});
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows * ((call.features + Pack<T>::kSize - 1) / Pack<T>::kSize);
  return static_cast<int>((std::clamp<int64_t>(tiles, 2 * kWarp, kThreads) + kWarp - 1) / kWarp * kWarp);
}

template <class T>
int64_t state_size(const MlpArguments<T>& a) {
  return a.options.tasks * call_of(a).at.state_size;
}

template <class T>
int64_t workspace_size(const MlpArguments<T>& a) {
  const Layout at = call_of(a).at;
  return a.options.tasks * (at.workspace_size + (at.params_size + 3) / 4 * 4);
}

template <class T>
int forward(const MlpArguments<T>& a, T* state, void* stream) {
  Call<T> call = call_of(a);
  call.state = state;
  return launch(linear_adapt<T>, a.options.tasks, threads_of(call),
                call.at.shared_size * static_cast<int64_t>(sizeof(T)), static_cast<cudaStream_t>(stream), call);
}

template <class T>
int backward(const MlpArguments<T>& a, const T* state, T* workspace, void* stream) {
  Call<T> call = call_of(a);
  // the backward kernel only reads it
  call.state = const_cast<T*>(state);
  call.workspace = workspace;
  call.shares = workspace + a.options.tasks * call.at.workspace_size;
  const cudaError_t error =
      launch(linear_adapt_backward<T>, a.options.tasks, threads_of(call),
             call.at.shared_size * static_cast<int64_t>(sizeof(T)), static_cast<cudaStream_t>(stream), call);
  const auto shared = [](const MlpParameter<T>& param) { return param.gradient && !param.task_stride; };
  if (error != cudaSuccess || !(shared(call.weight) || shared(call.bias))) return error;
  constexpr int kThreadsOfSums = 128;
  const int64_t blocks = (call.at.params_size + kThreadsOfSums - 1) / kThreadsOfSums;
  return launch(linear_adapt_sums<T>, blocks, kThreadsOfSums, 0, static_cast<cudaStream_t>(stream), call);
}

}  // namespace mtml::cuda

extern "C" {

#define MTML_LINEAR_ADAPT(T, suffix)                                                                            \
  int mtml_cuda_linear_adapt_serves_##suffix(const mtml::MlpArguments<T>* a) { return mtml::cuda::serves(*a); } \
  int64_t mtml_cuda_linear_adapt_state_size_##suffix(const mtml::MlpArguments<T>* a) {                          \
    return mtml::cuda::state_size(*a);                                                                          \
  }                                                                                                             \
  int64_t mtml_cuda_linear_adapt_workspace_size_##suffix(const mtml::MlpArguments<T>* a) {                      \
    return mtml::cuda::workspace_size(*a);                                                                      \
  }                                                                                                             \
  int mtml_cuda_linear_adapt_forward_##suffix(const mtml::MlpArguments<T>* a, T* state, void* stream) {         \
    return mtml::cuda::forward(*a, state, stream);                                                              \
  }                                                                                                             \
  int mtml_cuda_linear_adapt_backward_##suffix(const mtml::MlpArguments<T>* a, const T* state, T* workspace,    \
                                               void* stream) {                                                  \
    return mtml::cuda::backward(*a, state, workspace, stream);                                                  \
  }

MTML_LINEAR_ADAPT(float, f32)
MTML_LINEAR_ADAPT(double, f64)
#undef MTML_LINEAR_ADAPT

}  // extern "C"
