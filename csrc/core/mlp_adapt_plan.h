// Where everything lies that mlp_adapt keeps, in elements: one layout for all tasks, computed by
// csrc/mlp_adapt_plan.cpp. Plain types only, shared by all instruction sets.
#pragma once

#include <cstdint>

#include "core/mlp_adapt_args.h"

namespace mtml {

// How a layer's weight is kept while it moves (docs/maths/mlp_adapt.md):
enum class Form : int32_t {
  kDense,     // a matrix per task and step
  kFactored,  // W_0 - sum_j a_j D_j^T H_j, by its factors
  kGram,      // the first layer: its input is fixed, so all steps live in N x N products of the rows
};

constexpr int64_t kAbsent = -1;

// Offsets of a layer's arrays. Arrays with rows are [k][n][ld] of the task's own row count; absent ones are kAbsent.
struct MlpLayer {
  Form form;
  bool moves;        // the inner loop moves the weight
  bool hidden;       // activation (and norm) behind it
  bool transposed;   // dense, first: its matrix in a parameter vector is W^T, which its products ask for
  bool query_dense;  // gram: the query rows meet the adapted weight itself, not the Gram matrix of query and support
  bool first_dots;   // gram: its first product is the task's own, by dot products; else one product of all rows
  int64_t in, out, ld_in, ld_out;
  int64_t weight, bias, gain, shift;              // which parameter
  int64_t weight_at, bias_at, gain_at, shift_at;  // where in a parameter vector: theta, its gradient, its cotangent

  // state of a task, from forward to backward. Support rows: input (first layer: a padded copy of x, where needed),
  // what the activation was applied to, batch norm's normalised rows and 1/deviation, and the loss's derivatives by
  // the layer's output behind the norm (dy), behind the activation (e) and in front of both (d)
  int64_t h, y, xh, r, dy, e, d;
  int64_t hq, yq, xhq, rq;  // query rows, [s][q][ld]
  int64_t gram, cross;      // gram: [N][ld N], [Q][ld N]
  int64_t wt;               // dense, not the first: W_k^T of the steps after the first, [K][in][ld_out]
  int64_t query_weight;     // gram, query_dense: W_K [out][ld_in]

  // kept of a task, from its backward sweep to the sums over tasks
  int64_t rh, rd, qd;      // factored: [k][n][ld_in], [k][n][ld_out], [s][q][ld_out]
  int64_t row_sum, q_sum;  // gram: [N][ld_out], [Q][ld_out]
  int64_t weight_u;        // gram, query_dense: the weight's cotangent [out][ld_in]

  // temporary, one task's
  int64_t t_rh, t_ry, t_rxh, t_rr;  // tangents kept from the forward to the backward half of a reverse step
  // shared: W^T and W as right operands, packed (gram, factored) or padded (dense, by weight_at)
  int64_t packed_in, packed_out;
};

struct MlpPlan {
  const MlpLayer* layers;
  int64_t num_layers;
  int64_t lanes;
  int64_t steps;        // that are taken: 0 where nothing moves
  int64_t evaluations;  // of the query rows: S
  int64_t support_rows, query_rows;
  int64_t widest;       // the largest ld
  bool plain;           // p' = p - a g with one rate a tensor: no momentum, decay or clipping
  bool theta_per_task;  // some parameter has a start per task
  bool needs_gradient;  // the backward sweep needs the inner gradient itself
  bool direct;          // plain, and rates by parameter: weights move by products alone, without gradient or direction
  bool copies_x;
  int64_t theta_size;     // of one parameter vector
  int64_t largest_dense;  // elements of the largest transposed dense weight

  // offsets in a task's state
  int64_t theta;     // [K + 1][theta_size]; the first only where theta_per_task
  int64_t velocity;  // [K][theta_size]
  int64_t p;         // [k][n][ld C]
  int64_t zq;        // [s][q][ld C]
  int64_t state_size;
  // in a task's kept: cotangents of the parameter vector, and behind it of rates by element [0, 1 or K][theta_size]
  int64_t u, rate_u;
  int64_t rate_u_rows;
  int64_t kept_size;
  // in the shared region: theta_0, and the transposed dense weights in their places of a parameter vector's size
  int64_t theta_0, transposed_0;
  int64_t shared_size;
  // in a task's temporaries
  int64_t t_a, t_b, t_c, t_d;  // [max(N, Q)][widest]
  int64_t t_scaled;            // -a D: [N][widest]
  int64_t t_wt, t_vt;          // largest dense weight, transposed
  int64_t t_grad, t_r, t_w;    // parameter vectors: gradient, direction, momentum (its cotangent in backward)
  int64_t t_small;             // [max(N, Q)][ld of the widest set of factors]
  int64_t t_z0, t_esum, t_qx;  // gram: [N][ld_out] each
  int64_t t_bb, t_mm;          // gram with feature gradients: [N][ld N], [Q][ld N]
  int64_t t_xs, t_xq;          // gradients by the features, padded
  int64_t small_ld;
  int64_t temp_size;
  int64_t block;  // tasks that a sweep takes through the layers together

  double operations;  // multiply-adds counted twice, forward and backward
};

// A parameter as a padded matrix inside a parameter vector, where a weight may lie transposed to what the user gave;
// at = kAbsent: a weight that is not kept densely.
struct Place {
  int64_t rows, cols, ld, at;
  bool transposed, is_weight;
};

// One call, as the core sees it.
template <class T>
struct MlpCall {
  const MlpArguments<T>* arguments;
  const MlpPlan* plan;
  const Place* places;   // of each parameter
  int64_t num_elements;  // of all parameters of a task, without padding
  const int64_t* order;  // which tasks share this plan; null: all, in their order
  T* shared;             // [plan.shared_size]
  T* first_support;      // [R, ld] and [R, ld]: the rows times the first layer's W_0, where it is in Gram form
  T* first_query;
};

// The entry points of one instruction set. Ranges are disjoint pieces of work for threads.
template <class T>
struct MlpAdapt {
  int64_t lanes;
  int64_t panel;  // columns of a packed panel
  int64_t (*packed_size)(int64_t k, int64_t n);
  int64_t outer_scratch;  // elements
  // parts [begin, end) of `parts` of the padded, transposed and packed copies of what all tasks share
  void (*prepare)(const MlpCall<T>& call, int64_t begin, int64_t end, int64_t parts);
  // rows [begin, end) of support, then query, times the first layer's shared weight
  void (*first_products)(const MlpCall<T>& call, int64_t begin, int64_t end);
  // places [begin, end) of the order, at most plan.block tasks; state, kept and temp are theirs
  void (*forward)(const MlpCall<T>& call, int64_t begin, int64_t end, T* state, T* kept, T* temp);
  void (*backward)(const MlpCall<T>& call, int64_t begin, int64_t end, T* state, T* kept, T* temp);
  // panels [begin, end) of columns of the gradient of layer l's shared weight, in factored or Gram form: the sum over
  // the places [first, last) of the order, whose state and kept these are; added to what is there, where `add`
  void (*weight_gradient)(const MlpCall<T>& call, int64_t l, int64_t first, int64_t last, const T* state, const T* kept,
                          bool add, int64_t begin, int64_t end, T* scratch);
  // elements [begin, end) of total += sum over `tasks` vectors that lie `stride` apart
  void (*sum_tasks)(const T* vectors, int64_t stride, int64_t tasks, int64_t begin, int64_t end, T* total);
};

}  // namespace mtml
