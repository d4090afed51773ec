// A task's parameter vector in mlp_adapt: its steps, and the direction in which the reverse of a step asks for the
// Hessian. The parameters lie one after the other as padded matrices (Place).
#pragma once

#include "core/activations.h"
#include "core/gemm.h"
#include "core/lanes.h"
#include "core/losses.h"
#include "core/mlp_adapt_plan.h"
#include "core/sgd_step.h"
#include "core/transpose.h"
// after lanes.h and activations.h, which bring what it needs
#include "core/batch_norm.h"

namespace mtml::MTML_ISA {

template <class T>
MTML_INLINE void fill(int64_t n, T* to, T value) {
  for_each<T>(n, [&](int64_t i, auto lane) { store(to + i, decltype(lane){} + value); });
}

template <class T>
MTML_INLINE void copy(int64_t n, const T* from, T* to) {
  for_each<T>(n, [&](int64_t i, auto lane) { store(to + i, load<decltype(lane)>(from + i)); });
}

// to += factor * from
template <class T>
MTML_INLINE void add_scaled(int64_t n, T factor, const T* from, T* to) {
  for_each<T>(n, [&](int64_t i, auto lane) {
    using V = decltype(lane);
    store(to + i, load<V>(to + i) + factor * load<V>(from + i));
  });
}

// rows of `cols` elements; where the target's rows are longer, its columns up to the next whole vector become zero
template <class T>
void copy_rows(int64_t rows, int64_t cols, const T* from, int64_t ld_from, T* to, int64_t ld_to) {
  const int64_t end = ld_to < padded<T>(cols) ? cols : padded<T>(cols);
  for (int64_t row = 0; row < rows; ++row) {
    copy(cols, from + row * ld_from, to + row * ld_to);
    for (int64_t j = cols; j < end; ++j) to[row * ld_to + j] = 0;
  }
}

// to [ld] += the sum of the rows [n][ld]; short sums go into a total, as in simd.h, and that is added once
template <class T>
void add_column_sums(int64_t n, int64_t ld, const T* rows, T* to) {
  for_each<T>(ld, [&](int64_t j, auto lane) {
    using V = decltype(lane);
    V total{};
    for (int64_t first = 0; first < n; first += kShortSum) {
      const int64_t end = first + kShortSum < n ? first + kShortSum : n;
      V part{};
      for (int64_t row = first; row < end; ++row) part += load<V>(rows + row * ld + j);
      total += part;
    }
    store(to + j, load<V>(to + j) + total);
  });
}

// <a, b> over the true columns of two padded matrices
template <class T>
double inner(int64_t rows, int64_t cols, int64_t ld, const T* a, const T* b) {
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    total += sum<T>(cols, [&](int64_t i, auto lane) {
      using V = decltype(lane);
      return load<V>(a + row * ld + i) * load<V>(b + row * ld + i);
    });
  }
  return total;
}

// Where one task's arrays lie.
template <class T>
struct Task {
  int64_t t, n, q;  // which, and how many support and query rows
  const T *x, *xq;  // [n][ld_x], [q][ld_x]
  int64_t ld_x;
  T *state, *kept, *temp;
  T *dx, *dxq;  // gradients by the features [n][ld_in], [q][ld_in], where they are wanted
  // what the layer at hand works on: rows, their input, its output; and the cotangent on its way down
  int64_t rows;
  const T* in;
  T *out, *delta;

  MTML_INLINE T* at(T* base, int64_t offset, int64_t elements) const {
    return offset == kAbsent ? nullptr : base + offset + elements;
  }
  MTML_INLINE T* support(int64_t offset, int64_t k, int64_t ld) const { return at(state, offset, k * n * ld); }
  MTML_INLINE T* query(int64_t offset, int64_t s, int64_t ld) const { return at(state, offset, s * q * ld); }
  MTML_INLINE T* kept_support(int64_t offset, int64_t k, int64_t ld) const { return at(kept, offset, k * n * ld); }
  MTML_INLINE T* kept_query(int64_t offset, int64_t s, int64_t ld) const { return at(kept, offset, s * q * ld); }

  MTML_INLINE const T* theta(const MlpCall<T>& c, int64_t k) const {
    if (k == 0 && !c.plan->theta_per_task) return c.shared + c.plan->theta_0;
    return state + c.plan->theta + k * c.plan->theta_size;
  }

  T loss(const MlpCall<T>& c, const MlpRows<T>& of, int64_t num_rows, const T* z, const MlpLayer& L, T* p, T* d) const {
    const MlpArguments<T>& a = *c.arguments;
    const int64_t first = of.offsets[t];
    return loss_forward<T>(a.options.loss, num_rows, L.out, L.ld_out, z, of.labels ? of.labels + first : nullptr,
                           of.targets ? of.targets + first * L.out : nullptr,
                           a.class_mask ? a.class_mask + t * L.out : nullptr, p, d);
  }
  void loss_tangent(const MlpCall<T>& c, const MlpLayer& L, const T* p, const T* rz, T* rd) const {
    const MlpArguments<T>& a = *c.arguments;
    mtml::MTML_ISA::loss_tangent<T>(a.options.loss, n, L.out, L.ld_out, p, rz,
                                    a.class_mask ? a.class_mask + t * L.out : nullptr, rd);
  }
};

// the rate of step k for a parameter that has one rate
template <class T>
MTML_INLINE T rate(const MlpCall<T>& c, int64_t p, int64_t k) {
  const MlpParameter<T>& param = c.arguments->params[p];
  return param.rate[k * param.rate_step];
}

// a parameter from the user's array to its place in a vector, and back
template <class T>
void to_place(const Place& place, const T* from, T* vector) {
  if (place.transposed)
    return transpose<T>(place.cols, place.rows, from, place.rows, T(1), vector + place.at, place.ld);
  copy_rows(place.rows, place.cols, from, place.cols, vector + place.at, place.ld);
}
template <class T>
void from_place(const Place& place, const T* vector, T* to) {
  const T* from = vector + place.at;
  if (!place.transposed) return copy_rows(place.rows, place.cols, from, place.ld, to, place.cols);
  for (int64_t row = 0; row < place.cols; ++row) {
    for (int64_t col = 0; col < place.rows; ++col) to[row * place.rows + col] = from[col * place.ld + row];
  }
}

// theta_0 of a task, or (t = 0) that of all tasks
template <class T>
void gather_theta(const MlpCall<T>& c, int64_t t, T* theta) {
  for (int64_t p = 0; p < c.arguments->num_params; ++p) {
    const MlpParameter<T>& param = c.arguments->params[p];
    if (c.places[p].at != kAbsent) to_place(c.places[p], param.start + t * param.task_stride, theta);
  }
}

// Whether the layer's output depends on its bias: a norm behind it takes any constant away, so that the derivative is
// zero, and not the rounding errors that its terms would leave.
template <class T>
MTML_INLINE bool bias_counts(const MlpCall<T>& c, const MlpLayer& L) {
  return L.bias != kAbsent && !(L.hidden && c.arguments->options.norm);
}

// The inner gradient at theta_k, by the derivatives d of the layers' outputs; gain and shift come from the backward
// half of the norm, and are done again where that was long ago (`norms`). Those of weights may be left out.
template <class T>
void gradient(const MlpCall<T>& c, const Task<T>& task, int64_t k, bool weights, bool norms) {
  const MlpPlan& plan = *c.plan;
  T* grad = task.temp + plan.t_grad;
  for (int64_t l = 0; l < plan.num_layers; ++l) {
    const MlpLayer& L = plan.layers[l];
    const T* d = task.support(L.d, k, L.ld_out);
    if (L.transposed && L.moves && weights) {
      product<T>(L.in, L.out, grad + L.weight_at, L.ld_out, kZero, nullptr,
                 {{task.x, 1, task.ld_x}, {d, L.ld_out, kPanel<T>}, task.n});
    } else if (L.form == Form::kDense && L.moves && weights) {
      const T* h = l == 0 ? task.x : task.support(L.h, k, L.ld_in);
      const int64_t ld = l == 0 ? task.ld_x : L.ld_in;
      product<T>(L.out, L.in, grad + L.weight_at, L.ld_in, kZero, nullptr,
                 {{d, 1, L.ld_out}, {h, ld, kPanel<T>}, task.n});
    }
    if (L.bias != kAbsent) {
      fill(L.ld_out, grad + L.bias_at, T(0));
    }
    if (bias_counts(c, L)) {
      add_column_sums(task.n, L.ld_out, d, grad + L.bias_at);
    }
    if (norms && L.hidden && c.arguments->options.norm) {
      // the derivative by the rows in front of the norm is known already, and goes where nobody reads it
      batch_norm_backward<T>(task.n, L.ld_out, L.ld_out, task.support(L.dy, k, L.ld_out),
                             task.support(L.xh, k, L.ld_out), task.state + L.r + k * L.ld_out,
                             task.theta(c, k) + L.gain_at, task.temp + plan.t_a, grad + L.gain_at, grad + L.shift_at);
    }
  }
}

template <class T>
double clip_scale(const MlpCall<T>& c, const T* grad, double* norm) {
  double squares = 0;
  for (int64_t p = 0; p < c.arguments->num_params; ++p) {
    const Place& place = c.places[p];
    if (!c.arguments->params[p].moves) continue;
    squares += inner(place.rows, place.cols, place.ld, grad + place.at, grad + place.at);
  }
  *norm = __builtin_sqrt(squares);
  return clip_factor(*norm, c.arguments->options.clip);
}

// f(i, lane, rate) over the elements i of a parameter in a parameter vector; with one rate over the padding too
template <class T, class F>
MTML_INLINE void for_elements(const MlpParameter<T>& param, const Place& place, int64_t k, const F& f) {
  if (param.rate_element == 0) {
    const T rate = param.rate[k * param.rate_step];
    for_each<T>(place.rows * place.ld, [&](int64_t i, auto lane) { f(place.at + i, lane, decltype(lane){} + rate); });
    return;
  }
  for (int64_t row = 0; row < place.rows; ++row) {
    const T* rates = param.rate + k * param.rate_step + row * place.cols;
    for_each<T>(place.cols,
                [&](int64_t i, auto lane) { f(place.at + row * place.ld + i, lane, load<decltype(lane)>(rates + i)); });
  }
}

// -a D of step k
template <class T>
const T* scaled_derivative(const MlpCall<T>& c, const Task<T>& task, const MlpLayer& L, int64_t k) {
  T* scaled = task.temp + c.plan->t_scaled;
  const T factor = -rate(c, L.weight, k);
  const T* d = task.support(L.d, k, L.ld_out);
  for_each<T>(task.n * L.ld_out,
              [&](int64_t i, auto lane) { store(scaled + i, factor * load<decltype(lane)>(d + i)); });
  return scaled;
}

// W_{k+1} = W_k - a D^T H of a dense layer, in one product
template <class T>
void update_weight(const MlpCall<T>& c, const Task<T>& task, const MlpLayer& L, int64_t k, T* next) {
  const T* theta = task.theta(c, k);
  const T* scaled = scaled_derivative(c, task, L, k);
  if (L.transposed) {
    return product<T>(L.in, L.out, next + L.weight_at, L.ld_out, kMatrix, theta + L.weight_at,
                      {{task.x, 1, task.ld_x}, {scaled, L.ld_out, kPanel<T>}, task.n});
  }
  const T* h = task.support(L.h, k, L.ld_in);
  product<T>(L.out, L.in, next + L.weight_at, L.ld_in, kMatrix, theta + L.weight_at,
             {{scaled, 1, L.ld_out}, {h, L.ld_in, kPanel<T>}, task.n});
}

// theta_{k+1} = theta_k - a m, m = momentum * m + scale * g + weight_decay * theta_k
template <class T>
void update(const MlpCall<T>& c, const Task<T>& task, int64_t k) {
  const MlpArguments<T>& a = *c.arguments;
  const MlpPlan& plan = *c.plan;
  const T *theta = task.theta(c, k), *grad = task.temp + plan.t_grad;
  T* next = task.state + plan.theta + (k + 1) * plan.theta_size;
  T* m = a.options.momentum != 0 ? task.temp + plan.t_w : nullptr;
  const T momentum = static_cast<T>(a.options.momentum), decay = static_cast<T>(a.options.weight_decay);
  double norm = 0;
  const T scale = a.options.clip < __builtin_inf() ? static_cast<T>(clip_scale(c, grad, &norm)) : T(1);
  for (int64_t p = 0; p < a.num_params; ++p) {
    const MlpParameter<T>& param = a.params[p];
    const Place& place = c.places[p];
    if (place.at == kAbsent || (plan.direct && param.moves && place.is_weight)) continue;
    if (!param.moves) {
      copy(place.rows * place.ld, theta + place.at, next + place.at);
    } else if (plan.plain) {
      for_elements(param, place, k, [&](int64_t i, auto lane, auto rate) {
        using V = decltype(lane);
        store(next + i, load<V>(theta + i) - rate * load<V>(grad + i));
      });
    } else {
      for_elements(param, place, k, [&](int64_t i, auto lane, auto rate) {
        using V = decltype(lane);
        V d = scale * load<V>(grad + i);
        if (decay != 0) d += decay * load<V>(theta + i);
        if (m) {
          d += momentum * load<V>(m + i);
          store(m + i, d);
        }
        store(next + i, load<V>(theta + i) - rate * d);
      });
    }
  }
  if (plan.direct) {
    for (int64_t l = 0; l < plan.num_layers; ++l) {
      const MlpLayer& L = plan.layers[l];
      if (L.form == Form::kDense && L.moves) update_weight(c, task, L, k, next);
    }
  }
  if (m && plan.velocity != kAbsent) copy(plan.theta_size, m, task.state + plan.velocity + k * plan.theta_size);
}

// The reverse of `update` but for the gradient's own dependence on theta_k: from the cotangents u of theta_{k+1} and w
// of m,
//
//     s = w - a u,   r = scale * s (- the part through the norm),   u += weight_decay * s,   w = momentum * s,
//
// and the rates' gradients -u * m. The Hessian times r is still to be added to u.
template <class T>
void direction(const MlpCall<T>& c, const Task<T>& task, int64_t k) {
  const MlpArguments<T>& a = *c.arguments;
  const MlpPlan& plan = *c.plan;
  T *u = task.kept + plan.u, *r = task.temp + plan.t_r;
  T* w = a.options.momentum != 0 ? task.temp + plan.t_w : nullptr;
  const T* theta = task.theta(c, k);
  const T momentum = static_cast<T>(a.options.momentum), decay = static_cast<T>(a.options.weight_decay);
  const T* grad = nullptr;
  if (plan.needs_gradient) {
    gradient(c, task, k, /*weights=*/true, /*norms=*/true);
    grad = task.temp + plan.t_grad;
  }

  T scale = 1, through_norm = 0;
  if (a.options.clip < __builtin_inf()) {
    double norm;
    const double factor = clip_scale(c, grad, &norm);
    scale = static_cast<T>(factor);
    if (factor != 1) {
      double s_dot_g = 0;
      for (int64_t p = 0; p < a.num_params; ++p) {
        const MlpParameter<T>& param = a.params[p];
        const Place& place = c.places[p];
        if (!param.moves) continue;
        for (int64_t row = 0; row < place.rows; ++row) {
          s_dot_g += sum<T>(place.cols, [&](int64_t j, auto lane) {
            using V = decltype(lane);
            const int64_t i = place.at + row * place.ld + j;
            const T* rates = param.rate + k * param.rate_step;
            const V rate = param.rate_element ? load<V>(rates + row * place.cols + j) : V{} + *rates;
            V s = -(rate * load<V>(u + i));
            if (w) s += load<V>(w + i);
            return s * load<V>(grad + i);
          });
        }
      }
      const double damped = norm + kClipEpsilon;
      through_norm = static_cast<T>(a.options.clip / (norm * damped * damped) * s_dot_g);
    }
  }

  for (int64_t p = 0; p < a.num_params; ++p) {
    const MlpParameter<T>& param = a.params[p];
    const Place& place = c.places[p];
    if (place.at == kAbsent) continue;
    if (!param.moves) {
      fill(place.rows * place.ld, r + place.at, T(0));
      continue;
    }
    if (param.rate_sums || param.rate_gradient) {
      const T* m = w ? task.state + plan.velocity + k * plan.theta_size : nullptr;
      // m, which is stored with momentum alone
      auto moved = [&](int64_t i, auto lane) {
        using V = decltype(lane);
        if (m) return load<V>(m + i);
        V d = scale * load<V>(grad + i);
        if (decay != 0) d += decay * load<V>(theta + i);
        return d;
      };
      double total = 0;
      // some rates may be the same in all steps and others not
      const int64_t rate_row = param.rate_step != 0 ? k : 0;
      T* rate_u = param.rate_gradient ? task.kept + plan.rate_u + rate_row * plan.theta_size : nullptr;
      for (int64_t row = 0; row < place.rows; ++row) {
        const int64_t at = place.at + row * place.ld;
        if (param.rate_sums) {
          total += sum<T>(place.cols,
                          [&](int64_t j, auto lane) { return load<decltype(lane)>(u + at + j) * moved(at + j, lane); });
        } else {
          for_each<T>(place.cols, [&](int64_t j, auto lane) {
            using V = decltype(lane);
            store(rate_u + at + j, load<V>(rate_u + at + j) - load<V>(u + at + j) * moved(at + j, lane));
          });
        }
      }
      if (param.rate_sums) param.rate_sums[task.t * a.options.steps + k] = -total;
    }
    // where steps are products, the weight's own cotangent is scaled on the way into them
    if (plan.direct && place.is_weight && !place.transposed) continue;
    if (plan.plain) {
      for_elements(param, place, k, [&](int64_t i, auto lane, auto rate) {
        using V = decltype(lane);
        store(r + i, -(rate * load<V>(u + i)));
      });
      continue;
    }
    for_elements(param, place, k, [&](int64_t i, auto lane, auto rate) {
      using V = decltype(lane);
      V s = -(rate * load<V>(u + i));
      if (w) s += load<V>(w + i);
      V to = scale * s;
      if (through_norm != 0) to -= through_norm * load<V>(grad + i);
      store(r + i, to);
      if (decay != 0) store(u + i, load<V>(u + i) + decay * s);
      if (w) store(w + i, momentum * s);
    });
  }
}

}  // namespace mtml::MTML_ISA
