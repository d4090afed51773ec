// The host's side of linear_adapt: see cuda/linear_adapt.h. A block has a task. The features are read before the K
// steps, for the Gram matrix and the first outputs, and after them; a step is a product with the Gram matrix and one
// barrier. No atomics, and no sum depends on the number of threads or of tasks: the same bits every time, and for a
// task alone and in any batch.
#include "cuda/linear_adapt.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/launch.h"
#include "cuda/linear_backward.h"
#include "cuda/linear_forward.h"

namespace mtml::cuda {

// what a block may have on every GPU from sm_80 on
constexpr int64_t kSharedLimit = 99 * 1024;

// Arrays one behind the other, each from a multiple of 16 bytes on.
struct Places {
  int64_t size = 0;
  int add(int64_t count) {
    const int64_t start = size;
    size += (count + 3) / 4 * 4;
    return static_cast<int>(start);
  }
};

Layout layout_of(const MlpOptions& options, int64_t N, int64_t Q) {
  const int64_t D = options.widths[0], C = options.widths[1], K = options.steps;
  const int64_t S = options.every_step ? K + 1 : 1;
  const int64_t ld = (N + kGroupRows - 1) / kGroupRows * kGroupRows;
  Layout at{};
  at.ld = static_cast<int>(ld);
  Places state, workspace, shared;
  at.gram = state.add(N * ld), at.z0 = state.add(N * C);
  at.p = state.add(K * N * C), at.f = state.add(K * N * C), at.e = state.add((K + 1) * N * C);
  at.b = state.add((K + 1) * C), at.n = state.add((K + 1) * C), at.c = state.add(K + 1), at.ec = state.add(K + 1);
  at.w = state.add(S * C * D), at.zq = state.add(S * Q * C), at.row_losses = state.add(S * Q);
  at.qd = workspace.add(S * Q * C), at.qd_sums = workspace.add(S * C), at.v = workspace.add(S * C * D);
  at.xv = workspace.add(S * N * C), at.pk = workspace.add(K * N * C), at.yf = workspace.add(K * N);
  at.pz = workspace.add(K * N), at.bn = workspace.add(K * C), at.vw = workspace.add(S);
  shared.add(N * ld);
  at.exchange = shared.add(2 * N * C), at.bias = shared.add(2 * C), at.bias_moment = shared.add(2 * C);
  at.own = shared.add((options.momentum != 0 ? 4 : 2) * N * C);
  Places share;
  at.params_size = static_cast<int>(C * D + (options.bias ? C : 0));
  share.add(at.params_size);
  at.share_size = static_cast<int>(share.size);
  at.state_size = state.size, at.workspace_size = workspace.size, at.shared_size = shared.size;
  return at;
}

template <class T>
Layout layout_of(const MlpArguments<T>& a) {
  return layout_of(a.options, a.support.max_rows, a.query.max_rows);
}

template <class T>
bool serves(const MlpArguments<T>& a) {
  const MlpOptions& o = a.options;
  if (o.layers != 1 || o.clip < INFINITY) return false;
  for (int64_t p = 0; p < a.num_params; ++p)
    if (a.params[p].moves && a.params[p].rate_element != 0) return false;
  const Layout at = layout_of(a);
  // within a task the kernels count in int
  const int64_t rows = std::max(a.support.max_rows, a.query.max_rows);
  const int64_t largest = std::max({at.state_size, at.workspace_size, rows * o.widths[0]});
  return largest <= std::numeric_limits<int>::max() && at.shared_size * static_cast<int64_t>(sizeof(T)) <= kSharedLimit;
}

template <class T>
Call<T> call_of(const MlpArguments<T>& a, const T* state) {
  const MlpOptions& o = a.options;
  Call<T> call{};
  call.tasks = o.tasks;
  call.features = static_cast<int>(o.widths[0]), call.classes = static_cast<int>(o.widths[1]);
  call.steps = static_cast<int>(o.steps), call.evaluations = o.every_step ? call.steps + 1 : 1;
  call.loss = o.loss;
  call.second_order = !o.first_order, call.every_step = o.every_step;
  call.momentum = static_cast<T>(o.momentum), call.decay = static_cast<T>(o.weight_decay);
  call.weight = a.params[0];
  if (o.bias) call.bias = a.params[1];
  call.support = a.support, call.query = a.query, call.class_mask = a.class_mask;
  call.outputs = a.outputs, call.losses = a.losses, call.fast = a.fast;
  call.d_outputs = a.d_outputs, call.d_losses = a.d_losses, call.d_fast = a.d_fast;
  call.at = layout_of(a);
  // the backward kernel only reads it
  call.state = const_cast<T*>(state);
  return call;
}

// One block a task, of as many threads as the largest product of rows has tiles.
template <class T>
cudaError_t launch_tasks(void (*kernel)(Call<T>), const MlpArguments<T>& a, const Call<T>& call, void* stream) {
  const int64_t rows = std::max({a.options.widths[1], a.support.max_rows, a.query.max_rows});
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows * ((call.features + Pack<T>::kSize - 1) / Pack<T>::kSize);
  const int64_t warps = (std::clamp<int64_t>(tiles, 2 * kWarp, kThreads) + kWarp - 1) / kWarp;
  return launch(kernel, call.tasks, static_cast<int>(warps * kWarp),
                call.at.shared_size * static_cast<int64_t>(sizeof(T)), static_cast<cudaStream_t>(stream), call);
}

template <class T>
int backward(const MlpArguments<T>& a, const T* state, T* workspace, void* stream) {
  Call<T> call = call_of(a, state);
  call.workspace = workspace;
  call.shares = workspace + call.tasks * call.at.workspace_size;
  const cudaError_t error = launch_tasks(linear_adapt_backward<T>, a, call, stream);
  const auto shared = [](const MlpParameter<T>& param) { return param.gradient && !param.task_stride; };
  if (error != cudaSuccess || !(shared(call.weight) || shared(call.bias))) return error;
  constexpr int kThreadsOfSums = 128;
  const int64_t blocks = (call.at.params_size + kThreadsOfSums - 1) / kThreadsOfSums;
  return launch(linear_adapt_sums<T>, blocks, kThreadsOfSums, 0, static_cast<cudaStream_t>(stream), call);
}

}  // namespace mtml::cuda

extern "C" {

#define MTML_LINEAR_ADAPT(T, type)                                                                            \
  int mtml_cuda_linear_adapt_serves_##type(const mtml::MlpArguments<T>* a) { return mtml::cuda::serves(*a); } \
  int64_t mtml_cuda_linear_adapt_state_size_##type(const mtml::MlpArguments<T>* a) {                          \
    return a->options.tasks * mtml::cuda::layout_of(*a).state_size;                                           \
  }                                                                                                           \
  int64_t mtml_cuda_linear_adapt_workspace_size_##type(const mtml::MlpArguments<T>* a) {                      \
    const mtml::cuda::Layout at = mtml::cuda::layout_of(*a);                                                  \
    return a->options.tasks * (at.workspace_size + at.share_size);                                            \
  }                                                                                                           \
  int mtml_cuda_linear_adapt_forward_##type(const mtml::MlpArguments<T>* a, T* state, void* stream) {         \
    return mtml::cuda::launch_tasks(mtml::cuda::linear_adapt<T>, *a, mtml::cuda::call_of(*a, state), stream); \
  }                                                                                                           \
  int mtml_cuda_linear_adapt_backward_##type(const mtml::MlpArguments<T>* a, const T* state, T* workspace,    \
                                             void* stream) {                                                  \
    return mtml::cuda::backward(*a, state, workspace, stream);                                                \
  }

MTML_LINEAR_ADAPT(float, f32)
MTML_LINEAR_ADAPT(double, f64)
#undef MTML_LINEAR_ADAPT

}  // extern "C"
