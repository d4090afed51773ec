// The kernels of mlp_adapt: see cuda/mlp_adapt.h. A block has a task, and goes with it through all steps; what fits of
// a task's arrays lies in shared memory. What tasks add up lies in the workspace, task after task, and a second kernel
// adds it in their order: no atomics, so the same bits every time, and for a task alone and in any batch.
#include "cuda/mlp_adapt.h"

#include <algorithm>
#include <vector>

#include "cuda/block.h"
#include "cuda/launch.h"
#include "cuda/mlp_network.h"
#include "cuda/mlp_sweep.h"

// a test may take fewer
#ifndef MTML_MLP_THREADS
#define MTML_MLP_THREADS 256
#endif

namespace mtml::cuda {

constexpr int kThreads = MTML_MLP_THREADS;

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

// ---- where arrays lie

constexpr int64_t up_to_four(int64_t n) { return (n + 3) / 4 * 4; }

template <class T>
class Plan {
 public:
  Network<T> network{};
  int64_t shared_bytes = 0;

  Plan(const MlpArguments<T>& arguments, const MlpGram<T>* gram, bool keeps, bool is_backward)
      : a(arguments), keeps_(keeps), is_backward_(is_backward) {
    const MlpOptions& o = a.options;
    Network<T>& c = network;
    c.num_layers = static_cast<int>(o.layers);
    c.num_params = static_cast<int>(a.num_params);
    c.tasks = o.tasks;
    c.steps = o.steps;
    c.evaluations = o.every_step ? o.steps + 1 : 1;
    c.loss = o.loss;
    c.activation = o.activation;
    c.norm = o.norm;
    c.first_order = o.first_order;
    c.every_step = o.every_step;
    c.act_is_linear = is_linear(o.activation);
    c.norm_eps = o.norm_eps;
    c.clip = o.clip;
    c.momentum = static_cast<T>(o.momentum);
    c.weight_decay = static_cast<T>(o.weight_decay);
    c.support = rows_of(a.support);
    c.query = rows_of(a.query);
    c.class_mask = a.class_mask;
    c.outputs = a.outputs;
    c.losses = a.losses;
    c.fast = a.fast;
    c.d_outputs = a.d_outputs;
    c.d_losses = a.d_losses;
    c.d_fast = a.d_fast;
    c.is_gram = gram != nullptr;
    if (gram) c.gram = *gram;
    lay_out_layers();
    lay_out_rooms();
  }

  // ---- the forward sweep's memory and the reverse's; these give addresses and count

  int64_t place_state(T* state) {
    Counter room{state};
    Network<T>& c = network;
    for (Room<T>* of : {&c.theta, &c.record, &c.evaluation, &c.velocity}) room.take(*of, c);
    if (is_backward_) return room.count;
    room.take(c.w, c);
    room.take(c.moved, c);
    return room.count;
  }

  // in doubles
  int64_t place_workspace(double* workspace) {
    Network<T>& c = network;
    // behind it arrays are read by fours
    const int64_t sums = a.wants_rates ? up_to_four(c.num_params * c.tasks * c.steps) : 0;
    c.rate_sums = workspace;
    Counter room{workspace ? reinterpret_cast<T*>(workspace + sums) : nullptr};
    for (Room<T>* of : {&c.u, &c.direction, &c.tangent, &c.delta, &c.w, &c.rate_u}) room.take(*of, c);
    return sums + (room.count * static_cast<int64_t>(sizeof(T)) + 7) / 8;
  }

  // what of the rooms fits into a block's shared memory, those first that are read most
  void place_shared(int64_t limit_bytes) {
    Network<T>& c = network;
    c.shared_doubles = kThreads / kWarp * (1 + (c.rate_sums_wanted ? c.num_params : 0));
    c.shared_doubles += c.shared_doubles % 2;  // so that what follows may be read by fours
    const int64_t doubles = c.shared_doubles * static_cast<int64_t>(sizeof(double));
    const int64_t limit = (limit_bytes - doubles) / static_cast<int64_t>(sizeof(T));
    int64_t used = 0;
    std::vector<Room<T>*> order = {&c.theta, &c.moved, &c.record, &c.evaluation, &c.w};
    if (is_backward_) order = {&c.theta, &c.direction, &c.record, &c.tangent, &c.u, &c.delta, &c.evaluation, &c.w};
    for (Room<T>* room : order) {
      const Rows<T>& rows = room->is_query ? c.query : c.support;
      const bool known = room->row_size == 0 || (!rows.offsets && rows.count > 0);
      const int64_t size = room->fixed_size + room->row_size * rows.count;
      if (!known || size == 0 || size > limit - used) continue;
      room->shared = used;
      used += size;
    }
    shared_bytes = doubles + used * static_cast<int64_t>(sizeof(T));
  }

 private:
  const MlpArguments<T>& a;
  const bool keeps_, is_backward_;
  // vectors and rows so far, of a step, of an evaluation and of the reverse
  int record_fixed_ = 0, record_rows_ = 0, evaluation_fixed_ = 0, evaluation_rows_ = 0, tangent_fixed_ = 0,
      tangent_rows_ = 0, delta_rows_ = 0;

  // addresses one after the other
  struct Counter {
    T* base;
    int64_t count = 0;

    void take(Room<T>& room, const Network<T>& c) {
      const Rows<T>& rows = room.is_query ? c.query : c.support;
      room.fixed = base && room.fixed_size ? base + count : nullptr;
      count += c.tasks * room.slots * room.fixed_size;
      room.rows = base && room.row_size ? base + count : nullptr;
      count += rows.all * room.slots * room.row_size;
    }
  };

  Rows<T> rows_of(const MlpRows<T>& rows) const {
    const bool quads = a.options.widths[0] % 4 == 0 && reinterpret_cast<uintptr_t>(rows.x) % 16 == 0;
    return {rows.x,        rows.labels,     rows.targets, rows.offsets, rows.offsets ? 0 : rows.max_rows,
            rows.all_rows, rows.x_gradient, quads};
  }

  static int take(int* so_far, int size) {
    const int place = *so_far;
    *so_far += size;
    return place;
  }

  void lay_out_layers() {
    Network<T>& c = network;
    const MlpOptions& o = a.options;
    const bool keeps_y = needs_input(o.activation);
    const bool second = !c.act_is_linear && !o.first_order;
    int p = 0;
    for (int l = 0; l < c.num_layers; ++l) {
      Layer& layer = c.layers[l];
      layer.in = static_cast<int>(o.widths[l]);
      layer.out = static_cast<int>(o.widths[l + 1]);
      layer.ld_in = static_cast<int>(up_to_four(layer.in));
      layer.ld_out = static_cast<int>(up_to_four(layer.out));
      // odd, so that neither a column's nor a row's elements share a bank of shared memory
      layer.ld_weight = layer.in | 1;
      layer.hidden = l + 1 < c.num_layers;
      const bool norm = o.norm && layer.hidden;
      const bool has[kKinds] = {true, o.bias, norm, norm};
      for (int kind = 0; kind < kKinds; ++kind) {
        layer.at[kind] = kAbsent;
        c.param[l][kind] = kAbsent;
        if (!has[kind]) continue;
        const MlpParameter<T>& from = a.params[p];
        const int64_t size = kind == kWeight ? static_cast<int64_t>(layer.out) * layer.in : layer.out;
        c.params[p] = {from.start,
                       from.task_stride,
                       from.moves,
                       from.rate,
                       from.rate_step,
                       from.rate_element,
                       from.gradient,
                       from.rate_gradient,
                       size,
                       0,
                       l,
                       kind};
        c.param[l][kind] = p++;
        c.fast_size += size;
        if (c.is_gram && l == 0 && kind == kWeight) continue;
        layer.at[kind] = c.theta_size;
        c.theta_size += up_to_four(kind == kWeight ? static_cast<int64_t>(layer.out) * layer.ld_weight : layer.out);
      }

      for (const bool is_query : {false, true}) {
        LayerRows& places = is_query ? layer.query : layer.support;
        int* rows = is_query ? &evaluation_rows_ : &record_rows_;
        int* fixed = is_query ? &evaluation_fixed_ : &record_fixed_;
        places.h = l > 0 ? take(rows, layer.ld_in) : kAbsent;
        places.y = layer.hidden && keeps_y ? take(rows, layer.ld_out) : kAbsent;
        places.xh = norm ? take(rows, layer.ld_out) : kAbsent;
        places.z = layer.hidden ? kAbsent : take(rows, layer.ld_out);
        places.r = norm ? take(fixed, layer.ld_out) : kAbsent;
      }
      layer.d = take(&record_rows_, layer.ld_out);
      layer.dy = norm ? take(&record_rows_, layer.ld_out) : kAbsent;
      layer.e = layer.hidden && second ? take(&record_rows_, layer.ld_out) : kAbsent;
      layer.dgain = norm ? take(&record_fixed_, layer.ld_out) : kAbsent;
      layer.dshift = norm ? take(&record_fixed_, layer.ld_out) : kAbsent;
      layer.rh = l > 0 ? take(&tangent_rows_, layer.ld_in) : kAbsent;
      layer.ry = layer.hidden && second ? take(&tangent_rows_, layer.ld_out) : kAbsent;
      layer.rxh = norm ? take(&tangent_rows_, layer.ld_out) : kAbsent;
      layer.rd = take(&tangent_rows_, layer.ld_out);
      layer.rr = norm ? take(&tangent_fixed_, layer.ld_out) : kAbsent;
      layer.sums = norm ? take(&tangent_fixed_, 2 * layer.ld_out) : kAbsent;
      layer.delta = take(&delta_rows_, layer.ld_out);
    }
  }

  void lay_out_rooms() {
    Network<T>& c = network;
    bool per_step = false, per_element = false;
    for (int64_t p = 0; p < a.num_params; ++p) {
      if (!a.params[p].rate_gradient) continue;
      per_element = true;
      per_step = per_step || a.params[p].rate_step != 0;
    }
    c.rate_sums_wanted = is_backward_ && a.wants_rates && a.params[0].rate_element == 0;
    const bool momentum = a.options.momentum != 0;
    const int64_t all = kAbsent;
    const auto room = [&](int64_t fixed, int64_t rows, int64_t slots, bool is_query) {
      return Room<T>{fixed, rows, slots, all, is_query, nullptr, nullptr};
    };
    c.theta = room(c.theta_size, 0, keeps_ ? c.steps + 1 : 1, false);
    c.record = room(record_fixed_, record_rows_, keeps_ ? c.steps : 1, false);
    c.evaluation = room(evaluation_fixed_, evaluation_rows_, keeps_ ? c.evaluations : 1, true);
    c.velocity = room(momentum && keeps_ && a.wants_rates ? c.theta_size : 0, 0, c.steps, false);
    c.w = room(momentum ? c.theta_size : 0, 0, 1, false);
    c.moved = room(0, c.is_gram ? c.layers[0].ld_out : 0, 1, false);
    c.u = room(c.theta_size, 0, 1, false);
    c.direction = room(c.theta_size, 0, 1, false);
    c.tangent = room(tangent_fixed_, c.first_order ? 0 : tangent_rows_, 1, false);
    c.delta = room(0, delta_rows_, 1, true);
    c.rate_u = room(per_element ? c.theta_size : 0, 0, per_step ? c.steps : 1, false);
    if (!per_element) c.rate_u.slots = 0;
  }
};

// what a block may have when it asks
inline cudaError_t shared_memory_limit(int64_t* bytes) {
  int device, limit;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = error == cudaSuccess ? std::min<int64_t>(limit, MTML_MAX_SHARED) : 0;
  return take(error);
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
  plan.place_shared(limit);
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
  plan.place_shared(limit);
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
