// What the kernels of mlp_adapt know of a call, by value: a network's layers, and where a task's arrays lie. Of each
// kind of array there is a room, in which a task has slots (of each step, or one), in shared memory or in the device's.
#pragma once

#include <cstdint>

#include "core/mlp_adapt_args.h"
#include "cuda/mlp_adapt.h"

namespace mtml::cuda {

// of a kernel's arguments, which are at most 32 KB
constexpr int kMaxLayers = static_cast<int>(kMlpLayers);
constexpr int kAbsent = -1;

enum Kind { kWeight, kBias, kGain, kShift, kKinds };

// Places of arrays [rows, ld] in a room's rows, each in units of the rows: an array starts at place * rows. Places of
// vectors [ld] are in its fixed part. kAbsent where there is none.
struct LayerRows {
  int h;      // the layer's input, from the second layer on
  int y, xh;  // of a hidden layer: what the activation takes, and the norm's normalised rows
  int z;      // of the last layer: outputs
  int r;      // vector: 1 / standard deviation
};

struct Layer {
  int in, out, ld_in, ld_out, ld_weight;
  bool hidden;
  // in a parameter vector; a weight has rows of ld_weight
  int64_t at[kKinds];
  LayerRows support, query;
  // support rows of a step, and vectors: the derivatives by y, by h and by the linear layer's output; of gain and shift
  int dy, e, d, dgain, dshift;
  // their tangents, and vectors
  int rh, ry, rxh, rd, rr, sums;
  // cotangents of the query rows' linear layers
  int delta;
};

template <class T>
struct Param {
  const T* start;
  int64_t task_stride;
  bool moves;
  const T* rate;
  int64_t rate_step, rate_element;
  T* gradient;
  T* rate_gradient;
  int64_t size;       // elements
  int64_t rate_rows;  // of rate_gradient
  int layer, kind;
};

template <class T>
struct Room {
  int64_t fixed_size, row_size, slots;
  int64_t shared;  // where it starts in shared memory, in elements; kAbsent where it lies in the device's alone
  bool is_query;   // whose rows
  // the device's: [tasks, slots, fixed_size] and, task after task, [slots, rows, row_size]; null where there is none
  T *fixed, *rows;
};

template <class T>
struct Rows {
  const T* x;
  const int64_t* labels;
  const T* targets;
  const int64_t* offsets;  // null: every task has `count` rows
  int64_t count, all;
  T* x_gradient;
  bool quads;  // whether rows of x may be read by fours
};

template <class T>
struct Network {
  int num_layers, num_params;
  int64_t shared_doubles;  // in front of the rooms in shared memory
  int64_t tasks, steps, evaluations;
  Loss loss;
  Activation activation;
  bool norm, first_order, every_step, act_is_linear;
  // rates: whether there is one for each step (and parameter), and its gradient is wanted
  bool rate_sums_wanted;
  double norm_eps, clip;
  T momentum, weight_decay;
  int64_t theta_size;
  Rows<T> support, query;
  const bool* class_mask;
  T *outputs, *losses, *fast;
  const T *d_outputs, *d_losses, *d_fast;
  int64_t fast_size;
  // parameter vectors and what belongs to a step or an evaluation
  Room<T> theta, record, evaluation, velocity;
  // of the sweep that runs: momentum or its cotangent; cotangent of theta, direction, tangents, query cotangents
  Room<T> w, u, direction, tangent, delta;
  Room<T> moved;      // E of the first layer in Gram form
  Room<T> rate_u;     // a slot for each row of rates that are as many as elements
  double* rate_sums;  // [params, T, K]
  bool is_gram;
  MlpGram<T> gram;
  T* table_gradient;  // [table_rows, table_columns]: of rates that are one for each step
  int64_t table_rows, table_columns;
  Layer layers[kMaxLayers];
  Param<T> params[kMaxLayers * kKinds];
  // of each layer and kind; kAbsent
  int param[kMaxLayers][kKinds];
};

}  // namespace mtml::cuda
