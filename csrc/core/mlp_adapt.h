// The sweeps of mlp_adapt over a block of tasks: K inner steps and the query rows forward, and the exact reverse of it
// all (docs/maths/mlp_adapt.md). Tasks of a block go through the layers together, so that a shared weight is read from
// memory once for all of them; no task's result depends on the others.
#pragma once

#include "core/mlp_linear.h"
#include "core/mlp_shared.h"

namespace mtml::MTML_ISA {

template <class T>
class Sweep {
 public:
  // the places [begin, end) of the order; `state`, `kept` and `temp` belong to their tasks, one after the other
  MTML_INLINE Sweep(const MlpCall<T>& call, int64_t begin, int64_t end, T* state, T* kept, T* temp)
      : c(call), a(*call.arguments), plan(*call.plan), count(end - begin) {
    for (int64_t i = 0; i < count; ++i) {
      Task<T>& task = tasks[i];
      task.t = call.order ? call.order[begin + i] : begin + i;
      task.n = a.support.offsets[task.t + 1] - a.support.offsets[task.t];
      task.q = a.query.offsets[task.t + 1] - a.query.offsets[task.t];
      task.x = a.support.x + a.support.offsets[task.t] * a.options.widths[0];
      task.xq = a.query.x + a.query.offsets[task.t] * a.options.widths[0];
      task.ld_x = a.options.widths[0];
      task.state = state + i * plan.state_size;
      task.kept = kept + i * plan.kept_size;
      task.temp = temp + i * plan.temp_size;
      task.dx = feature_gradient(a.support, task.t, task.temp + plan.t_xs);
      task.dxq = feature_gradient(a.query, task.t, task.temp + plan.t_xq);
      if (plan.copies_x) {
        const MlpLayer& first = plan.layers[0];
        task.ld_x = first.ld_in;
        task.x = task.state + first.h;
        task.xq = task.state + first.hq;
      }
    }
  }

  void forward() {
    for (int64_t i = 0; i < count; ++i) start(tasks[i]);
    for (int64_t k = 0; k < plan.steps; ++k) {
      if (a.options.every_step) query(k, k);
      support(k);
      for (int64_t i = 0; i < count; ++i) step(tasks[i], k);
    }
    if (plan.steps > 0 || !a.options.every_step) {
      query(plan.steps, plan.evaluations - 1);
    } else {
      for (int64_t s = 0; s < plan.evaluations; ++s) query(0, s);
    }
    if (a.fast) {
      for (int64_t i = 0; i < count; ++i) write_fast(tasks[i]);
    }
  }

  void backward() {
    for (int64_t i = 0; i < count; ++i) start_backward(tasks[i]);
    if (plan.steps > 0 || !a.options.every_step) {
      query_backward(plan.steps, plan.evaluations - 1);
    } else {
      for (int64_t s = plan.evaluations - 1; s >= 0; --s) query_backward(0, s);
    }
    for (int64_t k = plan.steps - 1; k >= 0; --k) {
      for (int64_t i = 0; i < count; ++i) direction(c, tasks[i], k);
      step_backward(k);
      if (a.options.every_step) query_backward(k, k);
    }
    finish_backward();
  }

 private:
  static constexpr int64_t kMaxBlock = 16;
  const MlpCall<T>& c;
  const MlpArguments<T>& a;
  const MlpPlan& plan;
  int64_t count;
  Task<T> tasks[kMaxBlock];

  // the user's array itself, where its rows are whole vectors
  T* feature_gradient(const MlpRows<T>& rows, int64_t t, T* temp) const {
    const bool whole = rows.x_gradient && layer(0).ld_in == layer(0).in;
    return whole ? rows.x_gradient + rows.offsets[t] * layer(0).in : temp;
  }

  // the activation's loops, each compiled for every activation
  template <class F>
  MTML_INLINE void by_activation(const F& f) const {
    with_activation(a.options.activation, f);
  }
  void act(int64_t n, const T* y, T* h) const {
    by_activation([&](auto of) { activate<decltype(of)::kValue>(n, y, h); });
  }
  void act_backward(int64_t n, const T* e, const T* y, const T* h, T* dy) const {
    by_activation([&](auto of) { activate_backward<decltype(of)::kValue>(n, e, y, h, dy); });
  }
  void act_tangent(int64_t n, const T* ry, const T* y, const T* h, T* rh) const {
    by_activation([&](auto of) { activate_tangent<decltype(of)::kValue>(n, ry, y, h, rh); });
  }
  void act_backward_tangent(int64_t n, const T* re, const T* e, const T* ry, const T* y, const T* h, T* rdy) const {
    by_activation([&](auto of) { activate_backward_tangent<decltype(of)::kValue>(n, re, e, ry, y, h, rdy); });
  }

  const MlpLayer& layer(int64_t l) const { return plan.layers[l]; }
  int64_t last() const { return plan.num_layers - 1; }

  // ---- forward

  void start(Task<T>& task) {
    const MlpLayer& first = layer(0);
    if (plan.copies_x) {
      const int64_t row = a.options.widths[0];
      copy_rows(task.n, row, a.support.x + a.support.offsets[task.t] * row, row, task.state + first.h, first.ld_in);
      copy_rows(task.q, row, a.query.x + a.query.offsets[task.t] * row, row, task.state + first.hq, first.ld_in);
    }
    if (plan.theta_per_task) gather_theta(c, task.t, task.state + plan.theta);
    if (a.options.momentum != 0) fill(plan.theta_size, task.temp + plan.t_w, T(0));
    if (first.form == Form::kGram) start_gram(c, task);
  }

  // the support rows through theta_k, and the gradient of their loss by every layer's output
  void support(int64_t k) {
    for (int64_t l = 0; l <= last(); ++l) {
      const MlpLayer& L = layer(l);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        task.rows = task.n;
        task.in = l == 0 ? task.x : task.support(L.h, k, L.ld_in);
        task.out =
            L.hidden && L.y != kAbsent && !a.options.norm ? task.support(L.y, k, L.ld_out) : task.temp + plan.t_a;
      }
      linear(c, tasks, count, l, k, /*is_query=*/false);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        if (!L.hidden) {
          task.loss(c, a.support, task.n, task.out, L, task.support(plan.p, k, L.ld_out),
                    task.support(L.d, k, L.ld_out));
          continue;
        }
        T* y = task.out;
        if (a.options.norm) {
          y = L.y != kAbsent ? task.support(L.y, k, L.ld_out) : task.temp + plan.t_b;
          const T* theta = task.theta(c, k);
          batch_norm<T>(task.n, L.ld_out, L.ld_out, task.out, theta + L.gain_at, theta + L.shift_at, a.options.norm_eps,
                        y, task.support(L.xh, k, L.ld_out), task.state + L.r + k * L.ld_out);
        }
        act(task.n * L.ld_out, y, task.support(layer(l + 1).h, k, L.ld_out));
      }
    }
    for (int64_t l = last(); l > 0; --l) {
      const MlpLayer& L = layer(l);
      const MlpLayer& below = layer(l - 1);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        task.rows = task.n;
        task.in = task.support(L.d, k, L.ld_out);
        task.out = below.e != kAbsent ? task.support(below.e, k, L.ld_in) : task.temp + plan.t_a;
      }
      linear_backward(c, tasks, count, l, k);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        const T* h = task.support(L.h, k, L.ld_in);
        const T* y = below.y != kAbsent ? task.support(below.y, k, L.ld_in) : h;
        T* d = task.support(below.d, k, L.ld_in);
        T* dy = a.options.norm ? task.support(below.dy, k, L.ld_in) : d;
        act_backward(task.n * L.ld_in, task.out, y, h, dy);
        if (a.options.norm) {
          T* grad = task.temp + plan.t_grad;
          batch_norm_backward<T>(task.n, L.ld_in, L.ld_in, dy, task.support(below.xh, k, L.ld_in),
                                 task.state + below.r + k * L.ld_in, task.theta(c, k) + below.gain_at, d,
                                 grad + below.gain_at, grad + below.shift_at);
        }
      }
    }
  }

  // theta_{k+1}
  void step(Task<T>& task, int64_t k) {
    gradient(c, task, k, /*weights=*/!plan.direct, /*norms=*/false);
    update(c, task, k);
    const MlpLayer& first = layer(0);
    if (first.form == Form::kGram && first.moves) {
      const T* d = task.support(first.d, k, first.ld_out);
      add_scaled(task.n * first.ld_out, -rate(c, first.weight, k), d, task.temp + plan.t_esum);
    }
  }

  // the query rows through theta_k: evaluation s
  void query(int64_t k, int64_t s) {
    if (layer(0).query_dense) {
      for (int64_t i = 0; i < count; ++i) query_weight(c, tasks[i]);
    }
    for (int64_t l = 0; l <= last(); ++l) {
      const MlpLayer& L = layer(l);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        task.rows = task.q;
        task.in = l == 0 ? task.xq : task.query(L.hq, s, L.ld_in);
        task.out = !L.hidden                            ? task.query(plan.zq, s, L.ld_out)
                   : L.yq != kAbsent && !a.options.norm ? task.query(L.yq, s, L.ld_out)
                                                        : task.temp + plan.t_a;
      }
      linear(c, tasks, count, l, k, /*is_query=*/true);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        if (!L.hidden) {
          write_results(task, s);
          continue;
        }
        T* y = task.out;
        if (a.options.norm) {
          y = L.yq != kAbsent ? task.query(L.yq, s, L.ld_out) : task.temp + plan.t_b;
          const T* theta = task.theta(c, k);
          batch_norm<T>(task.q, L.ld_out, L.ld_out, task.out, theta + L.gain_at, theta + L.shift_at, a.options.norm_eps,
                        y, task.query(L.xhq, s, L.ld_out), task.state + L.rq + s * L.ld_out);
        }
        act(task.q * L.ld_out, y, task.query(layer(l + 1).hq, s, L.ld_out));
      }
    }
  }

  void write_results(Task<T>& task, int64_t s) {
    const MlpLayer& L = layer(last());
    const T* z = task.query(plan.zq, s, L.ld_out);
    const int64_t all_rows = a.query.offsets[a.options.tasks];
    if (a.losses) {
      const bool labelled = a.query.labels || a.query.targets;
      a.losses[s * a.options.tasks + task.t] =
          labelled ? task.loss(c, a.query, task.q, z, L, static_cast<T*>(nullptr), static_cast<T*>(nullptr)) : T(0);
    }
    if (!a.outputs) return;
    T* outputs = a.outputs + (s * all_rows + a.query.offsets[task.t]) * L.out;
    copy_rows(task.q, L.out, z, L.ld_out, outputs, L.out);
    if (!a.class_mask) return;
    const bool* mask = a.class_mask + task.t * L.out;
    const T nothing = a.options.loss == Loss::kCrossEntropy ? -static_cast<T>(__builtin_inf()) : T(0);
    for (int64_t row = 0; row < task.q; ++row) {
      for (int64_t j = 0; j < L.out; ++j) {
        if (!mask[j]) outputs[row * L.out + j] = nothing;
      }
    }
  }

  void write_fast(Task<T>& task) {
    const T* theta = task.theta(c, plan.steps);
    T* to = a.fast + task.t * c.num_elements;
    for (int64_t p = 0; p < a.num_params; ++p) {
      const Place& place = c.places[p];
      from_place(place, theta, to);
      to += place.rows * place.cols;
    }
  }

  // ---- backward

  void start_backward(Task<T>& task) {
    fill(plan.theta_size, task.kept + plan.u, T(0));
    if (a.options.momentum != 0) fill(plan.theta_size, task.temp + plan.t_w, T(0));
    if (plan.rate_u_rows > 0) fill(plan.rate_u_rows * plan.theta_size, task.kept + plan.rate_u, T(0));
    const MlpLayer& first = layer(0);
    if (first.form == Form::kGram) {
      fill(task.n * first.ld_out, task.kept + first.row_sum, T(0));
      fill(task.q * first.ld_out, task.kept + first.q_sum, T(0));
      if (first.query_dense) fill(first.out * first.ld_in, task.kept + first.weight_u, T(0));
      if (plan.t_bb != kAbsent) {
        fill(task.n * plan.small_ld, task.temp + plan.t_bb, T(0));
        fill(task.q * plan.small_ld, task.temp + plan.t_mm, T(0));
      }
    }
    if (plan.t_xs != kAbsent) fill(task.n * first.ld_in, task.dx, T(0));
    if (plan.t_xq != kAbsent && plan.evaluations > 1) fill(task.q * first.ld_in, task.dxq, T(0));
    if (!a.d_fast) return;
    const T* from = a.d_fast + task.t * c.num_elements;
    for (int64_t p = 0; p < a.num_params; ++p) {
      const Place& place = c.places[p];
      to_place(place, from, task.kept + plan.u);
      from += place.rows * place.cols;
    }
  }

  // the cotangents of evaluation s, back to theta_k
  void query_backward(int64_t k, int64_t s) {
    for (int64_t i = 0; i < count; ++i) {
      Task<T>& task = tasks[i];
      const MlpLayer& L = layer(last());
      task.delta = L.qd != kAbsent ? task.kept_query(L.qd, s, L.ld_out) : task.temp + plan.t_b;
      output_cotangent(task, s, task.delta);
    }
    for (int64_t l = last(); l >= 0; --l) {
      const MlpLayer& L = layer(l);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        task.rows = task.q;
        T* u = task.kept + plan.u;
        const T* input = l == 0 ? task.xq : task.query(L.hq, s, L.ld_in);
        const int64_t ld_input = l == 0 ? task.ld_x : L.ld_in;
        weight_cotangent_query(c, task, L, input, ld_input);
        if (bias_counts(c, L)) add_column_sums(task.q, L.ld_out, task.delta, u + L.bias_at);
        if (l == 0 && plan.t_xq != kAbsent) query_feature_cotangent(c, task, k);
        task.in = task.delta;
        task.out = task.temp + plan.t_a;
      }
      if (l == 0) break;
      linear_backward(c, tasks, count, l, k);
      const MlpLayer& below = layer(l - 1);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        const T* h = task.query(L.hq, s, L.ld_in);
        const T* y = below.yq != kAbsent ? task.query(below.yq, s, L.ld_in) : h;
        T* delta = below.qd != kAbsent ? task.kept_query(below.qd, s, L.ld_in)
                                       : task.temp + (task.delta == task.temp + plan.t_b ? plan.t_c : plan.t_b);
        T* dy = a.options.norm ? task.temp + plan.t_d : delta;
        act_backward(task.q * L.ld_in, task.out, y, h, dy);
        if (a.options.norm) {
          // their sums over the rows are cotangents of gain and shift
          T* sums = task.temp + plan.t_grad;
          batch_norm_backward<T>(task.q, L.ld_in, L.ld_in, dy, task.query(below.xhq, s, L.ld_in),
                                 task.state + below.rq + s * L.ld_in, task.theta(c, k) + below.gain_at, delta,
                                 sums + below.gain_at, sums + below.shift_at);
          T* u = task.kept + plan.u;
          add_scaled(L.ld_in, T(1), sums + below.gain_at, u + below.gain_at);
          add_scaled(L.ld_in, T(1), sums + below.shift_at, u + below.shift_at);
        }
        task.delta = delta;
      }
    }
    if (layer(0).form == Form::kGram) {
      for (int64_t i = 0; i < count; ++i) query_part_of_direction(c, tasks[i]);
    }
  }

  // cotangent of the last layer's outputs: of the losses through them, and their own
  void output_cotangent(Task<T>& task, int64_t s, T* delta) {
    const MlpLayer& L = layer(last());
    const int64_t all_rows = a.query.offsets[a.options.tasks];
    const bool labelled = a.query.labels || a.query.targets;
    const T weight = a.d_losses && labelled ? a.d_losses[s * a.options.tasks + task.t] : T(0);
    if (a.d_losses && labelled) {
      task.loss(c, a.query, task.q, task.query(plan.zq, s, L.ld_out), L, static_cast<T*>(nullptr), delta);
      for_each<T>(task.q * L.ld_out, [&](int64_t i, auto lane) {
        using V = decltype(lane);
        store(delta + i, weight * load<V>(delta + i));
      });
    } else {
      fill(task.q * L.ld_out, delta, T(0));
    }
    if (!a.d_outputs) return;
    const T* from = a.d_outputs + (s * all_rows + a.query.offsets[task.t]) * L.out;
    const bool* mask = a.class_mask ? a.class_mask + task.t * L.out : nullptr;
    for (int64_t row = 0; row < task.q; ++row) {
      for (int64_t j = 0; j < L.out; ++j) {
        if (!mask || mask[j]) delta[row * L.ld_out + j] += from[row * L.out + j];
      }
    }
  }

  // u_k from u_{k+1}: the Hessian of the support loss at theta_k times the direction, by the R-operator
  void step_backward(int64_t k) {
    if (plan.t_bb != kAbsent) {
      for (int64_t i = 0; i < count; ++i) add_feature_factors(c, tasks[i], k);
    }
    if (a.options.first_order) {
      // nothing flows through the inner gradient; only the rates' gradients are left
      if (a.wants_rates) rate_gradients_of_factors(c, tasks, count, k);
      return;
    }
    for (int64_t l = 0; l <= last(); ++l) {
      const MlpLayer& L = layer(l);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        task.rows = task.n;
        task.in = l == 0 ? nullptr : tangent_of_input(task, L, k);
        task.out = task.temp + plan.t_a;
      }
      linear_tangent(c, tasks, count, l, k);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        if (!L.hidden) {
          task.loss_tangent(c, L, task.support(plan.p, k, L.ld_out), task.out, delta_of(task, L, k));
          continue;
        }
        const T* h = task.support(layer(l + 1).h, k, L.ld_out);
        const T* y = L.y != kAbsent ? task.support(L.y, k, L.ld_out) : h;
        T* ry = L.t_ry != kAbsent ? task.temp + L.t_ry : task.temp + plan.t_b;
        const T* direction = task.temp + plan.t_r;
        if (a.options.norm) {
          batch_norm_tangent<T>(task.n, L.ld_out, L.ld_out, task.out, task.support(L.xh, k, L.ld_out),
                                task.state + L.r + k * L.ld_out, task.theta(c, k) + L.gain_at, direction + L.gain_at,
                                direction + L.shift_at, task.temp + L.t_rxh, task.temp + L.t_rr, ry);
        } else if (L.t_ry != kAbsent) {
          copy(task.n * L.ld_out, task.out, ry);
        } else {
          ry = task.out;
        }
        act_tangent(task.n * L.ld_out, ry, y, h, tangent_of_input(task, layer(l + 1), k));
      }
    }
    for (int64_t l = last(); l >= 0; --l) {
      const MlpLayer& L = layer(l);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        task.rows = task.n;
        task.in = delta_of(task, L, k);
        task.out = task.temp + plan.t_a;
      }
      if (l > 0 || plan.t_xs != kAbsent) linear_backward_tangent(c, tasks, count, l, k);
      for (int64_t i = 0; i < count; ++i) {
        Task<T>& task = tasks[i];
        weight_cotangent(c, task, L, k, l == 0 ? nullptr : tangent_of_input(task, L, k));
        T* u = task.kept + plan.u;
        if (bias_counts(c, L)) add_column_sums(task.n, L.ld_out, task.in, u + L.bias_at);
        if (l == 0) continue;
        const MlpLayer& below = layer(l - 1);
        const T* h = task.support(L.h, k, L.ld_in);
        const T* y = below.y != kAbsent ? task.support(below.y, k, L.ld_in) : h;
        const T* e = below.e != kAbsent ? task.support(below.e, k, L.ld_in) : nullptr;
        const T* ry = below.t_ry != kAbsent ? task.temp + below.t_ry : nullptr;
        T* to = delta_of(task, below, k);
        T* rdy = a.options.norm ? task.temp + plan.t_d : to;
        act_backward_tangent(task.n * L.ld_in, task.out, e, ry, y, h, rdy);
        if (a.options.norm) {
          T* sums = task.temp + plan.t_grad;
          batch_norm_backward_tangent<T>(task.n, L.ld_in, L.ld_in, task.support(below.dy, k, L.ld_in), rdy,
                                         task.support(below.xh, k, L.ld_in), task.temp + below.t_rxh,
                                         task.state + below.r + k * L.ld_in, task.temp + below.t_rr,
                                         task.theta(c, k) + below.gain_at, task.temp + plan.t_r + below.gain_at, to,
                                         sums + below.gain_at, sums + below.shift_at);
          add_scaled(L.ld_in, T(1), sums + below.gain_at, u + below.gain_at);
          add_scaled(L.ld_in, T(1), sums + below.shift_at, u + below.shift_at);
        }
      }
    }
  }

  // where the tangent of a layer's input goes, and that of the derivative by its output
  T* tangent_of_input(Task<T>& task, const MlpLayer& L, int64_t k) {
    return L.rh != kAbsent ? task.kept_support(L.rh, k, L.ld_in) : task.temp + L.t_rh;
  }
  T* delta_of(Task<T>& task, const MlpLayer& L, int64_t k) {
    // two places, so that a layer's may be read while the one below is written
    const bool odd = (&L - plan.layers) & 1;
    return L.rd != kAbsent ? task.kept_support(L.rd, k, L.ld_out) : task.temp + (odd ? plan.t_b : plan.t_c);
  }

  void finish_backward() {
    if (layer(0).form == Form::kGram && (plan.t_xs != kAbsent || plan.t_xq != kAbsent)) {
      gram_feature_cotangents(c, tasks, count);
    }
    if (layer(0).query_dense) {
      for (int64_t i = 0; i < count; ++i) finish_weight_u(c, tasks[i]);
    }
    const int64_t features = a.options.widths[0], ld = layer(0).ld_in;
    for (int64_t i = 0; i < count; ++i) {
      Task<T>& task = tasks[i];
      if (plan.t_xs != kAbsent && ld != features) {
        copy_rows(task.n, features, task.dx, ld, a.support.x_gradient + a.support.offsets[task.t] * features, features);
      }
      if (plan.t_xq != kAbsent && ld != features) {
        copy_rows(task.q, features, task.dxq, ld, a.query.x_gradient + a.query.offsets[task.t] * features, features);
      }
      for (int64_t p = 0; p < a.num_params; ++p) {
        const MlpParameter<T>& param = a.params[p];
        const Place& place = c.places[p];
        if (!param.gradient || param.task_stride == 0) continue;
        from_place<T>(place, task.kept + plan.u, param.gradient + task.t * place.rows * place.cols);
      }
    }
  }
};

template <class T>
void mlp_forward(const MlpCall<T>& call, int64_t begin, int64_t end, T* state, T* kept, T* temp) {
  Sweep<T>(call, begin, end, state, kept, temp).forward();
}

template <class T>
void mlp_backward(const MlpCall<T>& call, int64_t begin, int64_t end, T* state, T* kept, T* temp) {
  Sweep<T>(call, begin, end, state, kept, temp).backward();
}

template <class T>
constexpr MlpAdapt<T> kMlpAdapt = {
    kLanes<T>,      kPanel<T>,       packed_size<T>,         outer_scratch<T>(), mlp_prepare<T>, mlp_first_products<T>,
    mlp_forward<T>, mlp_backward<T>, mlp_weight_gradient<T>, mlp_sum_tasks<T>};

}  // namespace mtml::MTML_ISA
