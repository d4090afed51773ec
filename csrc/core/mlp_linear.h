// The linear layers of mlp_adapt in their three forms: forward, backward, and the tangents of both. A function works on
// one layer of all tasks of a block; each task says by `rows`, `in` and `out` what on.
#pragma once

#include "core/mlp_vectors.h"

namespace mtml::MTML_ISA {

template <class T>
MTML_INLINE Right<T> by_rows(const T* b, int64_t ld) {
  return {b, ld, kPanel<T>};
}

// the columns j * n .. of a matrix [rows][ld] times -a_j: coefficients of the factors of steps j < k
template <class T>
void scale_by_rates(const MlpCall<T>& c, const MlpLayer& L, int64_t rows, int64_t n, int64_t k, T* s, int64_t ld) {
  for (int64_t j = 0; j < k; ++j) {
    const T factor = -rate(c, L.weight, j);
    for (int64_t row = 0; row < rows; ++row) {
      T* to = s + row * ld + j * n;
      for (int64_t i = 0; i < n; ++i) to[i] *= factor;
    }
  }
}

// out += (W_k - W_0) in: by the factors of the steps before k, of width `ld_a` on the side of `in`
template <class T>
void add_moved(const MlpCall<T>& c, const Task<T>& task, const MlpLayer& L, int64_t k, const T* in, const T* a,
               int64_t width_a, int64_t ld_a, const T* b, int64_t width_b, int64_t ld_b, T* out) {
  const int64_t factors = k * task.n;
  if (!L.moves || factors == 0) return;
  T* s = task.temp + c.plan->t_small;
  const int64_t ld = c.plan->small_ld;
  dots<T>(task.rows, factors, width_a, in, ld_a, a, ld_a, s, ld, false);
  scale_by_rates(c, L, task.rows, task.n, k, s, ld);
  product<T>(task.rows, width_b, out, ld_b, kAdd, nullptr, {{s, ld, 1}, by_rows(b, ld_b), factors});
}

// the rows of every task of the block times one packed weight
template <class T>
void shared_product(const Task<T>* tasks, int64_t count, const T* packed, int64_t K, int64_t N, int64_t ld_in,
                    int64_t ldc, const T* const* starts) {
  RowBlock<T> blocks[16];
  bool any_start = false;
  for (int64_t i = 0; i < count; ++i) {
    blocks[i] = {tasks[i].rows, {tasks[i].in, ld_in, 1}, tasks[i].out, starts ? starts[i] : nullptr};
    any_start = any_start || (starts && starts[i]);
  }
  product_blocks<T>(blocks, count, N, K, {packed, kPanel<T>, K * kPanel<T>}, ldc, any_start ? kRow : kZero);
}

// ---- the Gram form of the first layer

// X X^T, of which strips right of the diagonal are computed and the rest mirrored
template <class T>
void gram_matrix(const Task<T>& task, int64_t features, T* gram, int64_t ld) {
  constexpr int64_t kStrip = 8;
  for (int64_t row = 0; row < task.n; row += kStrip) {
    const int64_t rows = task.n - row < kStrip ? task.n - row : kStrip;
    const T* x = task.x + row * task.ld_x;
    dots<T>(rows, task.n - row, features, x, task.ld_x, x, task.ld_x, gram + row * ld + row, ld, false);
    for (int64_t i = row; i < row + rows; ++i) {
      for (int64_t j = row + rows; j < task.n; ++j) gram[j * ld + i] = gram[i * ld + j];
    }
  }
}

template <class T>
void start_gram(const MlpCall<T>& c, Task<T>& task) {
  const MlpArguments<T>& a = *c.arguments;
  const MlpPlan& plan = *c.plan;
  const MlpLayer& L = plan.layers[0];
  if (L.first_dots) {
    T* z0 = task.temp + plan.t_z0;
    fill(task.n * L.ld_out, z0, T(0));
    dots<T>(task.n, L.out, L.in, task.x, task.ld_x, a.params[L.weight].start, L.in, z0, L.ld_out, true);
  }
  if (!L.moves) return;
  fill(task.n * L.ld_out, task.temp + plan.t_esum, T(0));
  gram_matrix(task, L.in, task.state + L.gram, plan.small_ld);
  if (!L.query_dense) {
    dots<T>(task.q, task.n, L.in, task.xq, task.ld_x, task.x, task.ld_x, task.state + L.cross, plan.small_ld, false);
  }
}

// z = Z_0 + b + G E, with E the sum of -a_j D_j so far
template <class T>
void gram_linear(const MlpCall<T>& c, Task<T>& task, int64_t k, bool is_query, const T* bias) {
  const MlpArguments<T>& a = *c.arguments;
  const MlpPlan& plan = *c.plan;
  const MlpLayer& L = plan.layers[0];
  const MlpRows<T>& of = is_query ? a.query : a.support;
  const bool by_dots = is_query ? L.query_dense || L.first_dots : false;
  const T* z0 = by_dots        ? nullptr
                : L.first_dots ? task.temp + plan.t_z0
                               : (is_query ? c.first_query : c.first_support) + of.offsets[task.t] * L.ld_out;
  for (int64_t row = 0; row < task.rows; ++row) {
    T* z = task.out + row * L.ld_out;
    for_each<T>(L.ld_out, [&](int64_t j, auto lane) {
      using V = decltype(lane);
      V value = z0 ? load<V>(z0 + row * L.ld_out + j) : V{};
      if (bias) value += load<V>(bias + j);
      store(z + j, value);
    });
  }
  if (by_dots) {
    const T* weight = L.query_dense ? task.state + L.query_weight : a.params[L.weight].start;
    dots<T>(task.rows, L.out, L.in, task.in, task.ld_x, weight, L.query_dense ? L.ld_in : L.in, task.out, L.ld_out,
            true);
    if (L.query_dense) return;
  }
  if (!L.moves || k == 0) return;
  const T* gram = task.state + (is_query ? L.cross : L.gram);
  product<T>(task.rows, L.out, task.out, L.ld_out, kAdd, nullptr,
             {{gram, plan.small_ld, 1}, by_rows<T>(task.temp + plan.t_esum, L.ld_out), task.n});
}

// W_K = W_0 + E^T X, for the query rows
template <class T>
void query_weight(const MlpCall<T>& c, Task<T>& task) {
  const MlpLayer& L = c.plan->layers[0];
  T* weight = task.state + L.query_weight;
  copy_rows(L.out, L.in, c.arguments->params[L.weight].start, L.in, weight, L.ld_in);
  if (!L.moves) return;
  product<T>(L.out, L.in, weight, L.ld_in, kAdd, nullptr,
             {{task.temp + c.plan->t_esum, 1, L.ld_out}, by_rows(task.x, task.ld_x), task.n});
}

// what the query rows' cotangents add to X U^T
template <class T>
void query_part_of_direction(const MlpCall<T>& c, Task<T>& task) {
  const MlpPlan& plan = *c.plan;
  const MlpLayer& L = plan.layers[0];
  if (!L.moves || plan.steps == 0) return;
  T* qx = task.temp + plan.t_qx;
  if (L.query_dense) {
    fill(task.n * L.ld_out, qx, T(0));
    dots<T>(task.n, L.out, L.in, task.x, task.ld_x, task.kept + L.weight_u, L.ld_in, qx, L.ld_out, true);
    return;
  }
  product<T>(task.n, L.out, qx, L.ld_out, kZero, nullptr,
             {{task.state + L.cross, 1, plan.small_ld}, by_rows<T>(task.kept + L.q_sum, L.ld_out), task.q});
}

// ---- forward and backward

// the dense W_k^T [in][ld_out]; `is_new` where no sweep before this one has left it
template <class T>
const T* transposed_weight(const MlpCall<T>& c, const Task<T>& task, const MlpLayer& L, int64_t k, bool is_new) {
  if (L.transposed) return task.theta(c, k) + L.weight_at;
  if ((k == 0 || !L.moves) && !c.plan->theta_per_task) return c.shared + L.packed_in;
  const bool stays = L.wt != kAbsent && k < c.plan->steps;
  T* to = stays ? task.state + L.wt + k * L.in * L.ld_out : task.temp + c.plan->t_wt;
  if (stays && !is_new) return to;
  transpose<T>(L.out, L.in, task.theta(c, k) + L.weight_at, L.ld_in, T(1), to, L.ld_out);
  return to;
}

// out = in W_k^T + b_k
template <class T>
void linear(const MlpCall<T>& c, Task<T>* tasks, int64_t count, int64_t l, int64_t k, bool is_query) {
  const MlpPlan& plan = *c.plan;
  const MlpLayer& L = plan.layers[l];
  const T* starts[16] = {};
  for (int64_t i = 0; i < count; ++i) {
    starts[i] = L.bias == kAbsent ? nullptr : tasks[i].theta(c, k) + L.bias_at;
  }
  if (L.form == Form::kGram) {
    for (int64_t i = 0; i < count; ++i) gram_linear(c, tasks[i], k, is_query, starts[i]);
    return;
  }
  if (L.form == Form::kFactored) {
    shared_product(tasks, count, c.shared + L.packed_in, L.in, L.out, L.ld_in, L.ld_out, starts);
    for (int64_t i = 0; i < count; ++i) {
      Task<T>& task = tasks[i];
      add_moved(c, task, L, k, task.in, task.support(L.h, 0, L.ld_in), L.in, L.ld_in, task.support(L.d, 0, L.ld_out),
                L.out, L.ld_out, task.out);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    Task<T>& task = tasks[i];
    product<T>(task.rows, L.out, task.out, L.ld_out, starts[i] ? kRow : kZero, starts[i],
               {{task.in, l == 0 ? task.ld_x : L.ld_in, 1},
                by_rows(transposed_weight(c, task, L, k, /*is_new=*/true), L.ld_out),
                L.in});
  }
}

// out = in W_k, for a layer that is not the first
template <class T>
void linear_backward(const MlpCall<T>& c, Task<T>* tasks, int64_t count, int64_t l, int64_t k) {
  const MlpLayer& L = c.plan->layers[l];
  if (L.form == Form::kFactored) {
    shared_product<T>(tasks, count, c.shared + L.packed_out, L.out, L.in, L.ld_out, L.ld_in, nullptr);
    for (int64_t i = 0; i < count; ++i) {
      Task<T>& task = tasks[i];
      add_moved(c, task, L, k, task.in, task.support(L.d, 0, L.ld_out), L.out, L.ld_out, task.support(L.h, 0, L.ld_in),
                L.in, L.ld_in, task.out);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    Task<T>& task = tasks[i];
    product<T>(task.rows, L.in, task.out, L.ld_in, kZero, nullptr,
               {{task.in, L.ld_out, 1}, by_rows(task.theta(c, k) + L.weight_at, L.ld_in), L.out});
  }
}

// ---- the reverse of step k: U is the cotangent of W_{k+1}, the direction is -a_k U

// the rate's gradient -<U, D^T H>, by hu = H U^T
template <class T>
void rate_gradient(const MlpCall<T>& c, const Task<T>& task, const MlpLayer& L, int64_t k, const T* hu) {
  double* sums = c.arguments->params[L.weight].rate_sums;
  if (!sums) return;
  sums[task.t * c.arguments->options.steps + k] =
      -inner(task.n, L.out, L.ld_out, hu, static_cast<const T*>(task.support(L.d, k, L.ld_out)));
}

// how many query rows, and from where on, act on the weights after step k
template <class T>
int64_t query_rows_after(const MlpCall<T>& c, const Task<T>& task, int64_t k, int64_t* first) {
  *first = c.arguments->options.every_step ? k + 1 : 0;
  return (c.plan->evaluations - *first) * task.q;
}

// out = v U^T of the factored U, for v [n][ld_in] (or, `back`, v U for v [n][ld_out]); times `scale`, added
template <class T>
void add_factored_cotangent(const MlpCall<T>& c, const Task<T>& task, const MlpLayer& L, int64_t k, const T* v,
                            bool back, T scale, T* out) {
  int64_t s;
  const int64_t after = (c.plan->steps - 1 - k) * task.n, query_rows = query_rows_after(c, task, k, &s);
  const T *h = task.support(L.h, k + 1, L.ld_in), *rh = task.kept_support(L.rh, k + 1, L.ld_in);
  const T *d = task.support(L.d, k + 1, L.ld_out), *rd = task.kept_support(L.rd, k + 1, L.ld_out);
  const T *hq = task.query(L.hq, s, L.ld_in), *qd = task.kept_query(L.qd, s, L.ld_out);
  // U = sum of (a side [rows, out])^T (b side [rows, in])
  const T* const out_sides[] = {qd, rd, d};
  const T* const in_sides[] = {hq, h, rh};
  const int64_t counts[] = {query_rows, c.arguments->options.first_order ? 0 : after,
                            c.arguments->options.first_order ? 0 : after};
  T* s_matrix = task.temp + c.plan->t_small;
  const int64_t ld = c.plan->small_ld;
  for (int i = 0; i < 3; ++i) {
    const int64_t rows = counts[i];
    if (rows == 0) continue;
    const T *near = back ? out_sides[i] : in_sides[i], *far = back ? in_sides[i] : out_sides[i];
    const int64_t width = back ? L.out : L.in, ld_near = back ? L.ld_out : L.ld_in;
    const int64_t far_width = back ? L.in : L.out, ld_far = back ? L.ld_in : L.ld_out;
    dots<T>(task.n, rows, width, v, ld_near, near, ld_near, s_matrix, ld, false);
    if (scale != 1) {
      for (int64_t row = 0; row < task.n; ++row) {
        for_each<T>(rows, [&](int64_t j, auto lane) {
          using V = decltype(lane);
          store(s_matrix + row * ld + j, scale * load<V>(s_matrix + row * ld + j));
        });
      }
    }
    product<T>(task.n, far_width, out, ld_far, kAdd, nullptr, {{s_matrix, ld, 1}, by_rows(far, ld_far), rows});
  }
}

// hu = H U^T of a factored layer or the first in Gram form
template <class T>
void input_times_cotangent(const MlpCall<T>& c, const Task<T>& task, const MlpLayer& L, int64_t k, T* hu) {
  if (L.form == Form::kGram) {
    copy(task.n * L.ld_out, task.temp + c.plan->t_qx, hu);
    if (c.arguments->options.first_order) return;
    product<T>(task.n, L.out, hu, L.ld_out, kAdd, nullptr,
               {{task.state + L.gram, c.plan->small_ld, 1}, by_rows<T>(task.kept + L.row_sum, L.ld_out), task.n});
    return;
  }
  fill(task.n * L.ld_out, hu, T(0));
  add_factored_cotangent(c, task, L, k, static_cast<const T*>(task.support(L.h, k, L.ld_in)), false, T(1), hu);
}

// the dense V^T [in][ld_out]
template <class T>
const T* transposed_direction(const MlpCall<T>& c, const Task<T>& task, const MlpLayer& L, int64_t k) {
  const T* direction = task.temp + c.plan->t_r + L.weight_at;
  if (L.transposed) return direction;
  T* to = task.temp + c.plan->t_vt;
  if (c.plan->direct) {
    transpose<T>(L.out, L.in, task.kept + c.plan->u + L.weight_at, L.ld_in, -rate(c, L.weight, k), to, L.ld_out);
  } else {
    transpose<T>(L.out, L.in, direction, L.ld_in, T(1), to, L.ld_out);
  }
  return to;
}

// out = R z = Rh W_k^T + H V^T + v_b, with `in` = Rh; null in the first layer, whose input is fixed. Without v_b where
// a norm takes it away again: what would stay are the rounding errors, and v_b may be far larger than the rest.
template <class T>
void linear_tangent(const MlpCall<T>& c, Task<T>* tasks, int64_t count, int64_t l, int64_t k) {
  const MlpPlan& plan = *c.plan;
  const MlpLayer& L = plan.layers[l];
  const T* starts[16] = {};
  for (int64_t i = 0; i < count; ++i) {
    starts[i] = bias_counts(c, L) ? tasks[i].temp + plan.t_r + L.bias_at : nullptr;
  }
  if (L.form == Form::kFactored) {
    shared_product(tasks, count, c.shared + L.packed_in, L.in, L.out, L.ld_in, L.ld_out, starts);
  }
  for (int64_t i = 0; i < count; ++i) {
    Task<T>& task = tasks[i];
    const Start start = starts[i] ? kRow : kZero;
    if (L.form == Form::kDense) {
      const T* h = l == 0 ? task.x : task.support(L.h, k, L.ld_in);
      const int64_t ld = l == 0 ? task.ld_x : L.ld_in;
      Product<T> moved{{h, ld, 1}, {}, 0};
      if (L.moves) {
        moved.b = by_rows<T>(transposed_direction(c, task, L, k), L.ld_out);
        moved.k = L.in;
      }
      if (l == 0) {
        product<T>(task.n, L.out, task.out, L.ld_out, start, starts[i], moved);
      } else {
        product<T>(task.n, L.out, task.out, L.ld_out, start, starts[i],
                   {{task.in, L.ld_in, 1}, by_rows(transposed_weight(c, task, L, k, /*is_new=*/false), L.ld_out), L.in},
                   moved);
      }
      continue;
    }
    if (L.form == Form::kGram) {
      product<T>(task.n, L.out, task.out, L.ld_out, start, starts[i], Product<T>{{}, {}, 0});
    } else {
      add_moved(c, task, L, k, task.in, task.support(L.h, 0, L.ld_in), L.in, L.ld_in, task.support(L.d, 0, L.ld_out),
                L.out, L.ld_out, task.out);
    }
    if (!L.moves) continue;
    T* hu = task.temp + plan.t_d;
    input_times_cotangent(c, task, L, k, hu);
    rate_gradient(c, task, L, k, hu);
    add_scaled(task.n * L.ld_out, -rate(c, L.weight, k), hu, task.out);
  }
}

template <class T>
void rate_gradients_of_factors(const MlpCall<T>& c, Task<T>* tasks, int64_t count, int64_t k) {
  for (int64_t l = 0; l < c.plan->num_layers; ++l) {
    const MlpLayer& L = c.plan->layers[l];
    if (L.form == Form::kDense || !L.moves) continue;
    for (int64_t i = 0; i < count; ++i) {
      T* hu = tasks[i].temp + c.plan->t_d;
      input_times_cotangent(c, tasks[i], L, k, hu);
      rate_gradient(c, tasks[i], L, k, hu);
    }
  }
}

// out = R e = RD W_k + D V, with `in` = RD; in the first layer it is added to the features' cotangent
template <class T>
void linear_backward_tangent(const MlpCall<T>& c, Task<T>* tasks, int64_t count, int64_t l, int64_t k) {
  const MlpPlan& plan = *c.plan;
  const MlpLayer& L = plan.layers[l];
  if (L.form == Form::kGram) return;
  if (L.form == Form::kFactored) {
    shared_product<T>(tasks, count, c.shared + L.packed_out, L.out, L.in, L.ld_out, L.ld_in, nullptr);
  }
  for (int64_t i = 0; i < count; ++i) {
    Task<T>& task = tasks[i];
    const T* d = task.support(L.d, k, L.ld_out);
    if (L.transposed) {
      T* out = task.dx;
      dots<T>(task.n, L.in, L.out, task.in, L.ld_out, task.theta(c, k) + L.weight_at, L.ld_out, out, L.ld_in, true);
      if (!L.moves) continue;
      dots<T>(task.n, L.in, L.out, d, L.ld_out, task.temp + plan.t_r + L.weight_at, L.ld_out, out, L.ld_in, true);
      continue;
    }
    if (L.form == Form::kDense) {
      T* out = l == 0 ? task.dx : task.out;
      const bool scales = plan.direct && L.moves;
      const T* along = scales ? scaled_derivative(c, task, L, k) : d;
      const T* v = (scales ? task.kept + plan.u : task.temp + plan.t_r) + L.weight_at;
      product<T>(task.n, L.in, out, L.ld_in, l == 0 ? kAdd : kZero, nullptr,
                 {{task.in, L.ld_out, 1}, by_rows(task.theta(c, k) + L.weight_at, L.ld_in), L.out},
                 {{along, L.ld_out, 1}, by_rows(v, L.ld_in), L.moves ? L.out : 0});
      continue;
    }
    add_moved(c, task, L, k, task.in, task.support(L.d, 0, L.ld_out), L.out, L.ld_out, task.support(L.h, 0, L.ld_in),
              L.in, L.ld_in, task.out);
    if (L.moves) add_factored_cotangent(c, task, L, k, d, true, -rate(c, L.weight, k), task.out);
  }
}

// ---- cotangents of the weight and of the features

// U += RD^T H + D^T Rh, with `in` = RD
template <class T>
void weight_cotangent(const MlpCall<T>& c, Task<T>& task, const MlpLayer& L, int64_t k, const T* rh) {
  if (L.form == Form::kGram) add_scaled(task.n * L.ld_out, T(1), task.in, task.kept + L.row_sum);
  if (L.form != Form::kDense) return;
  T* u = task.kept + c.plan->u + L.weight_at;
  if (L.transposed) {
    product<T>(L.in, L.out, u, L.ld_out, kAdd, nullptr, {{task.x, 1, task.ld_x}, by_rows(task.in, L.ld_out), task.n});
    return;
  }
  const Left<T> rd{task.in, 1, L.ld_out};
  if (!rh) {
    product<T>(L.out, L.in, u, L.ld_in, kAdd, nullptr, {rd, by_rows(task.x, task.ld_x), task.n});
    return;
  }
  product<T>(L.out, L.in, u, L.ld_in, kAdd, nullptr, {rd, by_rows<T>(task.support(L.h, k, L.ld_in), L.ld_in), task.n},
             {{task.support(L.d, k, L.ld_out), 1, L.ld_out}, by_rows(rh, L.ld_in), task.n});
}

// U += delta^T input of the query rows
template <class T>
void weight_cotangent_query(const MlpCall<T>& c, Task<T>& task, const MlpLayer& L, const T* input, int64_t ld_input) {
  if (L.form == Form::kFactored) return;
  if (L.form == Form::kGram && !L.query_dense) {
    add_scaled(task.q * L.ld_out, T(1), static_cast<const T*>(task.delta), task.kept + L.q_sum);
    return;
  }
  T* u = task.kept + (L.query_dense ? L.weight_u : c.plan->u + L.weight_at);
  if (L.transposed) {
    product<T>(L.in, L.out, u, L.ld_out, kAdd, nullptr,
               {{input, 1, ld_input}, by_rows<T>(task.delta, L.ld_out), task.q});
    return;
  }
  product<T>(L.out, L.in, u, L.ld_in, kAdd, nullptr, {{task.delta, 1, L.ld_out}, by_rows(input, ld_input), task.q});
}

// the query features' cotangent delta W_k, where the weight is at hand
template <class T>
void query_feature_cotangent(const MlpCall<T>& c, Task<T>& task, int64_t k) {
  const MlpLayer& L = c.plan->layers[0];
  if (L.form == Form::kGram && !L.query_dense) return;
  const bool add = c.plan->evaluations > 1;
  if (L.transposed) {
    dots<T>(task.q, L.in, L.out, task.delta, L.ld_out, task.theta(c, k) + L.weight_at, L.ld_out, task.dxq, L.ld_in,
            add);
    return;
  }
  const T* weight = L.query_dense ? task.state + L.query_weight : task.theta(c, k) + L.weight_at;
  product<T>(task.q, L.in, task.dxq, L.ld_in, add ? kAdd : kZero, nullptr,
             {{task.delta, L.ld_out, 1}, by_rows(weight, L.ld_in), L.out});
}

// Gram form: B += -a_k (sum of RD after k) D_k^T, M += -a_k (sum of the query's delta after k) D_k^T
template <class T>
void add_feature_factors(const MlpCall<T>& c, Task<T>& task, int64_t k) {
  const MlpPlan& plan = *c.plan;
  const MlpLayer& L = plan.layers[0];
  if (!L.moves) return;
  const T* d = task.support(L.d, k, L.ld_out);
  const T factor = -rate(c, L.weight, k);
  const int64_t ld = plan.small_ld;
  T* s = task.temp + plan.t_small;
  auto add = [&](int64_t rows, const T* sums, T* to) {
    dots<T>(rows, task.n, L.out, sums, L.ld_out, d, L.ld_out, s, ld, false);
    for (int64_t row = 0; row < rows; ++row) add_scaled(task.n, factor, s + row * ld, to + row * ld);
  };
  if (!c.arguments->options.first_order) add(task.n, task.kept + L.row_sum, task.temp + plan.t_bb);
  if (!L.query_dense) add(task.q, task.kept + L.q_sum, task.temp + plan.t_mm);
}

// Gram form, at the end: dX = (sum of RD) W_0 + (B + B^T) X + M^T Xq, dXq = (sum of delta) W_0 + M X
template <class T>
void gram_feature_cotangents(const MlpCall<T>& c, Task<T>* tasks, int64_t count) {
  const MlpPlan& plan = *c.plan;
  const MlpLayer& L = plan.layers[0];
  const int64_t ld = plan.small_ld;
  const bool second_order = !c.arguments->options.first_order;
  if (plan.t_xs != kAbsent && second_order) {
    for (int64_t i = 0; i < count; ++i) {
      tasks[i].rows = tasks[i].n;
      tasks[i].in = tasks[i].kept + L.row_sum;
      tasks[i].out = tasks[i].dx;
    }
    shared_product<T>(tasks, count, c.shared + L.packed_out, L.out, L.in, L.ld_out, L.ld_in, nullptr);
  }
  if (plan.t_xq != kAbsent && !L.query_dense) {
    for (int64_t i = 0; i < count; ++i) {
      tasks[i].rows = tasks[i].q;
      tasks[i].in = tasks[i].kept + L.q_sum;
      tasks[i].out = tasks[i].dxq;
    }
    shared_product<T>(tasks, count, c.shared + L.packed_out, L.out, L.in, L.ld_out, L.ld_in, nullptr);
  }
  if (!L.moves) return;
  for (int64_t i = 0; i < count; ++i) {
    Task<T>& task = tasks[i];
    const Right<T> x = by_rows(task.x, task.ld_x);
    const T *bb = task.temp + plan.t_bb, *mm = task.temp + plan.t_mm;
    if (plan.t_xs != kAbsent && second_order) {
      T* to = task.dx;
      product<T>(task.n, L.in, to, L.ld_in, kAdd, nullptr, {{bb, ld, 1}, x, task.n}, {{bb, 1, ld}, x, task.n});
      if (L.query_dense) {
        T* esum = task.temp + plan.t_esum;
        fill(task.n * L.ld_out, esum, T(0));
        for (int64_t k = 0; k < plan.steps; ++k) {
          const T* d = task.support(L.d, k, L.ld_out);
          add_scaled(task.n * L.ld_out, -rate(c, L.weight, k), d, esum);
        }
        product<T>(task.n, L.in, to, L.ld_in, kAdd, nullptr,
                   {{esum, L.ld_out, 1}, by_rows<T>(task.kept + L.weight_u, L.ld_in), L.out});
      } else {
        product<T>(task.n, L.in, to, L.ld_in, kAdd, nullptr, {{mm, 1, ld}, by_rows(task.xq, task.ld_x), task.q});
      }
    }
    if (plan.t_xq != kAbsent && !L.query_dense) {
      product<T>(task.q, L.in, task.dxq, L.ld_in, kAdd, nullptr, {{mm, ld, 1}, x, task.n});
    }
  }
}

}  // namespace mtml::MTML_ISA
