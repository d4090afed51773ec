// What mlp_adapt takes: plain pointers and sizes. Includes no code, so that every instruction set shares these types.
#pragma once

#include <cstdint>

namespace mtml {

enum class Loss : int32_t { kCrossEntropy, kMse, kBce };
enum class Activation : int32_t {
  kRelu,
  kTanh,
  kGelu,
  kGeluTanh,
  kSilu,
  kElu,
  kLeakyRelu,
  kSigmoid,
  kSoftplus,
  kIdentity
};

struct MlpOptions {
  int64_t tasks;
  int64_t layers;         // L >= 1
  int64_t steps;          // K >= 0
  const int64_t* widths;  // [L + 1]: D, H, ..., C
  bool bias;
  bool norm;  // batch norm behind every layer but the last
  bool first_order;
  bool every_step;  // query results after 0, 1, ..., K steps: S = K + 1, else S = 1
  Loss loss;
  Activation activation;
  double norm_eps, momentum, weight_decay;
  double clip;  // infinity: no clipping
};

// One parameter tensor, contiguous: weight [O, I], or bias, gain, shift [O]; or [T, ...] with a start per task.
template <class T>
struct MlpParameter {
  const T* start;
  int64_t task_stride;  // elements between the starts of two tasks; 0: all tasks share one
  bool moves;           // the inner loop moves it
  // the rate of step k for element i is rate[k * rate_step + i * rate_element]
  const T* rate;
  int64_t rate_step;     // 0: one rate for all steps
  int64_t rate_element;  // 0 or 1
  // results of the backward sweep; null where not wanted
  T* gradient;  // as start: the sum over tasks, or one for each task
  // rate_element = 0: double [T, K]: what each task adds to the rate of step k (a task's rows are task after task);
  // several parameters may not share it. rate_element = 1: unused
  double* rate_sums;
  // rate_element = 1: the gradient, in the layout of rate: [1 or K, size]
  T* rate_gradient;
};

// The support or the query rows of all tasks.
template <class T>
struct MlpRows {
  const T* x;             // [R, D]
  const int64_t* labels;  // [R]: cross_entropy
  const T* targets;       // [R, C]: mse and bce; query rows may have neither
  // [T + 1]: task t owns the rows offsets[t] .. offsets[t + 1]. Never null on a CPU; on a GPU, where nobody may read
  // it, null where every task has max_rows of them.
  const int64_t* offsets;
  int64_t max_rows;  // of the largest task; 0 where nobody knows
  T* x_gradient;     // [R, D], or null where not wanted
  int64_t all_rows;  // R; on a CPU offsets tell it
};

template <class T>
struct MlpArguments {
  MlpOptions options;
  const MlpParameter<T>* params;  // layer after layer: weight, then bias, gain, shift where there are such
  int64_t num_params;
  MlpRows<T> support, query;
  const bool* class_mask;  // [T, C], or null: all outputs exist
  // which derivatives will be asked for: they must be the same in forward and backward, as the plan depends on them
  bool wants_fast;   // the adapted parameters
  bool wants_rates;  // gradients of the rates
  bool wants_support_x, wants_query_x;
  // results
  T* outputs;  // [S, R, C], or null
  T* losses;   // [S, T], or null
  T* fast;     // [T, P], or null
  // cotangents; null stands for zeros
  const T* d_outputs;  // [S, R, C]
  const T* d_losses;   // [S, T]
  const T* d_fast;     // [T, P]
};

}  // namespace mtml
