// The kernels of mlp_adapt: see cuda/mlp_adapt.h. A block has a task, and goes with it through all steps; what fits of
// a task's arrays lies in shared memory. What tasks add up lies in the workspace, task after task, and a second kernel
// adds it in their order: no atomics, so the same bits every time, and for a task alone and in any batch.
#include "cuda/mlp_adapt.h"

#include <algorithm>

#include "cuda/block.h"
#include "cuda/launch.h"
#include "cuda/mlp_backward.h"
#include "cuda/mlp_forward.h"
#include "cuda/mlp_plan.h"

namespace mtml::cuda {

template <class T>
__device__ T* shared_rooms(const Network<T>& network, double** room) {
  *room = shared_memory<double>();
  return reinterpret_cast<T*>(*room + network.shared_doubles);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) mlp_adapt(const __grid_constant__ Network<T> network) {
  double* room;
  T* shared = shared_rooms(network, &room);
  for (int64_t t = blockIdx.x; t < network.tasks; t += gridDim.x) {
    if (t != blockIdx.x) {
      // whoever still reads what the last task left in shared memory
      __syncthreads();
    }
    Sweep<T>(network, t, shared, room).forward();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) mlp_adapt_backward(const __grid_constant__ Network<T> network) {
  double* room;
  T* shared = shared_rooms(network, &room);
  for (int64_t t = blockIdx.x; t < network.tasks; t += gridDim.x) {
    if (t != blockIdx.x) {
      // whoever still reads what the last task left in shared memory
      __syncthreads();
    }
    Sweep<T>(network, t, shared, room).backward();
  }
}

// the sum over tasks of x[t * stride]
template <class T>
__device__ T sum_over_tasks(const T* x, int64_t stride, int64_t tasks) {
  double total = 0;
  for (int64_t t = 0; t < tasks;) {
    T part = 0;
    const int64_t end = t + kShortSum < tasks ? t + kShortSum : tasks;
    for (; t < end; ++t) part += x[t * stride];
    total += part;
  }
  return static_cast<T>(total);
}

// A thread for each element of the parameters that tasks share, then of the rates that are one for each element, then
// of the table of rates.
template <class T>
__global__ void __launch_bounds__(kThreads)
    mlp_adapt_sums(const __grid_constant__ Network<T> network, int64_t elements) {
  const Network<T>& c = network;
  for (int64_t block = blockIdx.x; block * kThreads < elements; block += gridDim.x) {
    int64_t i = block * kThreads + threadIdx.x;
    for (int p = 0; p < c.num_params; ++p) {
      const Param<T>& param = c.params[p];
      // a weight's rows are padded in a parameter vector
      const int64_t columns = param.kind == kWeight ? c.layers[param.layer].in : param.size;
      const int64_t ld = param.kind == kWeight ? c.layers[param.layer].ld_weight : param.size;
      const auto place = [&](int64_t element) {
        return c.layers[param.layer].at[param.kind] + element / columns * ld + element % columns;
      };
      const int64_t size = param.gradient && param.task_stride == 0 ? param.size : 0;
      if (i >= 0 && i < size && c.is_gram && p == 0) {
        param.gradient[i] = c.gram.support_gradient[i] + c.gram.query_gradient[i];
      } else if (i >= 0 && i < size)
        param.gradient[i] = sum_over_tasks(c.u.fixed + place(i), c.theta_size, c.tasks);
      i -= size;
      const int64_t rates = param.rate_gradient ? param.size * param.rate_rows : 0;
      if (i >= 0 && i < rates) {
        const int64_t row = i / param.size;
        // steps that are not taken, and parameters that stay, have none
        const bool counts = param.moves && row < c.rate_u.slots && row < c.steps;
        param.rate_gradient[i] = counts ? sum_over_tasks(c.rate_u.fixed + row * c.theta_size + place(i % param.size),
                                                         c.rate_u.slots * c.theta_size, c.tasks)
                                        : T(0);
      }
      i -= rates;
    }
    if (i < 0 || !c.table_gradient || i >= c.table_rows * c.table_columns) continue;
    const int64_t row = i / c.table_columns, column = i % c.table_columns;
    const bool all_params = c.table_columns == 1, all_steps = c.table_rows == 1;
    double total = 0;
    for (int64_t p = all_params ? 0 : column; p < (all_params ? c.num_params : column + 1); ++p) {
      // a parameter that stays has none
      for (int64_t t = 0; t < c.tasks && c.params[p].moves; ++t) {
        const double* sums = c.rate_sums + (p * c.tasks + t) * c.steps;
        // steps that are not taken have none
        for (int64_t k = all_steps ? 0 : row; k < c.steps && (all_steps || k == row); ++k) total += sums[k];
      }
    }
    c.table_gradient[i] = static_cast<T>(total);
  }
}

// Of more weights than this the first layer is worth products over all tasks' rows; below zero it always is, for tests.
#ifndef MTML_GRAM_WEIGHTS
#define MTML_GRAM_WEIGHTS 8192
#endif

// where the layer's steps can be told by its rows, and nobody asks for what only its weights know
template <class T>
bool is_gram(const MlpArguments<T>& a) {
  const MlpOptions& o = a.options;
  const MlpParameter<T>& weight = a.params[0];
  const bool regular = !a.support.offsets && !a.query.offsets;
  const bool plain = o.momentum == 0 && o.weight_decay == 0 && !(o.clip < INFINITY);
  const bool features = a.wants_support_x || a.wants_query_x;
  const bool gains = a.support.max_rows < o.widths[0] && o.widths[0] * o.widths[1] > MTML_GRAM_WEIGHTS;
  return o.layers > 1 && regular && plain && !features && !a.wants_fast && weight.task_stride == 0 &&
         weight.rate_element == 0 && (gains || MTML_GRAM_WEIGHTS < 0);
}

// whose addresses nobody asks for
template <class T>
const MlpGram<T>* some_gram(bool is_gram) {
  static const MlpGram<T> kNone{};
  return is_gram ? &kNone : nullptr;
}

template <class T>
int64_t state_size(const MlpArguments<T>& arguments, bool is_gram, bool keeps) {
  return Plan<T>(arguments, some_gram<T>(is_gram), keeps, false).place_state(nullptr);
}

template <class T>
int64_t workspace_size(const MlpArguments<T>& arguments, bool is_gram) {
  return Plan<T>(arguments, some_gram<T>(is_gram), true, true).place_workspace(nullptr);
}

template <class T>
int forward(const MlpArguments<T>& arguments, const MlpGram<T>* gram, bool keeps, T* state, void* stream) {
  int64_t limit;
  const cudaError_t error = shared_memory_limit(&limit);
  if (error != cudaSuccess) return error;
  Plan<T> plan(arguments, gram, keeps, false);
  plan.place_state(state);
  plan.place_shared(std::min<int64_t>(limit, MTML_MAX_SHARED));
  if (!keeps) {
    // nobody asks for what lies in shared memory
    for (Room<T>* room : {&plan.network.theta, &plan.network.record, &plan.network.evaluation})
      if (room->shared != kAbsent) room->fixed = room->rows = nullptr;
  }
  return launch(mlp_adapt<T>, plan.network.tasks, kThreads, plan.shared_bytes, static_cast<cudaStream_t>(stream),
                plan.network);
}

template <class T>
int backward(const MlpArguments<T>& arguments, const MlpGram<T>* gram, const T* state, double* workspace,
             void* stream) {
  int64_t limit;
  const cudaError_t error = shared_memory_limit(&limit);
  if (error != cudaSuccess) return error;
  Plan<T> plan(arguments, gram, true, true);
  plan.place_state(const_cast<T*>(state));
  plan.place_workspace(workspace);
  plan.place_shared(std::min<int64_t>(limit, MTML_MAX_SHARED));
  return launch(mlp_adapt_backward<T>, plan.network.tasks, kThreads, plan.shared_bytes,
                static_cast<cudaStream_t>(stream), plan.network);
}

template <class T>
int sums(const MlpArguments<T>& arguments, const MlpGram<T>* gram, const MlpRateGradients<T>& rates, double* workspace,
         bool rates_alone, void* stream) {
  Plan<T> plan(arguments, gram, true, true);
  plan.place_workspace(workspace);
  Network<T>& c = plan.network;
  c.table_gradient = rates.table;
  c.table_rows = rates.rows;
  c.table_columns = rates.columns;
  int64_t elements = rates.table ? rates.rows * rates.columns : 0;
  for (int p = 0; p < c.num_params; ++p) {
    Param<T>& param = c.params[p];
    if (rates_alone) param.gradient = param.rate_gradient = nullptr;
    if (param.gradient && param.task_stride == 0) elements += param.size;
    if (!param.rate_gradient) continue;
    param.rate_rows = rates.parameter_rows[p];
    elements += param.size * param.rate_rows;
  }
  return launch(mlp_adapt_sums<T>, (elements + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream),
                c, elements);
}

}  // namespace mtml::cuda

extern "C" {

int mtml_cuda_mlp_adapt_is_gram_f32(const mtml::MlpArguments<float>* arguments) {
  return mtml::cuda::is_gram(*arguments);
}
int64_t mtml_cuda_mlp_adapt_state_f32(const mtml::MlpArguments<float>* arguments, int is_gram, int keeps) {
  return mtml::cuda::state_size(*arguments, is_gram != 0, keeps != 0);
}
int64_t mtml_cuda_mlp_adapt_workspace_f32(const mtml::MlpArguments<float>* arguments, int is_gram) {
  return mtml::cuda::workspace_size(*arguments, is_gram != 0);
}
int mtml_cuda_mlp_adapt_f32(const mtml::MlpArguments<float>* arguments, const mtml::cuda::MlpGram<float>* gram,
                            int keeps, float* state, void* stream) {
  return mtml::cuda::forward(*arguments, gram, keeps != 0, state, stream);
}
int mtml_cuda_mlp_adapt_backward_f32(const mtml::MlpArguments<float>* arguments, const mtml::cuda::MlpGram<float>* gram,
                                     const float* state, double* workspace, void* stream) {
  return mtml::cuda::backward(*arguments, gram, state, workspace, stream);
}
int mtml_cuda_mlp_adapt_sums_f32(const mtml::MlpArguments<float>* arguments, const mtml::cuda::MlpGram<float>* gram,
                                 const mtml::cuda::MlpRateGradients<float>* rates, double* workspace, void* stream) {
  return mtml::cuda::sums(*arguments, gram, *rates, workspace, false, stream);
}
int mtml_cuda_mlp_adapt_rates_f32(const mtml::MlpArguments<float>* arguments,
                                  const mtml::cuda::MlpRateGradients<float>* rates, double* rate_sums, void* stream) {
  return mtml::cuda::sums<float>(*arguments, nullptr, *rates, rate_sums, true, stream);
}

int mtml_cuda_mlp_adapt_is_gram_f64(const mtml::MlpArguments<double>* arguments) {
  return mtml::cuda::is_gram(*arguments);
}
int64_t mtml_cuda_mlp_adapt_state_f64(const mtml::MlpArguments<double>* arguments, int is_gram, int keeps) {
  return mtml::cuda::state_size(*arguments, is_gram != 0, keeps != 0);
}
int64_t mtml_cuda_mlp_adapt_workspace_f64(const mtml::MlpArguments<double>* arguments, int is_gram) {
  return mtml::cuda::workspace_size(*arguments, is_gram != 0);
}
int mtml_cuda_mlp_adapt_f64(const mtml::MlpArguments<double>* arguments, const mtml::cuda::MlpGram<double>* gram,
                            int keeps, double* state, void* stream) {
  return mtml::cuda::forward(*arguments, gram, keeps != 0, state, stream);
}
int mtml_cuda_mlp_adapt_backward_f64(const mtml::MlpArguments<double>* arguments,
                                     const mtml::cuda::MlpGram<double>* gram, const double* state, double* workspace,
                                     void* stream) {
  return mtml::cuda::backward(*arguments, gram, state, workspace, stream);
}
int mtml_cuda_mlp_adapt_sums_f64(const mtml::MlpArguments<double>* arguments, const mtml::cuda::MlpGram<double>* gram,
                                 const mtml::cuda::MlpRateGradients<double>* rates, double* workspace, void* stream) {
  return mtml::cuda::sums(*arguments, gram, *rates, workspace, false, stream);
}
int mtml_cuda_mlp_adapt_rates_f64(const mtml::MlpArguments<double>* arguments,
                                  const mtml::cuda::MlpRateGradients<double>* rates, double* rate_sums, void* stream) {
  return mtml::cuda::sums<double>(*arguments, nullptr, *rates, rate_sums, true, stream);
}

}  // extern "C"
