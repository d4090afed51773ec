// The reverse of mlp_adapt's forward sweep for one task, exact to second order: from the cotangents of its results to
// those of its start, of the rates and of the features.
#pragma once

#include "cuda/mlp_sweep.h"

namespace mtml::cuda {

template <class T>
__device__ void Sweep<T>::backward() {
  u_ = view(c.u, 0).fixed;
  direction_ = view(c.direction, 0).fixed;
  tangent_ = view(c.tangent, 0);
  start_backward();
  theta_ = fetch(c.theta, c.steps);
  evaluate_backward(c.evaluations - 1);
  for (int64_t k = c.steps - 1; k >= 0; --k) {
    // whoever still reads theta_{k+1}
    __syncthreads();
    theta_ = fetch(c.theta, k);
    record_ = fetch(c.record, k);
    __syncthreads();
    direction(k);
    if (!c.first_order) {
      __syncthreads();
      hessian(k);
    }
    if (c.every_step) evaluate_backward(k);
  }
  __syncthreads();
  finish_backward();
}

template <class T>
__device__ void Sweep<T>::start_backward() {
  T* w = c.w.fixed_size ? view(c.w, 0).fixed : nullptr;
  const T* from = c.d_fast ? c.d_fast + t * c.fast_size : nullptr;
  for_params([&](int, int l, int kind, const Param<T>& param) {
    for_places(l, kind, [&](int64_t i, int64_t place) {
      u_[place] = from ? from[i] : T(0);
      if (w) w[place] = 0;
      for (int64_t row = 0; row < c.rate_u.slots; ++row) in_device(c.rate_u, row).fixed[place] = 0;
    });
    if (from) from += param.size;
  });
  zero_features(c.support);
  zero_features(c.query);
  if (!c.is_gram) return;
  for_first_rows(n_, [&](int64_t, int64_t i) { support_u()[i] = 0; });
  for_first_rows(q_, [&](int64_t, int64_t i) { query_u()[i] = 0; });
}

template <class T>
__device__ void Sweep<T>::zero_features(const Rows<T>& rows) const {
  if (!rows.x_gradient) return;
  const int64_t width = c.layers[0].in;
  for (int64_t i = threadIdx.x; i < count(rows) * width; i += blockDim.x) rows.x_gradient[first(rows) * width + i] = 0;
}

// the cotangents of evaluation s, back to theta
template <class T>
__device__ void Sweep<T>::evaluate_backward(int64_t s) {
  const View at = fetch(c.evaluation, s), deltas = view(c.delta, 0);
  // this, and theta
  __syncthreads();
  loss_backward(s, array(at, c.layers[last()].query.z, q_), array(deltas, c.layers[last()].delta, q_));
  __syncthreads();
  for (int l = last(); l >= 0; --l) {
    const Layer& layer = c.layers[l];
    const T* delta = array(deltas, layer.delta, q_);
    if (l == 0) {
      add_to_features(c.query, q_, layer, product_back(0, delta, theta_.fixed), {});
      break;
    }
    const Layer& below = c.layers[l - 1];
    const T *h = array(at, layer.query.h, q_), *y = array(at, below.query.y, q_);
    T* to = array(deltas, below.delta, q_);
    products<T>(q_, layer.in, product_back(l, delta, theta_.fixed), {}, [&](int64_t row, int i, T value) {
      const int64_t place = row * layer.ld_in + i;
      to[place] = times_slope(c.activation, value, y ? y[place] : T(0), h[place]);
    });
    __syncthreads();
    if (!c.norm) continue;
    T* sums = vector(tangent_, below.sums);
    batch_norm_backward<T>(q_, below.out, below.ld_out, to, array(at, below.query.xh, q_), vector(at, below.query.r),
                           theta_.fixed + below.at[kGain], to, sums, sums + below.ld_out);
    add_norm_sums(below, sums);
    __syncthreads();
  }
  add_cotangents(true, [&](int l) {
    const Layer& layer = c.layers[l];
    const T* h = l == 0 ? features(c.query) : array(at, layer.query.h, q_);
    const T* delta = array(deltas, layer.delta, q_);
    return Pair{{delta, layer.ld_out, h, l == 0 ? layer.in : layer.ld_in, q_}, {}, delta};
  });
}

// cotangent of the last layer's outputs: of the losses through them, and their own
template <class T>
__device__ void Sweep<T>::loss_backward(int64_t s, const T* z, T* delta) {
  const Layer& layer = c.layers[last()];
  const bool labelled = c.d_losses && (c.query.labels || c.query.targets);
  const T scale = labelled ? static_cast<T>(mean_of(q_)) : T(0);
  const T weight = labelled ? c.d_losses[s * c.tasks + t] : T(0);
  const T* given = c.d_outputs ? c.d_outputs + (s * c.query.all + first(c.query)) * outputs() : nullptr;
  for_loss_rows<T>(c.loss, q_, outputs(), mask_, [&](int64_t row, const LossRow<T>& one) {
    T* d = delta + row * layer.ld_out;
    if (labelled)
      one.forward(z + row * layer.ld_out, loss_label(c.query, row), loss_targets(c.query, row), scale, nullptr, d);
    for (int o = one.lane; o < outputs(); o += one.lanes) {
      T value = labelled ? weight * d[o] : T(0);
      if (given && one.has(o)) value += given[row * outputs() + o];
      d[o] = value;
    }
  });
}

// The reverse of `step` but for the gradient's own dependence on theta_k: from the cotangents u of theta_{k+1} and w
// of m,
//
//     s = w - a u,   r = scale * s (- the part through the norm),   u += weight_decay * s,   w = momentum * s,
//
// and the rates' gradients -u * m.
template <class T>
__device__ void Sweep<T>::direction(int64_t k) {
  T *u = u_, *r = direction_;
  T* w = c.w.fixed_size ? view(c.w, 0).fixed : nullptr;
  const T* theta = theta_.fixed;
  const T* velocity = c.velocity.fixed_size ? in_device(c.velocity, k).fixed : nullptr;
  const bool clips = c.clip < INFINITY;
  double scale = 1, through_norm = 0;
  if (clips) {
    const double norm = sqrt(squares_of_gradient());
    scale = clip_factor(norm, c.clip);
    // the same for all threads
    if (scale != 1) {
      double s_dot_g = 0;
      for_params([&](int, int l, int kind, const Param<T>& param) {
        if (!param.moves) return;
        for_gradient(l, kind, [&](int64_t i, int64_t place, T g) {
          T s = -(rate(param, k, i) * u[place]);
          if (w) s += w[place];
          s_dot_g += static_cast<double>(s) * static_cast<double>(g);
        });
      });
      through_norm = clip_slope(norm, c.clip, block_sum(s_dot_g, room_));
    }
  }
  const T factor = static_cast<T>(scale), norm_factor = static_cast<T>(through_norm);
  double* const sums = room_ + blockDim.x / kWarp;
  for_params([&](int p, int l, int kind, const Param<T>& param) {
    if (!param.moves) {
      for_places(l, kind, [&](int64_t, int64_t place) { r[place] = 0; });
      return;
    }
    T* rate_u = param.rate_gradient ? in_device(c.rate_u, param.rate_step != 0 ? k : 0).fixed : nullptr;
    const bool by_rate = rate_u || c.rate_sums_wanted;
    double total = 0;
    const auto element = [&](int64_t i, int64_t place, T g) {
      if (by_rate) {
        T moved = factor * g;
        if (c.weight_decay != 0) moved += c.weight_decay * theta[place];
        if (velocity) moved = velocity[place];
        if (rate_u) rate_u[place] -= u[place] * moved;
        total -= static_cast<double>(u[place]) * static_cast<double>(moved);
      }
      T s = -(rate(param, k, i) * u[place]);
      if (w) s += w[place];
      T to = factor * s;
      if (through_norm != 0) to -= norm_factor * g;
      r[place] = to;
      if (c.weight_decay != 0) u[place] += c.weight_decay * s;
      if (w) w[place] = c.momentum * s;
    };
    if (is_gram(l, kind) && c.rate_sums_wanted) {
      const T* d = of_step(c.layers[0].d);
      for_features_times_cotangent([&](int64_t row, int o, T value) {
        total -= static_cast<double>(value) * static_cast<double>(d[row * c.layers[0].ld_out + o]);
      });
    }
    // the gradient is computed again only where something asks for it
    if (through_norm != 0 || (by_rate && !velocity)) {
      for_gradient(l, kind, element);
    } else {
      for_places(l, kind, [&](int64_t i, int64_t place) { element(i, place, T(0)); });
    }
    if (!c.rate_sums_wanted) return;
    total = warp_sum(total);
    if (threadIdx.x % kWarp == 0) sums[p * (blockDim.x / kWarp) + threadIdx.x / kWarp] = total;
  });
  if (!c.rate_sums_wanted) return;
  __syncthreads();
  for (int p = threadIdx.x; p < c.num_params; p += blockDim.x) {
    double total = 0;
    if (c.params[p].moves)
      for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += sums[p * (blockDim.x / kWarp) + warp];
    c.rate_sums[(p * c.tasks + t) * c.steps + k] = total;
  }
}

// u += the Hessian of the support loss at theta_k times the direction, by the R-operator
template <class T>
__device__ void Sweep<T>::hessian(int64_t k) {
  const T* v = direction_;
  for (int l = 0; l <= last(); ++l) {
    const Layer& layer = c.layers[l];
    const T* h = l == 0 ? features(c.support) : of_step(layer.support.h);
    const T* rh = l == 0 ? nullptr : of_tangent(layer.rh);
    const Layer& above = c.layers[l < last() ? l + 1 : l];
    T *ry = of_tangent(layer.ry), *rxh = of_tangent(layer.rxh), *rz = of_tangent(layer.rd);
    T* next = layer.hidden ? of_tangent(above.rh) : nullptr;
    const T *y = of_step(layer.support.y), *out = layer.hidden ? of_step(above.support.h) : nullptr;
    const bool norm = has_norm(l);
    const T* bias = bias_counts(l) ? v + layer.at[kBias] : nullptr;
    Factors<T> through{}, moved{};
    if (l > 0) through = product_with_weight(l, rh, layer.ld_in, true);
    if (param(l, kWeight).moves)
      moved = {
          h,       l == 0 ? layer.in : layer.ld_in, l > 0 || c.support.quads, v + layer.at[kWeight], 1, layer.ld_weight,
          layer.in};
    const auto output = [&](int64_t row, int o, T value) {
      if (bias) value += bias[o];
      const int64_t at = row * layer.ld_out + o;
      if (!layer.hidden) {
        rz[at] = value;
      } else if (norm) {
        rxh[at] = value;
      } else {
        if (ry) ry[at] = value;
        next[at] = times_slope(c.activation, value, y ? y[at] : T(0), out[at]);
      }
    };
    if (is_gram(l, kWeight)) {
      const Param<T>& weight = param(l, kWeight);
      const T scaled = weight.moves ? -rate(weight, k, 0) : T(0);
      for_features_times_cotangent([&](int64_t row, int o, T value) { output(row, o, scaled * value); });
    } else {
      products<T>(n_, layer.out, through, moved, output);
    }
    __syncthreads();
    if (!norm) continue;
    T* to = ry ? ry : next;
    batch_norm_tangent<T>(n_, layer.out, layer.ld_out, rxh, of_step(layer.support.xh), vector(record_, layer.support.r),
                          theta_.fixed + layer.at[kGain], v + layer.at[kGain], v + layer.at[kShift], rxh,
                          vector(tangent_, layer.rr), to);
    for_channel_rows(layer, n_,
                     [&](int64_t at) { next[at] = times_slope(c.activation, to[at], y ? y[at] : T(0), out[at]); });
    __syncthreads();
  }
  const Layer& top = c.layers[last()];
  const T mean = static_cast<T>(mean_of(n_));
  for_loss_rows<T>(c.loss, n_, outputs(), mask_, [&](int64_t row, const LossRow<T>& one) {
    one.tangent(of_step(top.support.z) + row * top.ld_out, mean, of_tangent(top.rd) + row * top.ld_out);
  });
  __syncthreads();
  for (int l = last(); l >= 0; --l) {
    const Layer& layer = c.layers[l];
    const T *rd = of_tangent(layer.rd), *d = of_step(layer.d);
    const Factors<T> through = product_back(l, rd, theta_.fixed);
    Factors<T> moved{};
    if (param(l, kWeight).moves) moved = product_back(l, d, v);
    if (l == 0) {
      add_to_features(c.support, n_, layer, through, moved);
      break;
    }
    const Layer& below = c.layers[l - 1];
    const T *h = of_step(layer.support.h), *y = of_step(below.support.y), *e = of_step(below.e),
            *ry = of_tangent(below.ry);
    T* to = of_tangent(below.rd);
    products<T>(n_, layer.in, through, moved, [&](int64_t row, int i, T value) {
      const int64_t at = row * layer.ld_in + i;
      const T input = y ? y[at] : T(0);
      to[at] = c.act_is_linear ? times_slope(c.activation, value, input, h[at])
                               : slope_tangent(c.activation, value, e[at], ry[at], input, h[at]);
    });
    __syncthreads();
    if (!c.norm) continue;
    T* sums = vector(tangent_, below.sums);
    batch_norm_backward_tangent<T>(n_, below.out, below.ld_out, of_step(below.dy), to, of_step(below.support.xh),
                                   of_tangent(below.rxh), vector(record_, below.support.r), vector(tangent_, below.rr),
                                   theta_.fixed + below.at[kGain], v + below.at[kGain], to, sums, sums + below.ld_out);
    add_norm_sums(below, sums);
    __syncthreads();
  }
  add_cotangents(false, [&](int l) {
    const Layer& layer = c.layers[l];
    const T *rd = of_tangent(layer.rd), *d = of_step(layer.d);
    if (l == 0) return Pair{{rd, layer.ld_out, features(c.support), layer.in, n_}, {}, rd};
    return Pair{{rd, layer.ld_out, of_step(layer.support.h), layer.ld_in, n_},
                {d, layer.ld_out, of_tangent(layer.rh), layer.ld_in, n_},
                rd};
  });
}

template <class T>
__device__ void Sweep<T>::finish_backward() {
  // for the sums over tasks
  save(c.u, 0);
  for_params([&](int, int l, int kind, const Param<T>& param) {
    if (!param.gradient || param.task_stride == 0) return;
    T* to = param.gradient + t * param.task_stride;
    for_places(l, kind, [&](int64_t i, int64_t place) { to[i] = u_[place]; });
  });
}

}  // namespace mtml::cuda
